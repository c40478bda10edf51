-- Actions that are available: a run that has ended can only be run again, and one that failed be retried.
local finished, failed = false, false
if obj.status ~= nil and obj.status.conditions ~= nil then
  for _, condition in ipairs(obj.status.conditions) do
    if condition.type == "Finished" and condition.status == "True" then
      finished = true
    end
    if condition.type == "Stalled" and condition.status == "True" then
      failed = true
    end
  end
end
local suspended = obj.spec.suspend == true

return {
  ["suspend"] = { ["disabled"] = finished or suspended },
  ["resume"] = { ["disabled"] = finished or not suspended },
  ["retry"] = { ["disabled"] = not failed },
  ["rerun"] = { ["disabled"] = not finished },
}
