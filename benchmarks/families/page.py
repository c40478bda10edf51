"""The outcomes as a page."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from benchmarks.families.trial import METHODS, Outcome

_COLUMNS: Final = ("model_type", *METHODS, "packed", "merged", "what the refusal says")
_SENTENCE: Final = 220


def write_page(outcomes: Sequence[Outcome], architectures: int, libraries: Mapping[str, str]) -> str:
    """Return the page in Markdown.

    Args:
        outcomes: Of the architectures that were tried.
        architectures: How many there are.
        libraries: Versions by name.

    """
    types = sorted({each.model_type for each in outcomes})
    found = {(each.model_type, each.method): each for each in outcomes}
    rows = [
        _row([found[model_type, method] for method in METHODS if (model_type, method) in found]) for model_type in types
    ]
    return "\n".join(
        [
            "# Every causal architecture",
            "",
            "Each architecture that transformers trains to continue text, as a tiny model with random weights, through "
            "a whole run: prepared, trained for two steps, evaluated, published, loaded by PEFT alone, and merged. "
            "[How](../families/README.md).",
            "",
            "| method | trained | refused in preparation | failed later | no tiny model | not tried yet |",
            "|---|---|---|---|---|---|",
            *(_summary(method, outcomes, architectures) for method in METHODS),
            "",
            f"| {' | '.join(_COLUMNS)} |",
            f"|{'---|' * len(_COLUMNS)}",
            *rows,
            "",
            f"{'; '.join(f'{name} {number}' for name, number in libraries.items())}.",
            "",
        ]
    )


def _summary(method: str, outcomes: Sequence[Outcome], architectures: int) -> str:
    counts = Counter(each.outcome for each in outcomes if each.method == method)
    numbers = [*(counts[kind] for kind in ("trained", "refused", "failed", "no model")), architectures - counts.total()]
    return f"| {method} | {' | '.join(map(str, numbers))} |"


def _row(outcomes: Sequence[Outcome]) -> str:
    by_method = {each.method: each.outcome for each in outcomes}
    cells = [
        f"`{outcomes[0].model_type}`",
        *(by_method.get(method, "") for method in METHODS),
        _yes(each.packing for each in outcomes),
        _yes(each.merged for each in outcomes if each.outcome == "trained" and each.method != "full"),
        _escape(next((each.sentence for each in outcomes if each.sentence), "")),
    ]
    return f"| {' | '.join(cells)} |"


def _yes(answers: Iterable[bool | None]) -> str:
    known = [each for each in answers if each is not None]
    return "" if not known else "yes" if all(known) else "no"


def _escape(sentence: str) -> str:
    reason, _, text = sentence.partition(": ")
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return f"{reason}: {text[:_SENTENCE]}{'…' if len(text) > _SENTENCE else ''}" if text else reason
