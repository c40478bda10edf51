"""What a mutation is, and how it is applied to a copy of the tree."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A removed fix: the code with the fix, the code without it, and the test that must fail."""

    trap: int
    """Number in the list of traps (docs/traps.md)."""
    file: str
    old: str
    """Occurs exactly once in the file."""
    new: str
    test: str
    """pytest's node id, or without a case's name to run all cases of a test; at least one must fail."""
    fails_with: str = ""
    """Name of the exception that ends the test, where it is no assertion of the test's own."""
    cpu: str = ""
    """What the processor must have for the fault to exist, as torch.cpu.get_capabilities() calls it."""

    @property
    def test_file(self) -> str:
        """Return the test's file."""
        return self.test.partition("::")[0]

    @property
    def test_name(self) -> str:
        """Return the test's function."""
        return self.test.partition("::")[2].partition("[")[0]


def occurrences(mutation: Mutation, root: Path = ROOT) -> int:
    """Return how often the fix's text is in its file; 0 too when there is no such file."""
    path = root / mutation.file
    return path.read_text().count(mutation.old) if path.is_file() else 0


@contextmanager
def applied(mutation: Mutation, tree: Path) -> Iterator[None]:
    """Have the mutation in a tree, which must not be the one that is worked in."""
    if tree.resolve() == ROOT.resolve():
        raise ValueError("a mutation is applied to a copy only")
    path = tree / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        path.write_text(original)
