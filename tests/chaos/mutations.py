"""Manifests with up to three mutated fields: every bound of the schema, arbitrary types, and Hypothesis's choices."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qlora_api.crd import root_schema
from tests.make import make_manifest

Schema = dict[str, Any]
Path = tuple[str | int, ...]
SOON: Final[Mapping[str, Any]] = {"deadlines": {"startup": "60s"}}
"""A short startup deadline, for pods that do not start and services that are away."""
BASES: Final[tuple[Mapping[str, Any], ...]] = (
    {},
    {"resources": {"nodes": 2, "gpusPerNode": 2}, "quantization": {"bits": 8}},
    {"method": "lora", "quantization": {"bits": 16}, "evaluation": {"generations": 4}, "suspend": True},
)
"""A run on a CPU, one on several GPUs, and a suspended one."""
EXAMPLES: Final = ("s3://bucket/rows.jsonl", "http://host/path", "name", "10m", "1Gi", "{question}")
"""One of these matches every pattern of the schema."""
WILD: Final[tuple[Any, ...]] = (
    None, "", "\u00fc \u2028\n\t", "x" * 70_000, -1, 0, 2**63, 1e308, 0.5, True, [], [None], {}, {"no": 1},
)  # fmt: skip
LONGEST_TEXT: Final = 40
WILD_SHARE: Final = 9
"""One in ten random values is arbitrary."""


@dataclass(frozen=True)
class Mutation:
    """A mutated spec, and what was mutated."""

    what: str
    spec: dict[str, Any]

    def manifest(self, name: str, namespace: str) -> dict[str, Any]:
        """Return the manifest with a name and a namespace."""
        return {**make_manifest(name, namespace), "spec": self.spec}


def fields(schema: Schema, path: Path = ()) -> Iterator[tuple[Path, Schema]]:
    """Yield every field below a schema; index 0 represents the entries of a list."""
    for name, field in schema.get("properties", {}).items():
        yield (*path, name), field
        yield from fields(field, (*path, name))
    if "items" in schema:
        yield (*path, 0), schema["items"]
        yield from fields(schema["items"], (*path, 0))


SPEC: Final[Schema] = root_schema()["properties"]["spec"]
FIELDS: Final = tuple(fields(SPEC))


def minimal(schema: Schema) -> Any:
    """Return a small valid value."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object":
            return {name: minimal(schema["properties"][name]) for name in schema.get("required", ())}
        case "array":
            return [minimal(schema["items"])] * schema.get("minItems", 0)
        case "string":
            return next(text for text in EXAMPLES if re.search(schema.get("pattern", ""), text))
        case "boolean":
            return False
    return schema.get("minimum", 0) + bool(schema.get("exclusiveMinimum"))


def edges(schema: Schema) -> Iterator[Any]:
    """Yield values on the bounds of a schema, and just beyond them."""
    yield from schema.get("enum", ())
    kind = schema["type"]
    if kind in {"integer", "number"}:
        for bound in (schema.get("minimum"), schema.get("maximum")):
            yield from () if bound is None else (bound - 1, bound, bound + 1)
    if kind == "string":
        most = schema.get("maxLength", 64)
        yield from (stretch(schema, most), stretch(schema, most + 1))
    if kind == "array":
        most = schema.get("maxItems", 16)
        yield from ([minimal(schema["items"])] * count for count in (1, most, most + 1))
    if kind == "object":
        yield {}
        most = schema.get("maxProperties", 0)
        yield from ({f"key-{index}": 1 for index in range(count)} for count in (most, most + 1))


def stretch(schema: Schema, length: int) -> str:
    """Return a text of this length that matches the pattern if possible."""
    example = "x" if "enum" in schema else str(minimal(schema))
    return (example + example[-1].replace("}", "}x") * length)[:length]


def put(spec: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Return a spec with one value set, and the required fields around it."""
    changed = copy.deepcopy(spec)
    node: Any = changed
    schema = SPEC
    for step, following in pairwise(path):
        schema = schema["items"] if isinstance(step, int) else schema["properties"][step]
        if isinstance(node, list):
            node[:] = node[:1] or [minimal(schema)]
        elif not isinstance(node.get(step), list if isinstance(following, int) else dict):
            node[step] = minimal(schema)
        node = node[step]
    if isinstance(node, list):
        node[:] = [value]
    else:
        node[path[-1]] = value
    return changed


def without(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a spec without a top-level field."""
    return {key: value for key, value in spec.items() if key != path[0]}


def systematic() -> Iterator[Mutation]:
    """Yield every field with every edge and wild value, and without it."""
    specs = [make_manifest(**base, **SOON)["spec"] for base in BASES]
    number = 0
    for path, schema in FIELDS:
        for value in (*edges(schema), *WILD):
            number += 1
            name = ".".join(map(str, path))
            yield Mutation(f"{name}={str(value)[:LONGEST_TEXT]!r}", put(specs[number % len(specs)], path, value))
        if len(path) == 1:
            yield Mutation(f"without {path[0]}", without(specs[0], path))


UTF8: Final = st.characters(codec="utf-8")
_SCALARS: Final = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
_ANY: Final = st.recursive(
    st.one_of(_SCALARS, st.text(UTF8)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(UTF8), inner),
    max_leaves=4,
)


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Values that the schema allows, apart from its CEL rules."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return _VALUES[schema["type"]](schema)


def _objects(schema: Schema) -> st.SearchStrategy[Any]:
    properties = {name: values(field) for name, field in schema.get("properties", {}).items()}
    required = {name: properties.pop(name) for name in schema.get("required", ())}
    return st.fixed_dictionaries(required, optional=properties)


def _texts(schema: Schema) -> st.SearchStrategy[Any]:
    text = st.from_regex(schema["pattern"]) if "pattern" in schema else st.text(UTF8, min_size=1)
    return text.map(lambda found: found[: schema.get("maxLength", 64)])


def _lists(schema: Schema) -> st.SearchStrategy[Any]:
    return st.lists(values(schema["items"]), min_size=schema.get("minItems", 0), max_size=4)


def _floats(schema: Schema) -> st.SearchStrategy[Any]:
    return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)


_VALUES: Final[dict[str, Callable[[Schema], st.SearchStrategy[Any]]]] = {
    "object": _objects,
    "array": _lists,
    "string": _texts,
    "boolean": lambda _: st.booleans(),
    "integer": lambda schema: st.integers(schema.get("minimum"), schema.get("maximum")),
    "number": _floats,
}


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """A valid manifest with up to three fields set to allowed, or sometimes arbitrary, values."""
    spec = make_manifest(**draw(st.sampled_from(BASES)), **SOON)["spec"]
    what = []
    for path, schema in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        value = draw(_ANY if draw(st.integers(0, WILD_SHARE)) == 0 else values(schema))
        spec = put(spec, path, value)
        what.append(f"{'.'.join(map(str, path))}={str(value)[:LONGEST_TEXT]!r}")
    return Mutation(" ".join(what), spec)


def random_mutations(count: int) -> list[Mutation]:
    """Return random mutations from Hypothesis, the same in every run."""
    found: list[Mutation] = []

    @settings(
        max_examples=count, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutations())
    def collect(mutation: Mutation) -> None:
        found.append(mutation)

    collect()
    return found
