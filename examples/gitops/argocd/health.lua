-- Health of a QLoRAJob in Argo CD, from its conditions; a status older than the spec is ignored.
local hs = { status = "Progressing", message = "waiting for the operator" }

if obj.status == nil or obj.status.conditions == nil then
  return hs
end
if obj.status.observedGeneration ~= obj.metadata.generation then
  hs.message = "waiting for the operator to see the change"
  return hs
end

local holds, message = {}, {}
for _, condition in ipairs(obj.status.conditions) do
  holds[condition.type] = condition.status == "True"
  message[condition.type] = condition.reason .. ": " .. condition.message
end

if holds["Stalled"] then
  return { status = "Degraded", message = message["Stalled"] }
end
if holds["Suspended"] then
  return { status = "Suspended", message = message["Suspended"] }
end
if holds["Ready"] then
  return { status = "Healthy", message = message["Ready"] }
end
hs.message = message["Reconciling"] or hs.message
if obj.status.progress ~= nil then
  hs.message = obj.status.progress .. ", " .. hs.message
end
return hs
