"""Creates the quickstart's dataset: questions about Python's standard library, answered by its docstrings.

A row asks for one function, method or class; the answer is the first sentence of its docstring. Complete modules are
held out, and no held-out answer occurs in the training rows, so the held-out loss falls only by generalization.
The rows in `data/` were created with Python 3.11 on Linux; other versions have other docstrings.
"""

import hashlib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

DATA: Final = Path(__file__).with_name("data")
TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"

_TRAINED: Final = """
    argparse ast asyncio base64 bisect collections contextlib copy datetime decimal dis enum functools gettext hashlib
    heapq html inspect io itertools json linecache locale logging math operator os os.path pathlib pickle platform
    pprint random re secrets selectors shelve shlex signal socket sqlite3 string struct subprocess sys sysconfig
    tarfile tempfile threading time timeit tokenize traceback types typing unicodedata unittest.mock urllib.parse uuid
    warnings weakref webbrowser xml.etree.ElementTree
"""
_HELD_OUT: Final = "fractions glob gzip ipaddress queue sched shutil statistics textwrap zipfile"
HELD_OUT_MODULES: Final = frozenset(_HELD_OUT.split())
MODULES: Final = (*sorted(HELD_OUT_MODULES), *_TRAINED.split())
"""Held-out modules come first: a sentence of two modules stays with the held-out one."""
SENTENCE: Final = re.compile(r"[A-Z][^\n]{18,158}?[a-z0-9)]\.(?=\s|$)")
"""A first sentence of 20 to 160 characters."""
NOT_PROSE: Final = re.compile(r">>>|->|::|[`*|\\]|\.\.\.|\bD\.|^Alias |^Initialize self|^Same as ")


class Row(NamedTuple):
    """One question and its answer."""

    module: str
    instruction: str
    response: str


def public_objects(module_name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield kind, dotted name and object of each public member of a module."""
    module = importlib.import_module(module_name)
    exported = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
    for name in sorted(exported):
        member = getattr(module, name, None)
        if getattr(member, "__name__", None) != name:
            continue  # an alias of an object with another name
        if inspect.isclass(member):
            yield "class", f"{module_name}.{name}", member
            for method, function in sorted(vars(member).items()):
                if inspect.isroutine(function) and not method.startswith("_"):
                    yield "method", f"{module_name}.{name}.{method}", function
        elif inspect.isroutine(member):
            yield "function", f"{module_name}.{name}", member


def first_sentence(docstring: Any) -> str | None:
    """Return the first sentence if it is prose and of a readable length."""
    text = " ".join(inspect.cleandoc(docstring if isinstance(docstring, str) else "").split("\n\n")[0].split())
    match = SENTENCE.match(text)
    return match[0] if match and not NOT_PROSE.search(match[0]) else None


def all_rows() -> Iterator[Row]:
    """Yield a row for each documented object, modules in the order of MODULES."""
    for module in MODULES:
        for kind, path, member in public_objects(module):
            if answer := first_sentence(getattr(member, "__doc__", None)):
                yield Row(module, f"What does the Python {kind} `{path}` do?", answer)


def split_rows() -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows; of rows with the same answer only the first is used."""
    unique: dict[str, Row] = {}
    for row in all_rows():
        unique.setdefault(re.sub(r"\W+", " ", row.response).lower(), row)
    rows = sorted(unique.values())
    held_out = [row for row in rows if row.module in HELD_OUT_MODULES]
    # Sort by hash, so that the first few, which the report shows, come from several modules.
    held_out.sort(key=lambda row: hashlib.sha256(row.instruction.encode()).digest())
    return [row for row in rows if row.module not in HELD_OUT_MODULES], held_out


def to_jsonl(rows: list[Row]) -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps({"instruction": row.instruction, "response": row.response}) + "\n" for row in rows)


def make_data(folder: Path) -> tuple[int, int]:
    """Write both files; return the number of training and of held-out rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        training, held_out = split_rows()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAIN).write_text(to_jsonl(training))
    (folder / HELD_OUT).write_text(to_jsonl(held_out))
    return len(training), len(held_out)


def main(folder: Annotated[Path, typer.Argument(help="where to write")] = DATA) -> None:
    """Write train.jsonl and heldout.jsonl from the docstrings of this Python."""
    training, held_out = make_data(folder)
    typer.echo(f"Python {sys.version.split()[0]}: {training} training rows and {held_out} held-out rows in {folder}")


if __name__ == "__main__":
    typer.run(main)
