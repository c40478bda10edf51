"""Memory of real steps matches the plan, for four of the many combinations of `make bench-memory`."""

import pytest

from benchmarks.memory.combinations import EVERYTHING, PACKED, Combination
from benchmarks.memory.comparison import Comparison
from benchmarks.memory.measure import measure
from benchmarks.memory.predict import predict

SMALL = {"hidden": 64, "intermediate": 128, "layers": 4, "heads": 4, "kv_heads": 2, "tokens": 64}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(Combination(**SMALL | PACKED | {"dropout": 0.05}), id="packed"),
        pytest.param(Combination(**SMALL, targets=EVERYTHING, checkpointing=True), id="checkpointed"),
        pytest.param(Combination(**SMALL, family="gemma2", head_dim=16, vocabulary=4096), id="capped logits"),
        pytest.param(Combination(**SMALL, method="full", bits=16), id="full"),
    ],
)
def test_measured_step_memory_matches_prediction(combination):
    comparison = Comparison(combination, measure(combination), predict(combination))
    # The batch and other small tensors, which are no activations, have more weight in tiny models.
    assert comparison.step_error == pytest.approx(0, abs=0.03)
    assert comparison.kept_error == pytest.approx(0, abs=0.05)
