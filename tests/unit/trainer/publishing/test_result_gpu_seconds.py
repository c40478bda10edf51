"""The summary of a result says what its training took, for whoever finds it again."""

import pytest

from qlora_api.runconfig import RunConfig
from qlora_trainer.publishing.report_builder import build_result
from tests.unit.trainer.publishing.test_model_card import make_report


@pytest.mark.parametrize(("nodes", "gpus", "expected"), [(1, 0, None), (1, 1, 900), (2, 4, 7200)])
def test_result_has_the_gpu_seconds_of_its_steps(nodes: int, gpus: int, expected: int | None) -> None:
    report = make_report()
    plan = report.plan.model_copy(update={"nodes": nodes, "gpus_per_node": gpus})
    config = RunConfig.model_construct(prepared=report.prepared, plan=plan, spec=report.spec)
    result = build_result(config, report.model_copy(update={"plan": plan, "training_seconds": 900.04}))
    assert result.gpu_seconds == expected
