"""Derives the next status from the last one and a decision; it is written once, and only if it differs."""

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, TypeVar

from qlora_api.escapes import cut_escaped, escape_line
from qlora_api.names import RUNNING, TERMINAL, ConditionType, Phase
from qlora_api.prepared import Prepared
from qlora_api.reasons import REASONS, Reason
from qlora_api.result import Result, is_below
from qlora_api.units import format_duration
from qlora_api.v1alpha1 import (
    Attempt,
    Checkpoint,
    Condition,
    EarlierAttempts,
    ManifestRef,
    OutputStatus,
    Plan,
    Preparation,
    Progress,
    QLoRAJobStatus,
    RunUsage,
)
from qlora_api.v1alpha1.status import MAX_ATTEMPT_MESSAGE, MAX_ATTEMPTS_LISTED, MAX_MESSAGE, MAX_SUMMARY
from qlora_api.v1alpha1.usage import sum_usage
from qlora_operator.models import Decision
from qlora_operator.status.conditions import derive_conditions
from qlora_operator.status.formatting import format_number, format_step

Entry = TypeVar("Entry", Attempt, Condition)
_UNSUPPORTED_VALUE: Final = re.compile(r'Unsupported value: "(\w+)"')
"""How the API server names a word that is not on a list of the CRD."""
_STICKY_ATTEMPT_FIELDS: Final = ("started_at", "micro_batch_size", "node", "avoided_nodes", "checkpoint_step", "usage")
"""Fields of an attempt that are kept once they are known, since its pods may be gone."""


def derive_status(  # noqa: PLR0913 (everything that a status depends on)
    previous: QLoRAJobStatus,
    decision: Decision,
    report: Progress | None,
    *,
    gpus: int,
    generation: int,
    now: datetime,
) -> QLoRAJobStatus:
    """Return the next status; what the last one knows and the decision does not is carried over."""
    now = now.replace(microsecond=0)
    prepared, result = decision.prepared, decision.result
    report = without_foreign_uris(report, previous.output)
    plan = decision.plan or previous.plan
    attempts = merge_attempt(previous.attempts, decision.attempt)
    status = previous.model_copy(
        update={
            "observed_generation": generation,
            "phase": decision.phase,
            "reason": decision.reason,
            "message": describe_decision(decision),
            "summary": summarize(decision),
            "gpus": gpus if decision.phase not in TERMINAL else 0,
            "attempt": attempts[-1].number if attempts else None,
            "started_at": previous.started_at or now,
            "finished_at": now if decision.phase in TERMINAL else None,
            "children_deleted_at": previous.children_deleted_at if decision.phase in TERMINAL else None,
            "model": prepared.model if prepared else previous.model,
            "dataset": prepared.dataset if prepared else previous.dataset,
            "preparation": derive_preparation(previous.preparation, decision.preparation),
            "used_class": decision.used_class or previous.used_class,
            "plan": plan,
            **list_attempts(attempts, previous, now),
            "forgiven_attempts": decision.forgiven_attempts or previous.forgiven_attempts,
            "retry_limits": decision.retry_limits,
            "checkpoint": derive_checkpoint(previous, decision, report),
            "evaluation": result.evaluation if result else previous.evaluation,
            "output": derive_output(previous.output, prepared, result, report),
            "usage": derive_usage(previous.usage, decision),
            **derive_progress(report or previous.last_report, decision.phase, plan),
        }
    )
    return status.model_copy(update={"conditions": derive_conditions(status, now)})


def derive_alternatives(  # noqa: PLR0913 (as derive_status)
    previous: QLoRAJobStatus,
    decision: Decision,
    report: Progress | None,
    *,
    gpus: int,
    generation: int,
    now: datetime,
) -> Iterator[QLoRAJobStatus]:
    """Yield the next status; then what to write if it is refused: one without the report, and the bare outcome."""
    yield derive_status(previous, decision, report, gpus=gpus, generation=generation, now=now)
    if report is not None:
        yield derive_status(previous, decision, None, gpus=gpus, generation=generation, now=now)
    yield derive_outcome(previous, decision, gpus=gpus, generation=generation, now=now)


def derive_outcome(
    previous: QLoRAJobStatus, decision: Decision, *, gpus: int, generation: int, now: datetime
) -> QLoRAJobStatus:
    """Return the last status with phase, reason, attempts and conditions of a decision, all of bounded length."""
    now = now.replace(microsecond=0)
    attempts = merge_attempt(previous.attempts, decision.attempt)
    bare = replace(decision, message="")
    status = previous.model_copy(
        update={
            "observed_generation": generation,
            "phase": decision.phase,
            "reason": decision.reason,
            "message": describe_decision(bare),
            "summary": summarize(bare),
            "gpus": gpus if decision.phase not in TERMINAL else 0,
            "attempt": attempts[-1].number if attempts else None,
            "started_at": previous.started_at or now,
            "finished_at": now if decision.phase in TERMINAL else None,
            "children_deleted_at": previous.children_deleted_at if decision.phase in TERMINAL else None,
            "preparation": derive_preparation(previous.preparation, decision.preparation),
            **list_attempts(attempts, previous, now),
            "forgiven_attempts": decision.forgiven_attempts or previous.forgiven_attempts,
            "retry_limits": decision.retry_limits,
        }
    )
    return status.model_copy(update={"conditions": derive_conditions(status, now)})


def describe_decision(decision: Decision) -> str:
    """Return the message of a decision, as one line; that of a failure also says what to do."""
    record = REASONS[decision.reason]
    remedy = f". What to do: {record.remedy}" if decision.phase is Phase.FAILED else ""
    return cut_escaped(escape_line(decision.message or record.sentence), MAX_MESSAGE - len(remedy)) + remedy


def summarize(decision: Decision) -> str:
    """Return the beginning of the message of a decision, without what to do."""
    message = escape_line(decision.message or REASONS[decision.reason].sentence)
    return message if len(message) <= MAX_SUMMARY else f"{message[: MAX_SUMMARY - 1]}…"


def derive_progress(report: Progress | None, phase: Phase, plan: Plan | None) -> dict[str, Any]:
    """Return the progress fields from the last report; before the first one, a running pod is at 0%."""
    if report is None:
        initial = (
            {"progress": "0%", "step": format_step(0, plan.total_steps if plan else None)} if phase in RUNNING else {}
        )
        return {"progress": "100%"} if phase is Phase.SUCCEEDED else initial
    remaining = report.remaining_seconds if phase in RUNNING else None
    total = report.total_steps or (plan.total_steps if plan else None)
    speed = report.tokens_per_second
    return {
        "last_report": report,
        "progress": "100%" if phase is Phase.SUCCEEDED else f"{report.percent}%",
        "eta": format_duration(remaining) if remaining is not None else None,
        "loss": format_number(report.loss, 3) if report.loss is not None else None,
        "step": format_step(report.step, total),
        "tokens_per_second": format_number(speed, 0) if speed is not None else None,
    }


def derive_checkpoint(previous: QLoRAJobStatus, decision: Decision, report: Progress | None) -> Checkpoint | None:
    """Return the checkpoint that another attempt would resume from; None once the trainer has deleted all of them.

    It does so when the adapter is published, or uploaded as rejected by the gate.
    """
    if decision.phase is Phase.SUCCEEDED or decision.reason is Reason.GATE_FAILED:
        return None
    known = (decision.checkpoint, report.checkpoint if report else None, previous.checkpoint)
    # A termination message has a newer one than the last report, which stays known after it.
    return max((found for found in known if found is not None), key=lambda found: found.time, default=None)


def without_foreign_uris(report: Progress | None, output: OutputStatus | None) -> Progress | None:
    """Leave out what is not below the prefix of the run; whoever takes over a pod can report any URI."""
    if report is None:
        return report
    named = {"checkpoint": report.checkpoint, "manifest": report.manifest}
    foreign = {
        name: None for name, found in named.items() if found and not (output and is_below(found.uri, output.prefix))
    }
    return report.model_copy(update=foreign) if foreign else report


def derive_output(
    previous: OutputStatus | None, prepared: Prepared | None, result: Result | None, report: Progress | None = None
) -> OutputStatus | None:
    """Return where the result is, or will be published."""
    output = OutputStatus(digest=prepared.digest, prefix=prepared.prefix) if prepared else previous
    if output is not None:
        output = output.model_copy(update={"manifest": _derive_manifest(output.prefix, previous, report)})
    if result is None:
        return output
    prefix = result.adapter.rpartition("/")[0]
    output = output or OutputStatus(digest=prefix.rpartition("/")[2][:64], prefix=prefix)
    return output.model_copy(update={"adapter": result.adapter, "report": result.report, "merged": result.merged})


def _derive_manifest(prefix: str, previous: OutputStatus | None, report: Progress | None) -> ManifestRef | None:
    """Return the manifest below a prefix that was reported last."""
    known = (report.manifest if report else None, previous.manifest if previous else None)
    return next((manifest for manifest in known if manifest and is_below(manifest.uri, prefix)), None)


def derive_usage(previous: RunUsage | None, decision: Decision) -> RunUsage | None:
    """Return the GPU time so far, with what it saves that the result was there already."""
    found = decision.result.gpu_seconds if decision.result and decision.reason is Reason.ALREADY_PUBLISHED else None
    return (previous or RunUsage()).model_copy(update={"saved": found}) if found else previous


def derive_preparation(previous: Preparation | None, preparation: Preparation | None) -> Preparation | None:
    """Return the preparation of the decision, if it has one, with its message as one line."""
    if preparation is None:
        return previous
    return preparation.model_copy(update={"message": escape_line(preparation.message)[:MAX_ATTEMPT_MESSAGE]})


def merge_attempt(attempts: tuple[Attempt, ...], attempt: Attempt | None) -> tuple[Attempt, ...]:
    """Replace the attempt with the same number, keeping its sticky fields; a message becomes one line.

    A Job that avoids no node any more, since it waited long in a queue, has an empty tuple.
    """
    if attempt is None:
        return attempts
    by_number = {other.number: other for other in attempts}
    previous = by_number.get(attempt.number, attempt)
    sticky = {name: getattr(previous, name) for name in _STICKY_ATTEMPT_FIELDS if not getattr(attempt, name)}
    if attempt.avoided_nodes == ():
        sticky["avoided_nodes"] = None
    message = cut_escaped(escape_line(attempt.message), MAX_ATTEMPT_MESSAGE)
    by_number[attempt.number] = attempt.model_copy(update={**sticky, "message": message})
    return tuple(by_number[number] for number in sorted(by_number))


def list_attempts(attempts: tuple[Attempt, ...], previous: QLoRAJobStatus, now: datetime) -> dict[str, Any]:
    """Return the attempts that a status lists: the first one and the newest; the others are summed up."""
    surplus = len(attempts) - MAX_ATTEMPTS_LISTED
    if surplus <= 0:
        return {"attempts": attempts, "earlier_attempts": previous.earlier_attempts}
    dropped, retried_after = attempts[1 : 1 + surplus], previous.retry.after_attempt if previous.retry else 0
    counted = [attempt for attempt in dropped if attempt.number > retried_after]
    seconds = sum(int(attempt.run_time(attempt.finished_at or now).total_seconds()) for attempt in counted)
    count, before = len(dropped), previous.earlier_attempts or EarlierAttempts(count=0, seconds=0)
    known = [part for part in (before.usage, *(attempt.usage for attempt in dropped)) if part is not None]
    total = EarlierAttempts(
        count=before.count + count,
        seconds=before.seconds + max(seconds, 0),
        usage=sum_usage(known) if known else None,
    )
    return {"attempts": (attempts[0], *attempts[1 + surplus :]), "earlier_attempts": total}


def with_observed_generation(previous: QLoRAJobStatus, generation: int) -> QLoRAJobStatus:
    """Return the status of a finished run, with the latest generation as observed, and without an earlier error."""
    conditions = tuple(
        condition.model_copy(
            update={
                "observed_generation": generation,
                **({"message": previous.message or ""} if condition.type is ConditionType.RECONCILING else {}),
            }
        )
        for condition in previous.conditions
    )
    gpus = previous.gpus and 0
    return previous.model_copy(update={"observed_generation": generation, "gpus": gpus, "conditions": conditions})


def without_refused_reasons(status: QLoRAJobStatus, error: str) -> QLoRAJobStatus | None:
    """Return the status with other reasons than those that an older CRD refused; None if it has none of them."""
    refused = set(_UNSUPPORTED_VALUE.findall(error)) - {Reason.TRAINER_ERROR, Reason.ACCEPTED}
    preparing = status.preparation.reason if status.preparation else None
    if not refused & {status.reason, preparing, *(attempt.reason for attempt in status.attempts)}:
        return None
    known = Reason.TRAINER_ERROR if status.phase is Phase.FAILED else Reason.ACCEPTED
    message = f"{status.reason}: {status.message} (the installed CRD is older than the operator and lacks a reason)"
    return status.model_copy(
        update={
            "reason": known if status.reason in refused else status.reason,
            "message": message[:MAX_MESSAGE],
            "attempts": tuple(_with_reason(entry, refused, Reason.TRAINER_ERROR) for entry in status.attempts),
            "conditions": tuple(_with_reason(entry, refused, known) for entry in status.conditions),
            "preparation": None if preparing in refused else status.preparation,
        }
    )


def _with_reason(entry: Entry, refused: set[str], known: Reason) -> Entry:
    return entry.model_copy(update={"reason": known}) if entry.reason in refused else entry


def to_wire(status: QLoRAJobStatus) -> dict[str, Any]:
    """Return the status as the API server stores it."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)
