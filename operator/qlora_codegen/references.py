"""References of reasons, Events and metrics, rendered from the tables that operator and trainer use."""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Final

from qlora_api import metrics
from qlora_api.names import FIELD_MANAGER, GROUP
from qlora_api.reasons import REASONS, Domain, Moment, Reason, ReasonRecord, RetryAction, Topic
from qlora_api.v1alpha1.status import MAX_ATTEMPTS_LISTED
from qlora_operator.lifecycle import prepare_retries
from qlora_operator.lifecycle.budgets import BACKOFFS, LONGEST_PAUSE, MAX_LOST_ATTEMPTS, MAX_NODE_ATTEMPTS, PATIENCE
from qlora_operator.lifecycle.quarantine import QUARANTINE
from qlora_operator.lifecycle.retry_policy import GOT_GOING
from qlora_operator.models import PREPARE_DEADLINE, PREPARE_MEMORY
from qlora_operator.resources.event import EVENT_ACTIONS, INSTALLATION_REASON, QUARANTINE_REASON, event_type

MOMENTS: Final = {
    Moment.MANIFEST: "no GPU is held. See `qlora status NAME`; `qlora validate FILE` needs no cluster.",
    Moment.PREPARATION: "no GPU is held, since the prepare pod requests none. See `qlora logs NAME --attempt 0`.",
    Moment.PLANNING: "no GPU is held. See `qlora status NAME`.",
    Moment.WAITING: "no GPU is held. See `qlora events NAME`.",
    Moment.STARTING: "a training pod holds its GPUs, for `spec.deadlines.startup` at most. See `qlora events NAME`.",
    Moment.TRAINING: "its GPUs are held until its pods end; between attempts none is held. See `qlora logs NAME`.",
    Moment.OVER: "no GPU is held any more. See `qlora status NAME`.",
}
"""Whether GPUs are held at that time, and which command shows more; the status message always comes first."""
NEXT_ATTEMPTS: Final = {
    RetryAction.RESUME: "resumes from the last checkpoint",
    RetryAction.OTHER_NODE: "resumes from the last checkpoint, on another node",
    RetryAction.PREFER_OTHER_NODE: "resumes from the last checkpoint, if possible on another node",
    RetryAction.SHRINK_MICRO_BATCH: "resumes with half the micro-batch and twice the gradient accumulation",
}
"""What the next attempt does."""
_HOURS: Final = f"{PATIENCE.total_seconds() / 3600:g} h"
BUDGETS: Final = {
    Domain.RUN: "`spec.retries.maxAttempts`",
    Domain.NODE: f"{MAX_NODE_ATTEMPTS} attempts",
    Domain.SERVICE: f"{_HOURS} of pauses",
    Domain.CLUSTER: f"{_HOURS} of pauses",
}
"""What is spent by attempts that bring no new checkpoint."""
FIGURES: Final = {
    "prepare_memory": PREPARE_MEMORY,
    "prepare_hours": f"{PREPARE_DEADLINE.total_seconds() / 3600:g}",
    "most_attempts": MAX_ATTEMPTS_LISTED,
    "most_lost": MAX_LOST_ATTEMPTS,
    "node_attempts": MAX_NODE_ATTEMPTS,
    "quarantine_minutes": f"{QUARANTINE.total_seconds() / 60:g}",
    "going_minutes": f"{GOT_GOING.total_seconds() / 60:g}",
    "check_minutes": f"{prepare_retries.LONGEST_PAUSE.total_seconds() / 60:g}",
    "check_hours": f"{prepare_retries.PATIENCE.total_seconds() / 3600:g}",
}
"""Values of the placeholders in records."""
TOPICS: Final = {
    "failed before training": (Topic.MANIFEST, Topic.CREDENTIALS, Topic.MODEL, Topic.DATASET, Topic.CLUSTER),
    "failed during training": (
        Topic.RECIPE,
        Topic.RESULT,
        Topic.MEMORY,
        Topic.TIME,
        Topic.RETRIES,
        Topic.VANISHED,
        Topic.TRAINER,
    ),
    "retried": (Topic.DISRUPTION, Topic.HANG, Topic.SERVICE),
}
"""Topics of each table of the troubleshooting page, by the name of the table."""
_TRAINING_ONLY: Final = (Moment.TRAINING,)


def render_reasons() -> str:
    """Return the page of reasons, with a section each: cause, GPUs held, what is retried, and what to do."""
    return "\n".join(
        [
            "# Reasons",
            "",
            "The `reason` of a condition, of an attempt, and of `status.reason`. The message beside it says more:",
            "`kubectl get qlj NAME -o jsonpath='{.status.message}'`. To start from what you see instead of from the",
            "reason, use [troubleshooting](../troubleshooting.md). What is retried, and how often:",
            "[attempts](../attempts.md).",
            "",
            *(line for reason, record in REASONS.items() for line in _section(reason, record)),
        ]
    )


def _section(reason: Reason, record: ReasonRecord) -> Iterator[str]:
    yield from (f"## {reason}", "", describe(record), "")
    if record.also_known_as:
        yield from (f"Also known as: {', '.join(f'`{words}`' for words in record.also_known_as)}.", "")
    yield from (f"- **{moment}:** {MOMENTS[moment]}" for moment in record.moments)
    yield f"- **Retried:** {describe_outcome(reason)}"
    yield f"- **What to do:** {record.remedy}"
    yield ""


def describe(record: ReasonRecord) -> str:
    """Return what happened and the usual causes."""
    return f"{record.sentence} {record.background.format(**FIGURES)}"


def describe_outcome(reason: Reason) -> str:
    """Return whether the run is retried after a reason, and how."""
    record = REASONS[reason]
    if record.moments == _TRAINING_ONLY or not prepare_retries.may_be_retried(reason):
        return _describe_next_attempt(record, "No. The run has ended")
    pauses = f"{prepare_retries.FIRST_PAUSE.total_seconds():g} s to {_minutes(prepare_retries.LONGEST_PAUSE)} min"
    end = (
        "`spec.deadlines.startup` has passed since it was first missing"
        if record.appears_late
        else f"{prepare_retries.PATIENCE.total_seconds() / 3600:g} h have passed since the first failure"
    )
    after = _describe_next_attempt(record, "A training attempt that ends so ends the run")
    return f"Preparation is tried again after {pauses}, until {end}. {after}"


def _describe_next_attempt(record: ReasonRecord, ended: str) -> str:
    if record.outcome:
        return record.outcome.format(**FIGURES)
    if record.normal:
        return "Not needed: the run continues."
    if record.retry is None:
        return f"{ended}, and somebody has to fix the cause first."
    pauses = _describe_pauses(record.domain)
    delay = f" {pauses}" if pauses else ""
    return f"The next attempt {NEXT_ATTEMPTS[record.retry]}{delay}. Budget: {_describe_budget(record)}."


def _minutes(duration: timedelta) -> str:
    return f"{duration.total_seconds() / 60:g}"


def render_topics(table: str) -> str:
    """Return a table of the troubleshooting page: the reasons of each topic."""
    rows = (
        f"| {topic} | {_links(reason for reason, record in REASONS.items() if record.topic is topic)} |"
        for topic in TOPICS[table]
    )
    return "\n".join(["| about | reasons |", "|---|---|", *rows])


def _links(reasons: Iterable[Reason]) -> str:
    return ", ".join(f"[`{reason}`](reference/reasons.md#{reason.lower()})" for reason in reasons)


def render_next_attempts() -> str:
    """Return the table of the page about attempts: what follows each reason, by domain."""
    rows: dict[tuple[Domain, RetryAction], list[Reason]] = {}
    for reason, record in REASONS.items():
        if record.domain is not None and record.retry is not None:
            rows.setdefault((record.domain, record.retry), []).append(reason)
    lines = (
        f"| {domain} | {', '.join(f'`{reason}`' for reason in reasons)} | {NEXT_ATTEMPTS[action]} | "
        f"{_describe_pauses(domain) or 'at once'} | {BUDGETS[domain]} |"
        for (domain, action), reasons in sorted(rows.items(), key=lambda row: list(Domain).index(row[0][0]))
    )
    author = f"| {Domain.AUTHOR} | every other failure | none: somebody has to fix the cause first | | none |"
    return "\n".join(
        ["| domain | ended with | the next attempt | when | budget |", "|---|---|---|---|---|", author, *lines]
    )


def _describe_budget(record: ReasonRecord) -> str:
    budget = BUDGETS[record.domain] if record.domain else "none"
    return f"{budget} without a new checkpoint"


def _describe_pauses(domain: Domain | None) -> str:
    """Return when the next attempt follows, or nothing if that is at once."""
    backoff = BACKOFFS.get(domain) if domain else None
    if backoff is None:
        return ""
    first = int(backoff.first.total_seconds())
    pauses = f"after {_brief(first)}, {_brief(2 * first)}, … {_brief(int(LONGEST_PAUSE.total_seconds()))}"
    return f"at once, then {pauses}" if backoff.immediate else pauses


def _brief(seconds: int) -> str:
    return f"{seconds // 60} min" if seconds % 60 == 0 else f"{seconds} s"


def render_cluster_faults() -> str:
    """Return the reasons that the alert about lost attempts counts, as a Prometheus regular expression."""
    return "|".join(sorted(reason for reason, record in REASONS.items() if record.cluster_fault))


def render_events() -> str:
    """Return the page of all Events that the operator records."""
    actions = ", ".join(f"{verb} ({phase})" for phase, verb in EVENT_ACTIONS.items())
    rows = (
        f"| [{reason}](reasons.md#{reason.lower()}) | {event_type(reason)} | {REASONS[reason].sentence} |"
        for reason in Reason
    )
    return "\n".join(
        [
            "# Events",
            "",
            "The operator records one Event for each change of a QLoRAJob's phase or reason, before it writes the",
            "status: `kubectl describe qlj NAME`, `kubectl events --for qlorajob/NAME`, `qlora events NAME`. Progress",
            "makes no Events. An operator that is restarted halfway records nothing twice, since the name of an Event",
            "is derived from its transition. Kubernetes keeps Events for an hour; the status keeps what matters.",
            "",
            f"`reportingController` is `{GROUP}/{FIELD_MANAGER}`, `note` is the status's message, `reason` its",
            "reason. `type` is Warning for what fails a run, and for what hinders one that continues.",
            f"`action` is a verb for the phase: {actions}.",
            "",
            f"`{QUARANTINE_REASON}` is no reason of a status: the node in its note ended attempts of several QLoRAJobs",
            "and no new attempt uses it for a while ([attempts](../attempts.md#nodes)). Nor is",
            f"`{INSTALLATION_REASON}`: the operator that recorded it leaves the QLoRAJobs of the namespace to another",
            "installation ([two installations](../operations.md#two-installations)).",
            "",
            "| reason | type | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def render_metrics() -> str:
    """Return the page of metrics: one table for the operator, one for training pods."""
    return "\n".join(
        [
            "# Metrics",
            "",
            "What they are for, and how they are scraped: [metrics](../metrics.md).",
            "",
            "## Operator",
            "",
            f"Every replica, `{metrics.PATH}` on port `health` (8081). A standby replica exports no metrics of "
            "QLoRAJobs.",
            "",
            *_metric_table(metrics.OPERATOR),
            "",
            "## Training pods",
            "",
            f"The first process of each training pod, `{metrics.PATH}` on port `{metrics.PORT_NAME}` ({metrics.PORT}).",
            "",
            *_metric_table(metrics.TRAINER),
            "",
        ]
    )


def _metric_table(entries: tuple[metrics.Metric, ...]) -> Iterator[str]:
    yield "| metric | type | labels | at most | meaning |"
    yield "|---|---|---|---|---|"
    for metric in entries:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.series} | {metric.help} |"
