"""Alerts fire when they should, and only then, by Prometheus's own judgement."""

from pathlib import Path
from typing import Final

import yaml

from tests.cluster.host.commands import run
from tests.cluster.programs.binaries import binary
from tests.integration.chart.rendering import CHART

ALERTS: Final = CHART / "files/alerts.yaml"
TIMES: Final = Path(__file__).with_name("alerts.test.yaml")


def test_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in run([binary("promtool"), "test", "rules", TIMES])


def test_promtool_accepts_alerts() -> None:
    assert "SUCCESS" in run([binary("promtool"), "check", "rules", "--lint=all", "--lint-fatal", ALERTS])


def test_every_alert_has_firing_case() -> None:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    tests = yaml.safe_load(TIMES.read_text(encoding="utf-8"))["tests"]
    looks = [look for test in tests for look in test["alert_rule_test"]]
    assert {look["alertname"] for look in looks if look["exp_alerts"]} == {
        rule["alert"] for group in groups for rule in group["rules"]
    }
