-- A copy under another name, which trains again; the first run and its result are not changed. The copy is not in
-- Git, so it has none of the labels and annotations by which Argo CD would track it as the first run, or prune it.
local function without_empty(value)
  -- An empty table could be a list or an object, and Argo CD would have to guess; the API server sets the default.
  if type(value) ~= "table" then
    return value
  end
  local kept = {}
  for key, item in pairs(value) do
    if type(item) ~= "table" or next(item) ~= nil then
      kept[key] = without_empty(item)
    end
  end
  return kept
end

local copy = {
  apiVersion = obj.apiVersion,
  kind = obj.kind,
  metadata = {
    -- A name may have 52 characters.
    name = string.sub(obj.metadata.name, 1, 37) .. "-" .. os.date("!%Y%m%d%H%M%S"),
    namespace = obj.metadata.namespace,
  },
  spec = without_empty(obj.spec),
}
copy.spec.suspend = false

return { { ["operation"] = "create", ["resource"] = copy } }
