"""The commands of `qlora`: one file each, named as the command."""
