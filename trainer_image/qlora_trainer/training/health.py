"""Ends a training that cannot succeed: losses that diverge or are not finite, steps and weights that train nothing."""

import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Final

import torch

from qlora_api.reasons import Reason
from qlora_api.report import StepRecord
from qlora_trainer.errors import RunError
from qlora_trainer.training.state import DIVERGED_RISE, DIVERGED_STEPS, History

MAX_SKIPPED_STEPS: Final = 20
"""Steps in a row that fp16 loss scaling may skip: from torch's first scale, 65,536, it halves the scale to 1 in 16."""


def check_gradients(gradients: Mapping[str, torch.Tensor | None]) -> None:
    """Check that every adapter weight gets a gradient; one that gets none would silently stay untrained.

    Raises:
        RunError: TRAINER_ERROR that names the first weight without a gradient.

    """
    # B is initialized to zero, so in the first step A's gradient is zero and only B's can be checked.
    idle = [
        name for name, gradient in gradients.items() if gradient is None or ("lora_B" in name and not gradient.any())
    ]
    if idle:
        what = f"no gradient reaches {len(idle)} weights of the adapter, such as {idle[0]}"
        raise RunError(Reason.TRAINER_ERROR, what, step=1)


def check_finite(record: StepRecord, *, scaling: bool) -> None:
    """Check that loss and gradient norm are finite.

    Args:
        record: The step.
        scaling: Whether fp16 loss scaling is on: while it searches for its scale, infinite gradients are normal.

    Raises:
        RunError: NON_FINITE_LOSS.

    """
    if math.isfinite(record.loss) and (scaling or math.isfinite(record.grad_norm)):
        return
    what = f"loss {record.loss}" if not math.isfinite(record.loss) else f"gradient norm {record.grad_norm}"
    raise RunError(
        Reason.NON_FINITE_LOSS,
        f"step {record.step} has {what} at learning rate {record.learning_rate:.2e}; lower "
        "spec.training.learningRate, or check the dataset",
        record.step,
    )


def check_skipped(history: History) -> None:
    """Check that fp16 loss scaling has found a scale; gradients that are NaN at every scale train nothing.

    Raises:
        RunError: NON_FINITE_LOSS.

    """
    recent = history.steps[-MAX_SKIPPED_STEPS:]
    skipped = sum(1 for _ in takewhile(_was_skipped, reversed(recent)))
    if skipped == MAX_SKIPPED_STEPS:
        raise _untrainable(f"the gradients of the last {skipped} steps were not finite", history)


def check_trained(history: History) -> None:
    """Check that a step changed the weights; without one, the adapter would be published as it started.

    Raises:
        RunError: NON_FINITE_LOSS.

    """
    if all(_was_skipped(record) or record.grad_norm == 0 for record in history.steps):
        raise _untrainable(f"none of {len(history.steps)} steps had finite gradients other than zero", history)


def describe_skipped(history: History) -> Iterator[str]:
    """Yield a log line if fp16 loss scaling skipped steps."""
    if skipped := sum(map(_was_skipped, history.steps)):
        yield f"{skipped} of {len(history.steps)} steps were skipped while fp16 loss scaling searched for its scale"


def _was_skipped(record: StepRecord) -> bool:
    """Return whether the optimizer left out a step; only fp16 loss scaling gets here with such a gradient norm."""
    return not math.isfinite(record.grad_norm)


def _untrainable(what: str, history: History) -> RunError:
    step = history.steps[-1].step if history.steps else None
    return RunError(
        Reason.NON_FINITE_LOSS,
        f"{what}, so nothing is trained; in fp16, which a GPU older than sm_80 computes in, some models overflow: "
        "choose a GPU with bf16 by spec.resources.gpuProduct, or another model",
        step,
    )


def check_divergence(history: History) -> None:
    """Check that the loss has not diverged for good; more steps would only waste GPU time.

    Raises:
        RunError: LOSS_DIVERGED.

    """
    level = history.level_before_divergence()
    if level is not None:
        last = history.steps[-1]
        raise RunError(
            Reason.LOSS_DIVERGED,
            f"the loss was {level:.3f} and has been more than {DIVERGED_RISE} above that for {DIVERGED_STEPS} steps; "
            f"it is {last.loss:.3f} at step {last.step}; lower spec.training.learningRate, or raise warmupRatio",
            last.step,
        )
