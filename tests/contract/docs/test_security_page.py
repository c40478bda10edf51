"""Every test that docs/security.md names exists, and every row of its threat model names one."""

import ast
import re
from typing import Final

import pytest

from tests.chaos.trainer.bucket_attacks import BEGIN, table
from tests.contract.docs.blocks import ROOT
from tests.hostile import CORPUS

PAGE: Final = (ROOT / "docs/security.md").read_text(encoding="utf-8")
NAMED: Final = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
LINKED: Final = sorted(set(re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", PAGE)))
TRIED: Final = re.findall(r"^\| [^|]+ \| (\d+) \| .+ \| `(tests/[\w/]+\.py)::(\w+)` \|$", PAGE, re.MULTILINE)
"""The table of attacks."""
ROWS: Final = re.findall(
    r"^\| (?!threat|---)(.+?) \|(?:.+)\| (.+?) \|$", PAGE.partition("\n## ")[2].partition("\n## ")[0], re.MULTILINE
)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_named_test_exists(path: str, name: str) -> None:
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8").replace("\nasync def ", "\ndef ")


@pytest.mark.parametrize(("name", "path"), LINKED)
def test_linked_test_exists(name: str, path: str) -> None:
    file = ROOT / path
    assert name == file.stem or f"def {name}(" in file.read_text(encoding="utf-8")


def test_every_threat_has_a_test_or_a_page_that_names_it() -> None:
    assert len(ROWS) > 15
    assert [
        threat for threat, shown in ROWS if not re.search(r"tests/|\.md\)|permissions below|hostile manifests", shown)
    ] == []


def count_cases(path: str, name: str) -> int:
    """Return how many cases a test has: the longest list or table of its decorators."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    tables = {
        ast.unparse(target): node.value for node in body if isinstance(node, ast.Assign) for target in node.targets
    }
    tables |= {ast.unparse(node.target): node.value for node in body if isinstance(node, ast.AnnAssign) and node.value}
    functions = (node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    (test,) = (node for node in functions if node.name == name)
    decorators = (node for node in test.decorator_list if isinstance(node, ast.Call) and len(node.args) == 2)
    return max(_length(node.args[1], tables) for node in decorators)


def _length(cases: ast.expr, tables: dict[str, ast.expr]) -> int:
    if isinstance(cases, ast.Name):
        return _length(tables[cases.id], tables)
    if isinstance(cases, ast.Call) and isinstance(cases.func, ast.Attribute):
        return _length(cases.func.value, tables)  # TABLE.values()
    assert isinstance(cases, ast.Dict | ast.List | ast.Tuple), ast.unparse(cases)
    return len(cases.keys if isinstance(cases, ast.Dict) else cases.elts)


@pytest.mark.parametrize(("number", "path", "name"), TRIED)
def test_number_of_attacks_is_that_of_the_test(number: str, path: str, name: str) -> None:
    counted = len(CORPUS) if "hostile_manifest" in name else count_cases(path, name)
    assert int(number) == counted


def test_page_lists_some_hundred_attacks() -> None:
    assert sum(int(number) for number, _, _ in TRIED) > 300


def test_attacks_of_a_bucket_writer_are_those_of_the_test() -> None:
    assert f"{BEGIN}\n\n{table()}\n" in PAGE
