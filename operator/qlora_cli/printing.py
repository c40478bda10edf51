"""Values for programs: JSON, and YAML as people write it."""

import json
from typing import Any, Final

import typer
import yaml

from qlora_cli.options import Output

WIDTH: Final = 120
_TEXT: Final = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, and texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TEXT, text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def to_yaml(value: Any) -> str:
    """Write a value as one document, its fields in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)


def print_data(value: Any, output: Output) -> None:
    """Print a value in the form that was asked for."""
    if output is Output.YAML:
        typer.echo(to_yaml(value), nl=False)
    else:
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
