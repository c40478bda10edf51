"""Every command that a console block shows is run by a test, or the reason why none can run it is written here."""

import shlex
from pathlib import PurePosixPath
from typing import Final

import pytest

from tests.contract.docs.blocks import ROOT
from tests.contract.docs.commands import Command, commands

RUN_BY: Final = {
    "helm install": "tests/integration/chart/rendering.py",
    "helm test": "tests/e2e/test_chart.py",
    "helm upgrade": "tests/e2e/installation.py",
    "kubectl annotate": "tests/integration/test_finished_runs.py",
    "kubectl apply": "tests/e2e/test_quickstart.py",
    "kubectl auth": "tests/integration/test_rbac.py",
    "kubectl create": "tests/integration/test_crd.py",
    "kubectl diff": "tests/integration/test_gitops.py",
    "kubectl explain": "tests/e2e/test_quickstart.py",
    "kubectl get": "tests/e2e/test_quickstart.py",
    "kubectl kustomize": "tests/integration/test_gitops.py",
    "kubectl logs": "tests/e2e/test_gang.py",
    "kubectl patch": "tests/integration/test_gitops.py",
    "kubectl qlora": "tests/integration/test_cli.py",
    "kubectl wait": "tests/e2e/installation.py",
    "qlora chat": "tests/unit/cli/commands/test_chat.py",
    "qlora events": "tests/integration/test_cli.py",
    "qlora init": "tests/contract/docs/test_cli_page.py",
    "qlora list": "tests/integration/test_cli.py",
    "qlora logs": "tests/integration/test_cli.py",
    "qlora merge": "tests/unit/cli/commands/test_merge.py",
    "qlora plan": "tests/contract/docs/test_plan_page.py",
    "qlora render": "tests/contract/docs/test_cli_page.py",
    "qlora report": "tests/integration/test_cli.py",
    "qlora rerun": "tests/integration/test_cli.py",
    "qlora run": "tests/unit/cli/commands/test_run.py",
    "qlora serve-snippet": "tests/contract/docs/test_cli_page.py",
    "qlora status": "tests/integration/test_cli.py",
    "qlora submit": "tests/integration/test_cli.py",
    "qlora usage": "tests/contract/docs/test_usage_page.py",
    "qlora validate": "tests/contract/docs/test_cli_page.py",
    "qlora wait": "tests/integration/test_cli.py",
}
"""The test that runs the command, with its own arguments: it passes the verb to a program."""
NOT_RUN: Final = {
    "aws s3": "boto3 does the same in tests/e2e/installation.py",
    "docker build": "buildah builds the same Dockerfile in tests/e2e/installation.py",
    "kind": "needs Docker",
    "kubectl port-forward": "the S3 server of the tests listens where they are",
    "make": "starts what developers start: the tests themselves among it; `make demo` is timed in docs/quickstart.md",
    "pip install": "the package is on no index yet",
    "python -m examples.quickstart.make_model": "tests/e2e/installation.py calls it",
    "python -m tests.cluster": "every test with a cluster calls it",
    "qlora --install-completion": "would change the shell of who runs the tests",
    "echo": "a shell's",
    "export": "a shell's",
    "jq": "somebody else's",
    "kyverno": "somebody else's",
}
SHOWN: Final = [command for command in commands() if command.complete]


def entry_of(command: Command, table: dict[str, str]) -> str | None:
    """The entry that a command begins with."""
    words = (PurePosixPath(command.words[0]).name, *command.words[1:])
    return next((entry for entry in table if words[: len(shlex.split(entry))] == tuple(shlex.split(entry))), None)


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_the_command_is_accounted_for(command: Command) -> None:
    assert (entry_of(command, RUN_BY) is None) != (entry_of(command, NOT_RUN) is None)


@pytest.mark.parametrize(("entry", "file"), RUN_BY.items(), ids=RUN_BY)
def test_the_test_runs_it(entry: str, file: str) -> None:
    verb = entry.split()[1]
    assert f'"{verb}"' in (ROOT / file).read_text(encoding="utf-8")


def test_every_entry_has_a_command() -> None:
    used = {entry_of(command, table) for command in SHOWN for table in (RUN_BY, NOT_RUN)}
    assert {*RUN_BY, *NOT_RUN} - used == set()
