"""The workflows pass a linter and a security auditor, pin what they use, ask for few rights, and run what exists."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.cluster.programs.binaries import binary
from tests.contract.docs.blocks import ROOT
from tests.contract.docs.programs import check_make, check_paths

WORKFLOWS: Final = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED: Final = re.compile(r"^ *(?:- )?uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
BROKEN: Final = """\
on: push
jobs:
  title:
    runs-on: ubuntu-24.04
    steps:
      - run: echo ${{ github.event.pull_request.title }}
"""
UNSAFE: Final = """\
on: push
jobs:
  build:
    runs-on: ubuntu-24.04
    steps:
      - uses: actions/checkout@v7
"""


@pytest.fixture(scope="module")
def actionlint() -> Path:
    """The linter, built the first time; a fixture is not timed."""
    return binary("actionlint")


def lint(program: Path, *files: Path) -> str:
    """Return what the linter finds; which other linters this machine has makes no difference."""
    command = [program, "-no-color", "-shellcheck=", "-pyflakes=", *files]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def audit(*files: Path) -> subprocess.CompletedProcess[str]:
    """Return what zizmor finds, with its strictest rules that need no network."""
    program = Path(sys.executable).with_name("zizmor")
    options = ["--offline", "--no-progress", "--persona=pedantic", f"--config={ROOT / '.github/zizmor.yml'}"]
    return subprocess.run([program, *options, *files], capture_output=True, text=True, check=False)


def parsed(path: Path) -> dict[str, Any]:
    return dict(yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader))


def jobs() -> Iterator[Any]:
    for path in WORKFLOWS:
        for name, job in parsed(path)["jobs"].items():
            yield pytest.param(job, id=f"{path.stem}-{name}")


def scripts() -> Iterator[str]:
    for path in WORKFLOWS:
        for job in parsed(path)["jobs"].values():
            yield from (step["run"] for step in job["steps"] if "run" in step)


def test_linter_has_no_findings(actionlint: Path) -> None:
    assert lint(actionlint, *WORKFLOWS) == ""


def test_linter_finds_a_title_that_becomes_shell_code(actionlint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(BROKEN, encoding="utf-8")
    assert "potentially untrusted" in lint(actionlint, broken)


def test_auditor_has_no_findings() -> None:
    audited = audit(*WORKFLOWS)
    assert audited.returncode == 0, audited.stdout


def test_auditor_finds_what_the_linter_does_not(actionlint: Path, tmp_path: Path) -> None:
    unsafe = tmp_path / "unsafe.yml"
    unsafe.write_text(UNSAFE, encoding="utf-8")
    assert lint(actionlint, unsafe) == ""
    found = audit(unsafe).stdout
    assert [rule for rule in ("artipacked", "excessive-permissions", "unpinned-uses") if rule not in found] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_by_commit_with_its_release(path: Path) -> None:
    uses = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert [line for line in uses if not PINNED.match(line)] == []


def test_one_commit_per_action() -> None:
    pins = {line.partition("uses: ")[2] for path in WORKFLOWS for line in path.read_text("utf-8").splitlines()}
    names = [pin.partition("@")[0] for pin in pins if pin]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_may_only_read_unless_a_job_says_more(path: Path) -> None:
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow["on"]


@pytest.mark.parametrize("job", list(jobs()))
def test_job_has_a_time_limit_and_leaves_no_credentials_in_the_checkout(job: dict[str, Any]) -> None:
    assert int(job["timeout-minutes"]) > 0
    checkouts = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] == "false" for step in checkouts)


def test_only_the_tag_workflow_writes() -> None:
    writers = {
        path.stem
        for path in WORKFLOWS
        for block in (parsed(path), *parsed(path)["jobs"].values())
        if set(block.get("permissions", {}).values()) - {"read"}
    }
    assert writers == {"release"}


def test_no_secret_is_stored() -> None:
    named = {name for path in WORKFLOWS for name in re.findall(r"secrets\.(\w+)", path.read_text("utf-8"))}
    assert named == {"GITHUB_TOKEN"}


def test_scripts_name_targets_and_files_that_exist() -> None:
    made = [word for script in scripts() for word in re.findall(r"^make (.+)$", script, re.MULTILINE)]
    assert {"check", "docs", "unit", "integration", "test"} <= set(made)
    for words in made:
        check_make(words.split())
    paths = [word for script in scripts() for word in re.findall(r"(?<!/)[.\w-]+/[\w./-]*\w", script)]
    check_paths(paths)
    assert [path for path in paths if path.startswith(".github/") and not (ROOT / path).exists()] == []


def test_full_tests_run_what_a_submission_must_pass() -> None:
    required = re.findall(r"^make .+$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    steps = parsed(ROOT / ".github/workflows/test.yml")["jobs"]["full"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == required
