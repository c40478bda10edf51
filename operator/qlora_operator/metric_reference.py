"""The reference of metrics, written from the list that operator and trainer register."""

from collections.abc import Iterator

from qlora_api import metrics


def render_metrics() -> str:
    """Return a table of the operator's metrics, and one of a training pod's."""
    return "\n".join(
        [
            "# Metrics",
            "",
            "What they are for, and how they are scraped: [metrics](../metrics.md).",
            "",
            "## Operator",
            "",
            f"Every replica, `{metrics.PATH}` on port `health` (8081). A replica that waits tells of no QLoRAJob.",
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


def _metric_table(listed: tuple[metrics.Metric, ...]) -> Iterator[str]:
    yield "| metric | type | labels | at most | meaning |"
    yield "|---|---|---|---|---|"
    for metric in listed:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.series} | {metric.help} |"
