-- The training writes a checkpoint and gives its GPUs back.
obj.spec.suspend = true
return obj
