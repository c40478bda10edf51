"""`make mutants`: take every fix out in turn, and show that its test fails. Numbers after it choose traps."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

import torch

from tests.mutants.catalogue import MUTATIONS, NOT_HERE
from tests.mutants.mutation import ROOT, Mutation, applied
from tests.mutants.traps import TRAPS
from tests.mutants.trial import Outcome, preload, try_tests


class Verdict(StrEnum):
    """What a mutation showed."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    BROKEN = "BROKEN"
    """The test ended by something else than what it asserts."""
    NOT_ON_THIS_CPU = "not on this CPU"


def main(numbers: Sequence[int]) -> int:
    """Try the mutations of some traps, or all of them, and return the exit code."""
    chosen = [mutation for mutation in MUTATIONS if not numbers or mutation.trap in numbers]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(Path(folder) / "tree")
        preload()
        if not passes_unchanged(chosen, tree):
            return 1
        verdicts = Counter(try_all(chosen, tree))
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    if not numbers:
        print(f"{len(NOT_HERE)} of {len(TRAPS)} traps cannot happen here yet: {', '.join(map(str, sorted(NOT_HERE)))}")
    return 1 if verdicts[Verdict.SURVIVED] + verdicts[Verdict.BROKEN] else 0


def copy_tree(target: Path) -> Path:
    """Copy the files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def passes_unchanged(mutations: Sequence[Mutation], tree: Path) -> bool:
    """Run all tests without a mutation: a test that fails anyway proves nothing."""
    tests = sorted({mutation.test for mutation in mutations})
    started = time.monotonic()
    outcome = try_tests(tests, tree)
    fine = outcome.passed > 0 and not outcome.failures and not outcome.errors
    print(f"unchanged: {outcome.passed} tests pass, {time.monotonic() - started:.0f} s" if fine else outcome.output)
    return fine


def try_all(mutations: Sequence[Mutation], tree: Path) -> Iterator[Verdict]:
    """Try mutations one at a time, and print a line for each."""
    for number, mutation in enumerate(mutations, start=1):
        started = time.monotonic()
        with applied(mutation, tree):
            outcome = try_tests([mutation.test], tree)
        verdict = judge(mutation, outcome)
        print(
            f"{number:3}/{len(mutations)}  {verdict:<9} trap {mutation.trap:<2} {TRAPS[mutation.trap]}\n"
            f"         {mutation.file}  {mutation.test_name}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if verdict in {Verdict.SURVIVED, Verdict.BROKEN}:
            print(outcome.output)
        yield verdict


def judge(mutation: Mutation, outcome: Outcome) -> Verdict:
    """Return what the outcome of the mutated test shows."""
    if outcome.fails_as(mutation.fails_with):
        return Verdict.CAUGHT
    if mutation.cpu and not torch.cpu.get_capabilities().get(mutation.cpu):
        return Verdict.NOT_ON_THIS_CPU
    return Verdict.BROKEN if outcome.failures or outcome.errors else Verdict.SURVIVED


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
