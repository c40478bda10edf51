"""The commands of `qlora`, one module each, named after the command."""
