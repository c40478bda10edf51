"""The plan: numbers that can be checked by hand."""

import pytest

from qlora_operator.plan import make_plan
from tests.make import make_prepared, make_spec


def plan_of(rows: int = 950, gpus: int = 0, **training: object) -> tuple[int, int, int]:
    prepared = make_prepared()
    dataset = prepared.dataset.model_copy(update={"training_rows": rows})
    plan = make_plan(
        make_spec(training=training, resources={"gpusPerNode": gpus}), prepared.model_copy(update={"dataset": dataset})
    )
    assert len(plan.reasons) == 4
    assert plan.micro_batch_size * plan.gradient_accumulation == make_spec(training=training).training.global_batch_size
    return plan.micro_batch_size, plan.gradient_accumulation, plan.total_steps


@pytest.mark.parametrize(
    ("gpus", "training", "micro", "accumulation"),
    [
        pytest.param(1, {}, 4, 4, id="the-seed's-recipe"),
        pytest.param(0, {}, 16, 1, id="cpu-shares-the-dequantisation"),
        pytest.param(1, {"globalBatchSize": 6}, 3, 2, id="largest-divisor"),
        pytest.param(1, {"globalBatchSize": 7}, 1, 7, id="prime"),
        pytest.param(1, {"globalBatchSize": 2}, 2, 1, id="small-batch"),
        pytest.param(1, {"microBatchSize": 16}, 16, 1, id="given"),
        pytest.param(0, {"microBatchSize": 1}, 1, 16, id="given-on-cpu"),
    ],
)
def test_micro_batch(gpus: int, training: dict[str, int], micro: int, accumulation: int) -> None:
    assert plan_of(gpus=gpus, **training)[:2] == (micro, accumulation)


@pytest.mark.parametrize(
    ("rows", "training", "steps"),
    [
        pytest.param(950, {}, 180, id="3-epochs-of-60-steps"),
        pytest.param(960, {}, 180, id="exact"),
        pytest.param(961, {}, 183, id="one-row-more"),
        pytest.param(950, {"epochs": 0.5}, 30, id="half-an-epoch"),
        pytest.param(950, {"epochs": 0.51}, 31, id="rounded-up"),
        pytest.param(160, {"epochs": 1.1}, 11, id="floating-point"),
        pytest.param(5, {"epochs": 0.01}, 1, id="at-least-one"),
        pytest.param(950, {"maxSteps": 100}, 100, id="capped"),
        pytest.param(950, {"maxSteps": 1000}, 180, id="cap-not-reached"),
    ],
)
def test_steps(rows: int, training: dict[str, float], steps: int) -> None:
    assert plan_of(rows=rows, **training)[2] == steps


def test_the_cpu_says_why() -> None:
    reasons = make_plan(make_spec(), make_prepared()).reasons
    assert reasons[1] == (
        "micro-batch 16: the largest divisor of globalBatchSize 16 up to 16; "
        "a CPU pays for dequantisation per forward pass, whatever its rows"
    )


@pytest.mark.parametrize(
    ("resources", "distribution", "whole", "expected"),
    [
        pytest.param({}, "auto", 16, ("single", 16, 1), id="alone"),
        pytest.param({"nodes": 2}, "auto", 16, ("ddp", 8, 1), id="two-nodes"),
        pytest.param({"nodes": 2}, "zero3", 16, ("zero3", 8, 1), id="as-asked"),
        pytest.param({"nodes": 2, "gpusPerNode": 4}, "zero2", 64, ("zero2", 4, 2), id="eight-gpus"),
        pytest.param({"nodes": 3}, "ddp", 16, ("ddp", 6, 1), id="uneven-shares"),
    ],
)
def test_processes_share_a_global_batch(
    resources: dict[str, int], distribution: str, whole: int, expected: tuple[str, int, int]
) -> None:
    spec = make_spec(training={"globalBatchSize": whole})
    spec = spec.model_copy(
        update={
            "resources": spec.resources.model_copy(
                update={"nodes": resources.get("nodes", 1), "gpus_per_node": resources.get("gpusPerNode", 0)}
            ),
            "distribution": distribution,
        }
    )
    plan = make_plan(spec, make_prepared())
    assert (plan.strategy, plan.micro_batch_size, plan.gradient_accumulation) == expected
    assert plan.micro_batch_size * plan.gradient_accumulation * plan.processes >= whole
