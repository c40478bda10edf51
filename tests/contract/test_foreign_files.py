"""Files are read through `qlora_api.foreign_files`, which opens regular files only, and reads so many bytes only."""

import ast
from collections.abc import Iterator
from typing import Final

import pytest

from tests.contract.test_path_joins import parsed

ALLOWED: Final = {
    "foreign_files.py": "the module itself",
    "__main__.py": "the configuration that the operator mounts",
    "credentials.py": "a mounted Secret",
    "hardware.py": "/proc and /sys",
    "kube_client.py": "the namespace that Kubernetes mounts",
    "launcher.py": "messages that the pod's own processes wrote, and /proc",
    "local_store.py": "what is uploaded, a file of the run's own",
    "progress.py": "the mounted token",
    "render_limits.py": "/proc",
    "resource_limits.py": "/proc",
}
"""Modules that read files otherwise, with the reason: nobody else writes these files."""
_READING: Final = frozenset({"read_text", "read_bytes"})


def readings(tree: ast.AST) -> Iterator[str]:
    """Yield every call that opens a file for reading."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if name in _READING:
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(attr="open"), args=[ast.Constant(value=str() as mode), *_]):
                yield from () if set(mode) & set("wax") else (ast.unparse(node),)
            case (
                ast.Call(func=ast.Name(id="open")) | ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="open"))
            ):
                yield ast.unparse(node)


def test_files_are_read_through_one_module() -> None:
    found = {file.name: list(readings(tree)) for file, tree in parsed().items() if list(readings(tree))}
    assert {name: calls for name, calls in found.items() if name not in ALLOWED} == {}, "use qlora_api.foreign_files"
    assert sorted(set(ALLOWED) - set(found)) == [], "no longer in the code"


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text()",
        "(folder / 'x').read_bytes()",
        "path.open('rb')",
        "path.open('r', encoding='utf-8')",
        "open(path)",
        "open(path, 'rb')",
        "os.open(path, os.O_RDONLY)",
    ],
)
def test_check_finds_files_that_are_read(source: str) -> None:
    assert list(readings(ast.parse(source))) == [source]


@pytest.mark.parametrize("source", ["path.open('wb')", "connection.open()", "path.write_text('x')", "file.read()"])
def test_check_accepts_what_reads_no_file(source: str) -> None:
    assert list(readings(ast.parse(source))) == []
