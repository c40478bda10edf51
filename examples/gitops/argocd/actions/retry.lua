-- Lets a failed run try again from its checkpoint; the operator does so once for each value of the annotation.
if obj.metadata.annotations == nil then
  obj.metadata.annotations = {}
end
obj.metadata.annotations["qlora.dev/retry-requested-at"] = os.date("!%Y-%m-%dT%H:%M:%SZ")
return obj
