-- Writes a checkpoint and releases the GPUs.
obj.spec.suspend = true
return obj
