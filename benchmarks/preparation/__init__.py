"""How fast rows are prepared."""
