"""Proof that every trap's test would notice: each fix is removed in a copy of the tree, and its test must fail."""
