"""How long `qlora plan` takes."""
