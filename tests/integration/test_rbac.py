"""What both service accounts may do on a real API server, and that docs/security.md shows exactly that.

`QLORA_WRITE_DOCS=1 pytest tests/integration/test_rbac.py` writes the page anew.
"""

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import ACCOUNT, OPERATOR_NAMESPACE, install

PAGE: Final = Path(__file__).parents[2] / "docs/security.md"
BEGIN: Final = "<!-- Written by tests/integration/test_rbac.py; do not edit. -->"
END: Final = "<!-- The end of what tests/integration/test_rbac.py writes. -->"
RUNS: Final = "ml"
ACCOUNTS: Final = {
    "operator": (f"system:serviceaccount:{OPERATOR_NAMESPACE}:{ACCOUNT}", OPERATOR_NAMESPACE),
    "trainer": (f"system:serviceaccount:{RUNS}:default", RUNS),
}
"""Who they are, and the namespace that is asked about."""


class Right(NamedTuple):
    """One line of `kubectl auth can-i --list`."""

    resource: str
    urls: str
    names: str
    verbs: str


@pytest.fixture(scope="module")
def lists(control_plane: Cluster) -> dict[str, str]:
    install(control_plane)
    control_plane.create_namespace(RUNS)
    return {name: rights_of(control_plane, *account) for name, account in ACCOUNTS.items()}


def rights_of(cluster: Cluster, account: str, namespace: str) -> str:
    command = ("auth", "can-i", "--list", f"--as={account}", f"--namespace={namespace}")
    # The API server's authoriser learns of a new binding a moment later.
    wait_until("the rights", lambda: ACCOUNT not in account or "tokenreviews" in cluster.kubectl(*command))
    header, *lines = [line.rstrip() for line in cluster.kubectl(*command).splitlines()]
    return "\n".join([header, *sorted(lines)])


def parse(table: str) -> list[Right]:
    header, *lines = table.splitlines()
    starts = [header.index(name) for name in ("Resources", "Non-Resource URLs", "Resource Names", "Verbs")]
    ends = [*starts[1:], None]
    return [
        Right(*(line[start:end].strip() for start, end in zip(starts, ends, strict=True))) for line in lines
    ]  # fmt: skip


@pytest.mark.parametrize("account", ACCOUNTS)
def test_rbac_has_no_secrets_exec_roles_or_wildcards(lists: dict[str, str], account: str) -> None:
    rights = parse(lists[account])
    forbidden = re.compile(r"secret|/(exec|attach|portforward|ephemeralcontainers)$|role|serviceaccount|webhook|\*")
    assert [right for right in rights if forbidden.search(right.resource)] == []
    assert [right for right in rights if re.search(r"\*|escalate|bind|impersonate", right.verbs)] == []


def test_trainer_account_may_only_review_itself(lists: dict[str, str]) -> None:
    resources = {right.resource for right in parse(lists["trainer"]) if right.resource}
    assert {resource.partition(".")[0] for resource in resources} == {
        "selfsubjectaccessreviews", "selfsubjectreviews", "selfsubjectrulesreviews",
    }  # fmt: skip


def test_security_page_lists_permissions(lists: dict[str, str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n\n{render(lists)}\n\n{END}{after}"
    if os.environ.get("QLORA_WRITE_DOCS"):
        PAGE.write_text(written, encoding="utf-8")
    assert page == written or os.environ.get("QLORA_WRITE_DOCS")


def render(lists: dict[str, str]) -> str:
    return "\n\n".join(
        f"```console\n$ kubectl auth can-i --list --as={account} --namespace={namespace}\n{lists[name]}\n```"
        for name, (account, namespace) in ACCOUNTS.items()
    )
