"""Generates CRD, RBAC rules, chart values schema and reference pages from the code; part of no image."""
