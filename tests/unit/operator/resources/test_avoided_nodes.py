"""Other avoided nodes in the node affinity of a Job that exists."""

import pytest

from qlora_operator.models import Manifest
from qlora_operator.resources.placement import replace_avoided_nodes


def not_in(*nodes: str) -> list[Manifest]:
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]


LABELS: list[Manifest] = [{"key": "zone", "operator": "In", "values": ["a"]}]
ONLY: list[Manifest] = [{"key": "metadata.name", "operator": "In", "values": ["node-5"]}]


@pytest.mark.parametrize(
    ("terms", "nodes", "expected"),
    [
        pytest.param([], [], [], id="nothing to change"),
        pytest.param([], ["b"], [{"matchFields": not_in("b")}], id="first avoided node"),
        pytest.param([{"matchFields": not_in("a")}], [], [], id="last avoided node is released"),
        pytest.param([{"matchFields": not_in("a")}], ["b", "c"], [{"matchFields": not_in("b", "c")}], id="others"),
        pytest.param(
            [{"matchExpressions": LABELS, "matchFields": not_in("a")}, {"matchFields": ONLY}],
            ["b"],
            [{"matchExpressions": LABELS, "matchFields": not_in("b")}, {"matchFields": [*ONLY, *not_in("b")]}],
            id="what others require stays",
        ),
        pytest.param(
            [{"matchExpressions": LABELS, "matchFields": not_in("a")}], [], [{"matchExpressions": LABELS}], id="labels"
        ),
        pytest.param([{"matchFields": not_in("a")}, {"matchExpressions": LABELS}], [], [], id="any node will do"),
    ],
)
def test_avoided_nodes_are_replaced_in_every_alternative(
    terms: list[Manifest], nodes: list[str], expected: list[Manifest]
) -> None:
    assert replace_avoided_nodes(terms, nodes) == expected
