"""Alerts and dashboard ask for metrics that exist, in PromQL that parses; every alert has a runbook."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import promql_parser
import pytest
import yaml

from qlora_api import metrics
from qlora_api.names import Phase
from qlora_api.reasons import Reason

ROOT: Final = Path(__file__).parents[2]
FILES: Final = ROOT / "charts/qlora-operator/files"
RUNBOOKS: Final = ROOT / "docs/runbooks"
SECTIONS: Final = ("Meaning", "Diagnosis", "Mitigation")
CLOSED_LABELS: Final = {"phase": {phase.value for phase in Phase}, "reason": {reason.value for reason in Reason}}
"""Labels whose values are a closed list."""


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FILES / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def questions() -> Iterator[Any]:
    """Every PromQL expression, under the name of its alert or panel."""
    for alert in alerts():
        yield pytest.param(alert["expr"], id=alert["alert"])
    dashboard = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield pytest.param(re.findall(r"\((.*), \w+\)$", variable["query"]["query"])[0], id=variable["name"])


QUESTIONS: Final = list(questions())


def selectors_of(expression: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def see(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), see)
    return found


def exposed() -> dict[str, metrics.Metric]:
    """Every series name, with the metric that it belongs to."""
    parts = ("_bucket", "_sum", "_count")
    return {
        f"{metric.name}{suffix}": metric
        for metric in vars(metrics).values()
        if isinstance(metric, metrics.Metric)
        for suffix in (parts if metric.kind is metrics.MetricType.HISTOGRAM else ("",))
    }


@pytest.mark.parametrize("expression", QUESTIONS)
def test_queried_metrics_exist(expression: str) -> None:
    selectors = selectors_of(expression)
    assert selectors
    assert {str(selector.name) for selector in selectors} <= set(exposed())


@pytest.mark.parametrize("expression", QUESTIONS)
def test_values_of_labels_exist(expression: str) -> None:
    for selector in selectors_of(expression):
        for matcher in selector.matchers.matchers:
            if matcher.name in CLOSED_LABELS:
                assert set(matcher.value.split("|")) <= CLOSED_LABELS[matcher.name]


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_says_what_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"].keys() == {"summary", "description"}
    runbook = (RUNBOOKS / f"{alert['alert']}.md").read_text(encoding="utf-8")
    assert re.findall(r"^(?:# |\*\*)(\w+)", runbook, re.MULTILINE) == [alert["alert"], *SECTIONS]


def test_every_runbook_has_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {alert["alert"] for alert in alerts()}
