"""Parses YAML files into documents with the line of each field; independent of QLoRAJobs."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final

import yaml

from qlora_api.escapes import escape_line
from qlora_api.foreign_files import read_named
from qlora_api.units import MIB
from qlora_api.untrusted_json import MAX_NESTING
from qlora_cli.manifests.yaml_hints import explain_yaml_error

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
MAX_NODES: Final = 300_000
"""Keys and values of a file that are parsed, without what aliases repeat: MAX_FIELDS, and as many again."""
MAX_NUMBER: Final = 400
"""Characters of a number; the largest that JSON can hold has 309 digits, and to parse a longer one takes long."""
MAX_FILE_BYTES: Final = 4 * MIB
"""Largest file that is read; etcd stores objects of at most 1.5 MiB, and a file may have several."""
_UTF_16: Final = (b"\xff\xfe", b"\xfe\xff")


class _Loader(yaml.SafeLoader):
    """Parses scalars as Kubernetes does: 4e-4 is a number, 2026-01-31 is a string."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's own attribute)
        first: [rule for rule in rules if rule[0] not in {f"{_YAML_TAG}timestamp", f"{_YAML_TAG}float"}]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next key or value; too many are refused before they are read."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"has more than {MAX_NODES:,} keys and values; split the file", problem_mark=self.get_mark()
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(f"{_YAML_TAG}float", _FLOAT, list("-+.0123456789"))


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    return node.value if _NOT_AN_INTEGER.match(node.value) else loader.construct_yaml_int(_checked(node))


def _checked(node: yaml.ScalarNode) -> yaml.ScalarNode:
    """Return the node of a number, or raise ValueError: powers of 60, for one, take quadratic time."""
    if len(node.value) > MAX_NUMBER:
        raise ValueError(f"a number has {len(node.value):,} characters, more than {MAX_NUMBER}")
    return node


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """Return 16.0 and 1e3 as integers: what kubectl sends, since it writes numbers as Go does."""
    number = loader.construct_yaml_float(_checked(node))
    return int(number) if number.is_integer() and abs(number) < GO_EXPONENT else number


_Loader.add_constructor(f"{_YAML_TAG}int", _construct_integer)
_Loader.add_constructor(f"{_YAML_TAG}float", _construct_float)


class YamlError(Exception):
    """A file cannot be read, or is not valid YAML; the message starts with its name or the position."""


@dataclass(frozen=True)
class Duplicate:
    """A key that a mapping has twice, which the API server refuses."""

    location: Location
    position: str
    first: str
    """Position of the first one."""


@dataclass(frozen=True)
class Document:
    """One document of a file: its value, and the position of each field."""

    file: str
    value: Any
    positions: Mapping[Location, str]
    duplicates: tuple[Duplicate, ...] = ()

    def position_of(self, location: Location) -> str:
        """Return file and line of a field, or of its nearest parent that has a position."""
        while location and location not in self.positions:
            location = location[:-1]
        return self.positions.get(location, self.file)

    def index_of(self, location: Location) -> int:
        """Return the index of a field in the order of the file."""
        while location and location not in self.positions:
            location = location[:-1]
        return self._indices.get(location, 0)

    @cached_property
    def _indices(self) -> Mapping[Location, int]:
        return {location: index for index, location in enumerate(self.positions)}


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
    documents = parse_documents(read_text(file), name_of(file))
    return [item for document in documents for item in items_of(document)]


def name_of(file: str) -> str:
    """Return the name of a file in messages."""
    return "standard input" if file == STDIN else file


def read_text(file: str) -> str:
    """Return the text of a file, or of standard input.

    Raises:
        YamlError: It cannot be read, is too large, or is not text.

    """
    try:
        content = _read_bytes(file)
    except (OSError, ValueError) as error:
        raise YamlError(describe_read_error(file, error)) from error
    name = escape_line(name_of(file))
    if len(content) > MAX_FILE_BYTES:
        raise YamlError(f"{name}: has more than {MAX_FILE_BYTES // MIB} MiB, which no manifest has; give the manifest")
    if content.startswith(_UTF_16):
        raise YamlError(f"{name}: is UTF-16, as PowerShell writes it; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlError(f"{name}:{line}: not UTF-8; save it as UTF-8, or give the manifest") from error
    if "\0" in text:
        raise YamlError(f"{name}: is a binary file; give the manifest, a YAML file")
    return text


def _read_bytes(file: str) -> bytes:
    if file == STDIN:
        return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    return read_named(Path(file), MAX_FILE_BYTES + 1)


def describe_read_error(file: str, error: Exception) -> str:
    """Return why a file could not be read, and what to give instead."""
    name = escape_line(name_of(file))
    if isinstance(error, IsADirectoryError):
        return f"{name}: is a folder; give a manifest in it, such as {escape_line(str(Path(file) / 'job.yaml'))}"
    if isinstance(error, FileNotFoundError):
        return f"{name}: No such file or directory; correct the path, or write a manifest with qlora init"
    return f"{name}: {(error.strerror if isinstance(error, OSError) else None) or error}"


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
    duplicates: defaultdict[str | int, list[Duplicate]] = defaultdict(list)
    for found in document.duplicates:
        if len(found.location) > 1 and found.location[0] == "items":
            duplicates[found.location[1]].append(replace(found, location=found.location[2:]))
    items = [
        Document(document.file, item, positions[index], tuple(duplicates[index]))
        for index, item in enumerate(value["items"])
    ]
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
        mark = error.problem_mark or error.context_mark
        line, message = explain_yaml_error(text, mark.line if mark else None, _message(error))
        raise YamlError(f"{file if line is None else f'{file}:{line + 1}'}: {message}") from error
    except RecursionError as error:
        raise YamlError(f"{file}: an anchor contains itself, or the nesting is too deep") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{file}: {explain_yaml_error(text, None, str(error).splitlines()[0])[1]}") from error
    except _NO_VALUE as error:
        problem = f"a value cannot be read: {error}; quote it, or remove its tag"
        raise YamlError(f"{file}: {explain_yaml_error(text, None, problem)[1]}") from error


@dataclass
class _Budget:
    """What the documents of a file may have together, with what their aliases repeat: a kilobyte may be gigabytes."""

    fields: int = MAX_NODES
    characters: int = 2 * MAX_FILE_BYTES
    """Of keys and values: a text that is repeated takes no memory here, and all of it once it is written as JSON."""

    def take(self, *nodes: yaml.Node) -> None:
        """Take a field from the budget, or raise MarkedYAMLError."""
        self.fields -= 1
        self.characters -= sum(len(node.value) for node in nodes if isinstance(node, yaml.ScalarNode))
        if self.fields < 0:
            raise _too_large(f"{MAX_NODES:,} fields", nodes[0])
        if self.characters < 0:
            raise _too_large(f"{2 * MAX_FILE_BYTES // MIB} MiB of text", nodes[0])


def _too_large(what: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    problem = f"has more than {what}, with what aliases repeat; split it"
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _documents(loader: _Loader, file: str) -> Iterator[Document]:
    budget = _Budget()
    while loader.check_node():
        node: Any = loader.get_node()
        duplicates: list[Duplicate] = []
        positions = dict(islice(_positions(node, (), file, duplicates, budget), MAX_FIELDS + 1))
        if len(positions) > MAX_FIELDS:
            raise _too_large(f"{MAX_FIELDS:,} fields", node)
        yield Document(file, loader.construct_document(node), positions, tuple(duplicates))


def _positions(
    node: yaml.Node, location: Location, file: str, duplicates: list[Duplicate], budget: _Budget
) -> Iterator[tuple[Location, str]]:
    """Yield the position of each field below a node, and collect keys that a mapping has twice."""
    if not location:
        yield location, _position(file, node.start_mark)
    if len(location) > MAX_NESTING:  # each position has a key for every level
        raise RecursionError
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(_key_of(key), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(position, value, value) for position, value in enumerate(node.value)]
    seen: dict[str | int, str] = {}
    for name, start, child in children:
        budget.take(start, child)
        position = _position(file, start.start_mark)
        if name in seen:
            duplicates.append(Duplicate((*location, name), position, seen[name]))
        seen.setdefault(name, position)
        yield (*location, name), position
        yield from _positions(child, (*location, name), file, duplicates, budget)


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
