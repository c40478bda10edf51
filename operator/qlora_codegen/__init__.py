"""Writes every generated file: CRD, RBAC, chart values, references. In no image."""
