"""What kstatus itself, the library in Flux and Helm, concludes from every status that there is."""

import itertools
import json
from typing import Any, Final

from qlora_api.names import ConditionType, Phase
from qlora_operator.status import to_wire, with_observed_generation
from tests.cluster.host.commands import run
from tests.cluster.programs.binaries import binary
from tests.make import make_manifest
from tests.unit.operator.status.test_derive import kstatus, status_in

EXPECTED: Final = {Phase.SUCCEEDED: "Current", Phase.FAILED: "Failed"}


def concluded(*objects: tuple[int, dict[str, Any]]) -> list[str]:
    """What it says of a QLoRAJob of a generation with a status."""
    manifest = make_manifest()
    items = [
        {**manifest, "metadata": {**manifest["metadata"], "generation": generation}, "status": status}
        for generation, status in objects
    ]
    return [result["status"] for result in json.loads(run([binary("kstatus")], stdin=json.dumps(items)))]


def test_kstatus_matches_every_phase() -> None:
    statuses = [(1, to_wire(status_in(phase))) for phase in Phase]
    assert concluded(*statuses) == [EXPECTED.get(phase, "InProgress") for phase in Phase]


def test_kstatus_is_in_progress_before_first_write_and_after_change() -> None:
    ended = status_in(Phase.SUCCEEDED)
    statuses = ((1, {"observedGeneration": -1}), (2, to_wire(ended)), (2, to_wire(with_observed_generation(ended, 2))))
    assert concluded(*statuses) == ["InProgress", "InProgress", "Current"]


def test_kstatus_matches_test_rules_for_every_condition_combination() -> None:
    types = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)
    statuses = [
        (1, {"observedGeneration": 1, "conditions": conditions(dict(zip(types, truths, strict=True)))})
        for truths in itertools.product(("True", "False", "Unknown", None), repeat=len(types))
    ]
    assert concluded(*statuses) == [kstatus(*status) for status in statuses]


def conditions(truths: dict[ConditionType, str | None]) -> list[dict[str, str]]:
    return [{"type": kind, "status": truth, "reason": "R"} for kind, truth in truths.items() if truth is not None]
