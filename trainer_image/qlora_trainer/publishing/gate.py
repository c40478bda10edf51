"""The gate of a spec: which results may be published; pure."""

import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from qlora_api.reasons import Reason
from qlora_api.result import Result
from qlora_api.v1alpha1 import EvaluationStatus, GateSpec
from qlora_trainer.errors import RunError

GATE_FIELD: Final = "spec.evaluation.gate"


def _increase(before: float, after: float) -> float:
    """Return the relative change; nothing is worse than a loss where there was none."""
    return after / before - 1 if before else math.inf if after else 0.0


class Rule(NamedTuple):
    """One rule: the figure that it looks at, and whether that may be at most the bound or must be at least it."""

    name: str
    subject: str
    bound: Callable[[GateSpec], float | None]
    metric: Callable[[EvaluationStatus], float | None]
    at_most: bool
    number_format: str


RULES: Final = (
    Rule(
        "maxLossIncrease",
        "the held-out loss changed from the base's to the adapter's by",
        lambda gate: gate.max_loss_increase,
        lambda found: _increase(found.base.loss, found.adapter.loss),
        at_most=True,
        number_format="+.2%",
    ),
    Rule(
        "maxLoss",
        "the held-out loss is",
        lambda gate: gate.max_loss,
        lambda found: found.adapter.loss,
        at_most=True,
        number_format=".4f",
    ),
    Rule(
        "minExactMatch",
        "the share of answers that match is",
        lambda gate: gate.min_exact_match,
        lambda found: found.adapter.exact_match,
        at_most=False,
        number_format=".4f",
    ),
    Rule(
        "minRougeL",
        "the answers' mean ROUGE-L is",
        lambda gate: gate.min_rouge_l,
        lambda found: found.adapter.rouge_l,
        at_most=False,
        number_format=".4f",
    ),
)


def find_violations(gate: GateSpec, evaluation: EvaluationStatus) -> tuple[str, ...]:
    """Return a sentence for each rule that a result breaks, with the figure and the bound."""
    return tuple(_violations(gate, evaluation))


def _violations(gate: GateSpec, evaluation: EvaluationStatus) -> Iterator[str]:
    for rule in RULES:
        bound, figure = rule.bound(gate), rule.metric(evaluation)
        if bound is None:
            continue
        if figure is None:
            yield (
                f"{GATE_FIELD}.{rule.name}: no held-out row was answered, so there is no figure to compare with "
                f"{bound:g}"
            )
        elif figure > bound if rule.at_most else figure < bound:
            limit = f"at {'most' if rule.at_most else 'least'} {bound:{rule.number_format}}"
            yield f"{GATE_FIELD}.{rule.name}: {rule.subject} {figure:{rule.number_format}}, and {limit} passes"


def has_required_metrics(gate: GateSpec, evaluation: EvaluationStatus) -> bool:
    """Return whether an evaluation has every figure that the gate asks for."""
    return all(rule.metric(evaluation) is not None for rule in RULES if rule.bound(gate) is not None)


def describe_rejected(result: Result) -> str:
    """Say where a refused result is, and how to publish it after all."""
    return (
        f"The adapter is kept as {result.adapter}; the same manifest with a gate that it passes publishes it as it is."
    )


def check_gate(gate: GateSpec, evaluation: EvaluationStatus, whereabouts: str) -> None:
    """Raise GateFailed with every broken rule, and say where the work is."""
    if complaints := find_violations(gate, evaluation):
        raise RunError(Reason.GATE_FAILED, f"{'; '.join(complaints)}. {whereabouts}")
