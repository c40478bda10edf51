"""The list of mutations is complete and matches the code; `make mutants` runs them."""

import ast
from functools import cache

import pytest

from tests.mutants.catalogue import MUTATIONS, NOT_HERE
from tests.mutants.mutation import ROOT, Mutation, applied, occurrences
from tests.mutants.traps import TRAPS


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of a file's test functions."""
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def name_of(mutation: Mutation) -> str:
    return f"trap-{mutation.trap:02}-{mutation.test_name}"


def test_every_trap_is_tested_or_cannot_happen():
    tested = {mutation.trap for mutation in MUTATIONS}
    assert not tested & NOT_HERE.keys()
    assert tested | NOT_HERE.keys() == TRAPS.keys()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name_of)
def test_mutation_matches_the_code(mutation: Mutation):
    assert occurrences(mutation) == 1, f"the fix's text must be in {mutation.file} once: {mutation.old!r}"
    assert mutation.old != mutation.new
    assert mutation.test_name in names_in(mutation.test_file)


def test_mutation_is_reverted(tmp_path):
    mutation = Mutation(trap=1, file="code.py", old="a", new="b", test="tests/x.py::test_x")
    (tmp_path / "code.py").write_text("a = 1\n")
    with applied(mutation, tmp_path):
        assert (tmp_path / "code.py").read_text() == "b = 1\n"
    assert (tmp_path / "code.py").read_text() == "a = 1\n"


def test_the_working_tree_is_never_mutated():
    with pytest.raises(ValueError, match="a copy only"), applied(MUTATIONS[0], ROOT):
        pass
