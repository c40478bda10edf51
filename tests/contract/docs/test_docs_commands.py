"""Every command of a page exists: subcommand, options, and the files, fields, values and conditions that it names."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

import pytest

from tests.contract.docs.commands import Command, commands, split
from tests.contract.docs.programs import (
    check_aws,
    check_docker,
    check_helm,
    check_kind,
    check_kubectl,
    check_make,
    check_paths,
    check_pip,
    check_python,
    check_qlora,
)

PROGRAMS: Final[Mapping[str, Callable[[Sequence[str]], None]]] = {
    "aws": check_aws,
    "docker": check_docker,
    "helm": check_helm,
    "kind": check_kind,
    "kubectl": check_kubectl,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}
ELSEWHERE: Final = frozenset({"echo", "export", "grep", "jq", "kyverno", "sha256sum"})
"""Programs that process our output, and shell builtins; their arguments are not checked."""


def check(command: Command) -> None:
    """Raise if the command would be refused, or if no test knows its program."""
    program, words = PurePosixPath(command.words[0]).name, command.words[1:]
    if (program, *words[:1]) == ("kubectl", "qlora"):
        program, words = "qlora", words[1:]
    check_paths(words)
    if program == "qlora":
        check_qlora(words, command.complete)
    elif program not in ELSEWHERE:
        PROGRAMS[program](words)


@pytest.mark.parametrize("command", commands(), ids=str)
def test_the_command_exists(command: Command) -> None:
    check(command)


def test_most_programs_are_started_somewhere() -> None:
    started = {PurePosixPath(command.words[0]).name for command in commands()}
    assert PROGRAMS.keys() - started == set()


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("qlora plan", "files"),
        ("qlora plan job.yaml --gpu 16Gi", "--gpu"),
        ("qlora paln job.yaml", "paln"),
        ("qlora run job.yaml --set lora.rnk=8", "lora.rnk"),
        ("qlora --install", "--install"),
        ("qlora validate examples/none.yaml", "examples/none.yaml"),
        ("make tset", "tset"),
        ("make lock UPGRAD=1", "UPGRAD"),
        ("helm install a charts/qlora-operator --set image.repo=a", "repo"),
        ("helm install a charts/qlora-operators", "charts/qlora-operators"),
        ("helm upgrade --instal a charts/qlora-operator", "--instal"),
        ("helm template a --show-only templates/none.yaml", "templates/none.yaml"),
        ("kubectl explain qlorajob.spec.lra", "lra"),
        ("kubectl get qljs", "qljs"),
        ("kubectl get qlj --wathc", "--wathc"),
        ("kubectl get qlj a -o jsonpath='{.status.mesage}'", "mesage"),
        ("kubectl wait --for=condition=Succeded qlj/a", "Succeded"),
        ("kubectl wait --for=jsonpath='{.status.fase}'=Succeeded qlj/a", "fase"),
        ("docker build --target oprator .", "oprator"),
        ("python -m tests.none", "tests.none"),
        ("pip install '.[cly]'", "cly"),
        ("pip install 'qlora-operator[cli]'", "qlora-operator"),
        ("sudo rm", "sudo"),
    ],
)
def test_a_mistake_is_found(line: str, mistake: str) -> None:
    [words] = split(line)
    with pytest.raises(Exception, match=re.escape(mistake)):
        check(Command("page", words))
