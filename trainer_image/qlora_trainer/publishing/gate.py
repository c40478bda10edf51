"""The gate: rules of the spec that a result must pass to be published; pure."""

import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from qlora_api.reasons import Reason
from qlora_api.result import Result
from qlora_api.v1alpha1 import EvaluationStatus, GateSpec
from qlora_trainer.errors import RunError

GATE_FIELD: Final = "spec.evaluation.gate"


def _increase(before: float, after: float) -> float:
    """Return the relative change; infinite if the value before is zero."""
    return after / before - 1 if before else math.inf if after else 0.0


class Rule(NamedTuple):
    """One rule: a metric of the result, and whether the bound is its maximum or its minimum."""

    name: str
    subject: str
    bound: Callable[[GateSpec], float | None]
    metric: Callable[[EvaluationStatus], float | None]
    at_most: bool
    number_format: str


RULES: Final = (
    Rule(
        "maxLossIncrease",
        "the held-out loss changed from base to adapter by",
        lambda gate: gate.max_loss_increase,
        lambda evaluation: _increase(evaluation.base.loss, evaluation.adapter.loss),
        at_most=True,
        number_format="+.2%",
    ),
    Rule(
        "maxLoss",
        "the held-out loss is",
        lambda gate: gate.max_loss,
        lambda evaluation: evaluation.adapter.loss,
        at_most=True,
        number_format=".4f",
    ),
    Rule(
        "minExactMatch",
        "the exact-match rate of the answers is",
        lambda gate: gate.min_exact_match,
        lambda evaluation: evaluation.adapter.exact_match,
        at_most=False,
        number_format=".4f",
    ),
    Rule(
        "minRougeL",
        "the answers' mean ROUGE-L is",
        lambda gate: gate.min_rouge_l,
        lambda evaluation: evaluation.adapter.rouge_l,
        at_most=False,
        number_format=".4f",
    ),
)


def find_violations(gate: GateSpec, evaluation: EvaluationStatus) -> tuple[str, ...]:
    """Return a sentence for each violated rule, with the value and the bound."""
    return tuple(_violations(gate, evaluation))


def _violations(gate: GateSpec, evaluation: EvaluationStatus) -> Iterator[str]:
    for rule in RULES:
        bound, value = rule.bound(gate), rule.metric(evaluation)
        if bound is None:
            continue
        if value is None:
            yield (
                f"{GATE_FIELD}.{rule.name}: no answers to held-out rows were generated, so there is no value to "
                f"compare with {bound:g}"
            )
        elif value > bound if rule.at_most else value < bound:
            limit = f"at {'most' if rule.at_most else 'least'} {bound:{rule.number_format}}"
            yield f"{GATE_FIELD}.{rule.name}: {rule.subject} {value:{rule.number_format}}, but must be {limit}"


def has_required_metrics(gate: GateSpec, evaluation: EvaluationStatus) -> bool:
    """Return whether an evaluation has every metric that the gate checks."""
    return all(rule.metric(evaluation) is not None for rule in RULES if rule.bound(gate) is not None)


def describe_rejected(result: Result) -> str:
    """Return where a rejected result is, and how to publish it without training again."""
    return (
        f"The adapter was uploaded to {result.adapter} but not published; to publish it without training again, apply "
        "the same manifest with a gate that it passes."
    )


def check_gate(gate: GateSpec, evaluation: EvaluationStatus, location: str) -> None:
    """Raise GateFailed with every violated rule and a sentence that says where the adapter is."""
    if violations := find_violations(gate, evaluation):
        raise RunError(Reason.GATE_FAILED, f"{'; '.join(violations)}. {location}")
