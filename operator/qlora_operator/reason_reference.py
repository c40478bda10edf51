"""The references of reasons and of Events, written from the tables that the operator works with."""

from collections.abc import Iterator

from qlora_api.guidance import GUIDANCE
from qlora_api.names import FIELD_MANAGER, GROUP, Reason
from qlora_operator.build.event import ACTIONS, event_type
from qlora_operator.circumstances import CIRCUMSTANCES, MOMENTS, follows


def render_reasons() -> str:
    """Return a section for each reason: what happened, where to look, what becomes of GPUs and run, what to do."""
    return "\n".join(
        [
            "# Reasons",
            "",
            "The `reason` of a condition, of an attempt, and of `status.reason`. The message beside it says more:",
            "`kubectl get qlj NAME -o jsonpath='{.status.message}'`. By what you see instead of by reason:",
            "[troubleshooting](../troubleshooting.md). What is tried again, and how often: [attempts](../attempts.md).",
            "",
            *(line for reason in GUIDANCE for line in _section(reason)),
        ]
    )


def _section(reason: Reason) -> Iterator[str]:
    sentence, remedy = GUIDANCE[reason]
    moments, behind = CIRCUMSTANCES[reason]
    yield from (f"## {reason}", "", f"{sentence} {behind}", "")
    yield from (f"- **{moment}:** {MOMENTS[moment]}" for moment in moments)
    yield f"- **Tried again:** {follows(reason)}"
    yield f"- **What to do:** {remedy}"
    yield ""


def render_events() -> str:
    """Return the list of every Event that the operator makes."""
    actions = ", ".join(f"{verb} ({phase})" for phase, verb in ACTIONS.items())
    rows = (
        f"| [{reason}](reasons.md#{reason.lower()}) | {event_type(reason)} | {GUIDANCE[reason][0]} |"
        for reason in Reason
    )
    return "\n".join(
        [
            "# Events",
            "",
            "The operator makes one Event for each change of a QLoRAJob's phase or reason, before it writes the",
            "status: `kubectl describe qlj NAME`, `kubectl events --for qlorajob/NAME`, `qlora events NAME`. Progress",
            "makes none. An operator that is restarted halfway tells of nothing twice, since the name of an Event",
            "follows from its transition. Kubernetes keeps Events for an hour; the status keeps what matters.",
            "",
            f"`reportingController` is `{GROUP}/{FIELD_MANAGER}`, `note` is the status's message, `reason` its",
            "reason. `type` is Warning for what ends a run badly, and for what hinders one although it goes on.",
            f"`action` is a verb for the phase: {actions}.",
            "",
            "| reason | type | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
