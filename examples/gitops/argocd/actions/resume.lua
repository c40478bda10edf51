-- Resumes training from its checkpoint.
obj.spec.suspend = false
return obj
