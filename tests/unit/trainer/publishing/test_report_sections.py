"""Predicted and measured memory, and what each of them covers."""

import pytest

from qlora_api.v1alpha1 import Plan
from qlora_trainer.publishing.report_sections import Amount, make_footprint

GIBIBYTE = 1 << 30


def plan(**changes: object) -> Plan:
    given = {"device": "cuda", "nodes": 1, "gpus_per_node": 1, "micro_batch_size": 1, "gradient_accumulation": 8}
    return Plan.model_validate(given | {"total_steps": 4} | changes)


@pytest.mark.parametrize(
    ("predicted", "measured", "amounts", "difference"),
    [
        pytest.param(
            8 * GIBIBYTE,
            6 * GIBIBYTE,
            (Amount("predicted", "8.00 GiB", 1.0), Amount("measured", "6.00 GiB", 0.75)),
            "Usage was 25.0% lower than predicted.",
            id="less",
        ),
        pytest.param(
            8 * GIBIBYTE,
            10 * GIBIBYTE,
            (Amount("predicted", "8.00 GiB", 0.8), Amount("measured", "10.00 GiB", 1.0)),
            "Usage was 25.0% higher than predicted.",
            id="more",
        ),
        pytest.param(
            8 * GIBIBYTE,
            8 * GIBIBYTE,
            (Amount("predicted", "8.00 GiB", 1.0), Amount("measured", "8.00 GiB", 1.0)),
            "Usage was as predicted.",
            id="equal",
        ),
        pytest.param(
            None, 3 * GIBIBYTE, (Amount("measured", "3.00 GiB", 1.0),), "The plan has no prediction", id="not-predicted"
        ),
    ],
)
def test_footprint_shows_measured_and_predicted_memory(predicted, measured, amounts, difference):
    found = make_footprint(plan(peak_bytes=predicted), "16Gi", measured)
    assert found.amounts == amounts
    assert found.note.startswith(difference)
    assert found.note.endswith("the reasons of the plan list its parts.")


def test_footprint_on_cpu_shows_the_pod_memory_limit():
    found = make_footprint(plan(device="cpu", gpus_per_node=0), "6Gi", 3 * GIBIBYTE)
    assert found.note.endswith(
        "peak resident set size of the process, libraries included. The pod's memory limit is 6Gi."
    )
