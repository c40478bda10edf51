"""Parses YAML files into documents with the line of each field; independent of QLoRAJobs."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import yaml

from qlora_api.escapes import escape_line

Location = tuple[str | int, ...]
"""Keys and list indices from the document's root to a field."""

STDIN: Final = "-"
MAX_FIELDS: Final = 100_000
"""Fields of a document, with what its aliases repeat; a QLoRAJob has a hundred, a large CRD tens of thousands."""
_NO_VALUE: Final = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""What PyYAML raises besides YAMLError for a scalar that its tag or Python does not allow, such as an integer of 5,000
digits or a month 13."""
MAX_LISTS: Final = 16
"""Lists in lists that are taken apart; kubectl writes one."""
_NOT_AN_INTEGER: Final = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+$")
"""1:30, which YAML 1.1 takes for 90, and Kubernetes for text."""
GO_EXPONENT: Final = 1e21
"""From here on Go writes a number with an exponent, which the API server takes for no integer."""
_FLOAT: Final = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_YAML_TAG: Final = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Parses scalars as Kubernetes does: 4e-4 is a number, 2026-01-31 is a string."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's own attribute)
        first: [rule for rule in rules if rule[0] not in {f"{_YAML_TAG}timestamp", f"{_YAML_TAG}float"}]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(f"{_YAML_TAG}float", _FLOAT, list("-+.0123456789"))


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    return node.value if _NOT_AN_INTEGER.match(node.value) else loader.construct_yaml_int(node)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """Return 16.0 and 1e3 as integers: what kubectl sends, since it writes numbers as Go does."""
    number = loader.construct_yaml_float(node)
    return int(number) if number.is_integer() and abs(number) < GO_EXPONENT else number


_Loader.add_constructor(f"{_YAML_TAG}int", _construct_integer)
_Loader.add_constructor(f"{_YAML_TAG}float", _construct_float)


class YamlError(Exception):
    """The text is not valid YAML; the message starts with the position."""


@dataclass(frozen=True)
class Document:
    """One document of a file: its value, and the position of each field."""

    file: str
    value: Any
    positions: Mapping[Location, str]

    def position_of(self, location: Location) -> str:
        """Return file and line of a field, or of its nearest parent that has a position."""
        while location and location not in self.positions:
            location = location[:-1]
        return self.positions.get(location, self.file)

    def index_of(self, location: Location) -> int:
        """Return the index of a field in the order of the file."""
        while location and location not in self.positions:
            location = location[:-1]
        return list(self.positions).index(location) if location in self.positions else 0


def parse_value(text: str) -> Any:
    """Parse one YAML value, as in `--set path=value`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise YamlError(f"{text!r} is not YAML") from error
    except (*_NO_VALUE, RecursionError) as error:
        raise YamlError(f"{text[:100]!r} is not a YAML value: {error}") from error


def read_documents(file: str) -> list[Document]:
    """Parse a file, or standard input for '-', into objects; empty documents are skipped, and lists taken apart."""
    text = sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8")
    documents = parse_documents(text, "standard input" if file == STDIN else file)
    return [item for document in documents for item in items_of(document)]


def items_of(document: Document, depth: int = MAX_LISTS) -> list[Document]:
    """Return the items of a List, as `kubectl get -o yaml` writes and `kubectl apply` reads it, or the document."""
    value = document.value
    is_list = isinstance(value, dict) and str(value.get("kind", "")).endswith("List")
    if not is_list or not isinstance(value.get("items"), list) or not depth:
        return [document]
    positions: defaultdict[str | int, dict[Location, str]] = defaultdict(dict)
    for path, position in document.positions.items():
        if len(path) > 1 and path[0] == "items":
            positions[path[1]][path[2:]] = position
    items = [Document(document.file, item, positions[index]) for index, item in enumerate(value["items"])]
    return [nested for item in items if item.value is not None for nested in items_of(item, depth - 1)]


def parse_documents(text: str, file: str) -> list[Document]:
    """Parse every document of a text.

    Args:
        text: YAML.
        file: Name of the file, for positions.

    Raises:
        YamlError: The text is not valid YAML.

    """
    file = escape_line(file)
    try:
        loader = _Loader(text)
        return [document for document in _documents(loader, file) if document.value is not None]
    except yaml.MarkedYAMLError as error:
        raise YamlError(f"{_position(file, error.problem_mark or error.context_mark)}: {_message(error)}") from error
    except RecursionError as error:
        raise YamlError(f"{file}: an anchor contains itself, or the nesting is too deep") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{file}: {str(error).splitlines()[0]}") from error
    except _NO_VALUE as error:
        raise YamlError(f"{file}: a value cannot be read: {error}; quote it, or remove its tag") from error


def _documents(loader: _Loader, file: str) -> Iterator[Document]:
    while loader.check_node():
        node: Any = loader.get_node()
        positions = dict(islice(_positions(node, (), file), MAX_FIELDS + 1))
        if len(positions) > MAX_FIELDS:
            raise yaml.MarkedYAMLError(
                problem=f"has more than {MAX_FIELDS:,} fields, with those that aliases repeat; split it",
                problem_mark=node.start_mark,
            )
        yield Document(file, loader.construct_document(node), positions)


def _positions(node: yaml.Node, location: Location, file: str) -> Iterator[tuple[Location, str]]:
    """Yield the position of each field below a node; a duplicate key is an error, as for the API server."""
    if not location:
        yield location, _position(file, node.start_mark)
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(_key_of(key), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(position, value, value) for position, value in enumerate(node.value)]
    seen: set[str | int] = set()
    for name, start, child in children:
        if name in seen:
            raise yaml.MarkedYAMLError(problem=f"duplicate key '{name}'", problem_mark=start.start_mark)
        seen.add(name)
        yield (*location, name), _position(file, start.start_mark)
        yield from _positions(child, (*location, name), file)


def _key_of(node: yaml.Node) -> str:
    """Return a key, or raise YAMLError: {{ .Values.name }} is a mapping whose key is a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        problem = "invalid map key; quote the value, or render the template (helm template) before it is read"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return str(node.value)


def _position(file: str, mark: yaml.Mark | None) -> str:
    return f"{file}:{mark.line + 1}" if mark else file


def _message(error: yaml.MarkedYAMLError) -> str:
    return escape_line(", ".join(part for part in (error.context, error.problem) if part))
