"""A foreign name becomes part of a path through ObjectName only: every other join has constants on its right side."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.contract.docs.blocks import ROOT

PACKAGES: Final = (
    "operator/qlora_api",
    "operator/qlora_planner",
    "operator/qlora_operator",
    "operator/qlora_cli",
    "trainer_image/qlora_trainer",
)
ALLOWED: Final = {
    ("object_names.py", "folder / self"): "ObjectName.below itself",
    ("store.py", "Path(CLAIMS_MOUNT, uri.removeprefix(CLAIM_SCHEME))"): "a URI of the spec, whose pattern has no '..'",
    ("store.py", "Path(CLAIMS_MOUNT, uri.removeprefix(CLAIM_SCHEME).partition('/')[0])"): "as above",
    ("architecture.py", "folder / file"): "tokenizer_config.json or config.json",
    ("__main__.py", "Path(CONFIG_MOUNT, file)"): "PREPARE_CONFIG_FILE or RUN_CONFIG_FILE",
    ("credentials.py", "mount / role"): "a SecretRole",
    ("credentials.py", "folder / key"): "one of _KEYS",
    ("publish.py", "folder / WEIGHTS_FOLDER[record.method]"): "a constant of the table",
    ("run.py", "files / WEIGHTS_FOLDER[config.spec.method]"): "a constant of the table",
    ("stages.py", "files / WEIGHTS_FOLDER[check.task.method]"): "a constant of the table",
    ("merge_job.py", "target.with_name(f'.{target.name}.{uuid4().hex}.part')"): "random digits",
    ("tokenized_dataset.py", "work / 'tokens' / uuid4().hex"): "random digits",
    ("model_config.py", "repository / 'refs' / revision"): "spec.model.revision, whose pattern has no '..'",
    ("model_config.py", "cache / f\"models--{name.replace('/', '--')}\""): "spec.model.uri; a segment without '/'",
    (
        "uris.py",
        "(base or Path.cwd()).absolute() / _expand_home(text)",
    ): "a path that a person gave, to be read on this machine",
    ("local_paths.py", "base / text"): "as above; it is only looked up",
}
"""Joins of texts that nobody else chooses, with the reason."""
_CONSTANT: Final = re.compile(r"_?[A-Z][A-Z0-9_]*")
_PATH: Final = re.compile(r"\bPath\b")
_PATH_NAMES: Final = frozenset({"folder", "target", "work", "root", "path", "cache", "mount", "directory", "parent"})
"""Names that stand for a path also where no annotation says so."""


@dataclass(frozen=True)
class Paths:
    """What is a path, as far as annotations say."""

    attributes: frozenset[str]
    """Fields, properties, methods and functions, by name."""

    @classmethod
    def of(cls, trees: list[ast.Module]) -> "Paths":
        found = set(_PATH_NAMES)
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.AnnAssign) and _is_path(node.annotation):
                found.add(ast.unparse(node.target).rpartition(".")[2])
            elif isinstance(node, ast.FunctionDef) and _is_path(node.returns):
                found.add(node.name)
        return cls(frozenset(found))

    def names_in(self, tree: ast.Module) -> set[str]:
        """Return arguments annotated as paths, and variables that paths are assigned to."""
        arguments = (node for node in ast.walk(tree) if isinstance(node, ast.arg) and _is_path(node.annotation))
        names = {node.arg for node in arguments} | self.attributes
        before = -1
        while before != len(names):
            before = len(names)
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign):
                    names.update(_assigned(node, lambda value: self.is_path(value, names)))
        return names

    def is_path(self, node: ast.expr, names: set[str] | frozenset[str]) -> bool:
        match node:
            case ast.Name(id=name):
                return name in names
            case ast.Attribute(attr=name):
                return name in self.attributes
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                return name in self.attributes | {"Path", "below", "resolve", "with_name", "expanduser", "absolute"}
            case ast.BinOp(left=left, op=ast.Div()):
                return self.is_path(left, names)
            case ast.Subscript(value=ast.Attribute(attr="parents")):
                return True
        return False


def _is_path(annotation: ast.expr | None) -> bool:
    return annotation is not None and _PATH.search(ast.unparse(annotation)) is not None


def _assigned(node: ast.Assign, is_path) -> Iterator[str]:
    for target in node.targets:
        if isinstance(target, ast.Name) and is_path(node.value):
            yield target.id
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for one, value in zip(target.elts, node.value.elts, strict=False):
                if isinstance(one, ast.Name) and is_path(value):
                    yield one.id


def is_constant(node: ast.expr) -> bool:
    """Whether nobody but the program chooses the text."""
    match node:
        case ast.Constant(value=str()):
            return True
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _CONSTANT.fullmatch(name) is not None
        case ast.JoinedStr(values=values):
            return all(isinstance(value, ast.Constant) or is_own_name(value) for value in values)
    return False


def is_own_name(value: ast.expr) -> bool:
    """Whether an interpolated value is a constant, or the last segment of a path: `file.name`."""
    match value:
        case ast.FormattedValue(value=ast.Attribute(attr="name")):
            return True
        case ast.FormattedValue(value=inner):
            return is_constant(inner)
    return False


def joins(tree: ast.Module, paths: Paths) -> Iterator[tuple[ast.expr, bool]]:
    """Yield every join of a path with a text, and whether the text is constant."""
    names = paths.names_in(tree)
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(left=left, op=ast.Div(), right=right) if paths.is_path(left, names):
                yield node, is_constant(right)
            case ast.BinOp(op=ast.Div(), right=ast.JoinedStr() | ast.Constant(value=str()) as right):
                yield node, is_constant(right)
            case ast.Call(func=ast.Name(id="Path" | "PurePath" | "PosixPath"), args=[_, *more]) if more:
                yield node, all(map(is_constant, more))
            case ast.Call(func=ast.Attribute(attr="with_name" | "joinpath" | "with_stem"), args=args):
                yield node, all(map(is_constant, args))
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="path"), attr="join"), args=[_, *more]):
                yield node, all(map(is_constant, more))


def foreign_joins(tree: ast.Module, paths: Paths) -> list[str]:
    return [ast.unparse(node) for node, constant in joins(tree, paths) if not constant]


def parsed() -> dict[Path, ast.Module]:
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def test_paths_are_joined_with_constants_or_object_names() -> None:
    trees = parsed()
    paths = Paths.of(list(trees.values()))
    found = {(file.name, text) for file, tree in trees.items() for text in foreign_joins(tree, paths)}
    assert sorted(found - set(ALLOWED)) == [], "write ObjectName(text).below(folder)"
    assert sorted(set(ALLOWED) - found) == [], "no longer in the code"
    assert sum(1 for tree in trees.values() for _ in joins(tree, paths)) > 60


@pytest.mark.parametrize(
    "source",
    [
        "target = folder / file.path",
        "def fetch(out: Path, name: str): return out / name",
        "def fetch(out: Path, name: str): return out / 'x' / name / 'y'",
        "def fetch(out: Path, name: str):\n    inner = out / 'x'\n    return inner / name",
        "def fetch(out: Path, name: str):\n    a, b = out / 'x', 1\n    return a / name",
        "Path(folder, name)",
        "Path('x', f'{name}.json')",
        "work / f'{name}.json'",
        "anything / f'{name}.json'",
        "self.store.folder / self.folder",
        "folder.joinpath('a', name)",
        "file.with_name(name)",
        "os.path.join(folder, name)",
        "import os.path\nos.path.join('a', name)",
        "Path(name).parent / entry.path.removeprefix('x')",
        "class A:\n    place: Path\ndef f(a, name): return a.place / name",
    ],
)
def test_check_finds_joins_with_foreign_names(source: str) -> None:
    tree = ast.parse(source)
    assert foreign_joins(tree, Paths.of([tree])) != []


@pytest.mark.parametrize(
    "source",
    [
        "folder / 'config.json'",
        "folder / _RECORD",
        "work / 'rows' / shards.TRAINING",
        "Path(CONFIG_MOUNT, RUN_CONFIG_FILE)",
        "file.with_name(f'{file.name}.part')",
        "loss / tokens",
        "name.below(folder)",
        "ObjectName(text).below(work / 'rows') / EVALUATION",
    ],
)
def test_check_accepts_constants_and_object_names(source: str) -> None:
    tree = ast.parse(source)
    assert foreign_joins(tree, Paths.of([tree])) == []


def test_stores_check_a_name_wherever_they_make_a_key_or_a_local_path() -> None:
    storage = ROOT / "trainer_image/qlora_trainer/storage"
    for file, join in (("s3.py", "{self._prefix}"), ("local_store.py", ".below(self.folder)")):
        lines = [line for line in (storage / file).read_text(encoding="utf-8").splitlines() if join in line]
        assert lines != []
        assert [line for line in lines if "check_name(path, self.root, self._field_ref)" not in line] == []
