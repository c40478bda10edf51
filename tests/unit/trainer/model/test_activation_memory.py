"""Real steps take what the plan says: four of the combinations of `make bench-memory`, which has many more."""

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
        pytest.param(Combination(**SMALL | PACKED | {"dropout": 0.05}), id="joined"),
        pytest.param(Combination(**SMALL, targets=EVERYTHING, checkpointing=True), id="recomputed"),
        pytest.param(Combination(**SMALL, family="gemma2", head_dim=16, vocabulary=4096), id="capped logits"),
        pytest.param(Combination(**SMALL, method="full", bits=16), id="full"),
    ],
)
def test_a_step_takes_what_is_predicted(combination):
    made = Comparison(combination, measure(combination), predict(combination))
    # The batch itself and other small things, which are no activations, weigh more in tiny models.
    assert made.step_error == pytest.approx(0, abs=0.03)
    assert made.kept_error == pytest.approx(0, abs=0.05)
