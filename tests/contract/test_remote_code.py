"""Every call that could run the code of a model, an adapter or a dataset says that it must not."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
FOLDERS: Final = ("operator", "trainer_image", "benchmarks", "examples")
LOADERS: Final = {"from_pretrained", "from_config"}
"""Methods of transformers' Auto classes."""
FUNCTIONS: Final = {"HFLM", "pipeline"}
"""Callables that load by themselves."""


def _name(expression: ast.expr) -> str:
    """Return the last part of a dotted name."""
    match expression:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
        case _:
            return ""


def _may_run_code(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(value=owner, attr=method) if method in LOADERS:
            return _name(owner).startswith("Auto")
        case _:
            return _name(call.func) in FUNCTIONS


def _refuses(call: ast.Call) -> bool:
    values = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
    return any(isinstance(value, ast.Constant) and value.value is False for value in values)


def find_calls(source: str) -> Iterator[tuple[int, bool]]:
    """Yield line and verdict of every call that may run code of others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _may_run_code(node):
            yield node.lineno, _refuses(node)


def test_every_loader_refuses_code_of_others() -> None:
    found = [
        (f"{path.relative_to(ROOT)}:{line}", refuses)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, refuses in find_calls(path.read_text())
    ]
    assert len(found) >= 8, "the check finds the calls"
    assert [place for place, refuses in found if not refuses] == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=trusted)",
        "AutoModel.from_config(config, trust_remote_code=None)",
        "AutoPeftModelForCausalLM.from_pretrained(folder, **options)",
        "lm_eval.models.huggingface.HFLM(pretrained=model)",
        "pipeline('text-generation', folder)",
    ],
)
def test_call_that_may_run_code_is_found(source: str) -> None:
    assert list(find_calls(source)) == [(1, False)]


@pytest.mark.parametrize(
    "source", ["AutoTokenizer.from_pretrained(folder, trust_remote_code=False)", "HFLM(model, trust_remote_code=False)"]
)
def test_call_that_refuses_code_passes(source: str) -> None:
    assert list(find_calls(source)) == [(1, True)]


@pytest.mark.parametrize("source", ["PeftConfig.from_pretrained(folder)", "GenerationConfig(do_sample=False)"])
def test_call_that_runs_no_code_is_left_out(source: str) -> None:
    assert list(find_calls(source)) == []
