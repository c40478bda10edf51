"""Argo CD's health check and actions, in the Lua that Argo CD speaks (5.1), over every status that there is.

`QLORA_WRITE_DOCS=1 pytest tests/unit/gitops` writes argocd-cm.yaml anew.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from lupa.lua51 import LuaRuntime, lua_type

from qlora_api.names import RETRY_ANNOTATION, TERMINAL, ConditionType, Phase
from qlora_operator.status import to_wire
from tests.make import make_manifest
from tests.unit.operator.status.test_derive import status_in

FOLDER: Final = Path(__file__).parents[3] / "examples/gitops/argocd"
CONFIG: Final = FOLDER / "argocd-cm.yaml"
ACTIONS: Final = ("suspend", "resume", "retry", "rerun")
HEALTH: Final = {Phase.SUCCEEDED: "Healthy", Phase.FAILED: "Degraded", Phase.SUSPENDED: "Suspended"}
KIND: Final = "qlora.dev_QLoRAJob"
LIBRARIES: Final = ("io", "package", "require", "debug", "dofile", "loadfile", "loadstring", "load", "module")
"""What Argo CD does not open; of `os` it leaves the date."""


def run_lua(script: str, obj: Mapping[str, Any]) -> Any:
    """Return what a script of Argo CD makes of an object."""
    lua = LuaRuntime(unpack_returned_tuples=True)
    names = lua.globals()
    names.os = lua.table_from({"date": names.os.date, "time": names.os.time})
    for library in LIBRARIES:
        names[library] = None
    names.obj = lua.table_from(obj, recursive=True)
    return to_python(lua.execute(script))


def to_python(value: Any) -> Any:
    if lua_type(value) != "table":
        return value
    items = {key: to_python(item) for key, item in value.items()}
    return list(items.values()) if items and set(items) == set(range(1, len(items) + 1)) else items


def script(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text(encoding="utf-8")


def job_in(phase: Phase, **change: Any) -> dict[str, Any]:
    manifest = make_manifest(**change)
    return {
        **manifest,
        "metadata": {**manifest["metadata"], "generation": 1, "uid": "1", "resourceVersion": "7"},
        "status": to_wire(status_in(phase)),
    }


@pytest.mark.parametrize("phase", Phase)
def test_health_of_every_phase(phase: Phase) -> None:
    job = job_in(phase)
    health = run_lua(script("health"), job)
    assert health["status"] == HEALTH.get(phase, "Progressing")
    assert job["status"]["reason"] in health["message"]
    assert "because" in health["message"]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("condition", ConditionType)
@pytest.mark.parametrize("truth", ["True", "False", "Unknown"])
def test_health_is_read_of_three_conditions_and_no_other(phase: Phase, condition: ConditionType, truth: str) -> None:
    """Whatever any one of the others says, the health stays that of the phase."""
    job = job_in(phase)
    for entry in job["status"]["conditions"]:
        if entry["type"] == condition:
            entry["status"] = truth
    health = run_lua(script("health"), job)["status"]
    assert health in {"Healthy", "Degraded", "Suspended", "Progressing"}
    if condition not in {ConditionType.READY, ConditionType.STALLED, ConditionType.SUSPENDED}:
        assert health == HEALTH.get(phase, "Progressing")


@pytest.mark.parametrize("status", [None, {}, {"observedGeneration": -1}])
def test_before_the_first_write_it_is_progressing(status: dict[str, Any] | None) -> None:
    job = {key: value for key, value in job_in(Phase.PENDING).items() if key != "status"}
    health = run_lua(script("health"), job if status is None else {**job, "status": status})
    assert health == {"status": "Progressing", "message": "waiting for the operator"}


@pytest.mark.parametrize("phase", Phase)
def test_after_a_change_nothing_old_is_believed(phase: Phase) -> None:
    job = job_in(phase)
    job["metadata"]["generation"] = 2
    assert run_lua(script("health"), job)["status"] == "Progressing"


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("suspend", [False, True])
def test_actions_that_make_no_sense_are_disabled(phase: Phase, suspend: bool) -> None:
    found = run_lua(script("actions/discovery"), job_in(phase, suspend=suspend))
    finished = phase in TERMINAL
    assert {name: action["disabled"] for name, action in found.items()} == {
        "suspend": finished or suspend,
        "resume": finished or not suspend,
        "retry": phase is not Phase.FAILED,
        "rerun": not finished,
    }


@pytest.mark.parametrize(("action", "suspend"), [("suspend", True), ("resume", False)])
def test_suspend_and_resume_change_one_field(action: str, suspend: bool) -> None:
    job = job_in(Phase.TRAINING, suspend=not suspend)
    changed = run_lua(script(f"actions/{action}"), job)
    assert changed["spec"] == {**job["spec"], "suspend": suspend}
    assert changed["metadata"] == job["metadata"]


@pytest.mark.parametrize("annotations", [None, {RETRY_ANNOTATION: "before", "team": "a"}])
def test_retry_sets_only_the_annotation(annotations: dict[str, str] | None) -> None:
    job = job_in(Phase.FAILED)
    job["metadata"] |= {"annotations": annotations} if annotations else {}
    changed = run_lua(script("actions/retry"), job)
    assert changed["spec"] == job["spec"]
    requested = changed["metadata"]["annotations"].pop(RETRY_ANNOTATION)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", requested)
    assert changed["metadata"]["annotations"] == ({"team": "a"} if annotations else {})


def test_rerun_makes_a_copy_that_argo_cd_does_not_take_for_the_first() -> None:
    job = job_in(Phase.FAILED, suspend=True)
    job["metadata"] |= {"name": "a" * 52, "labels": {"argocd.argoproj.io/instance": "runs"}}
    [made] = run_lua(script("actions/rerun"), job)
    copy = made["resource"]
    assert made["operation"] == "create"
    assert copy["spec"] == {**job["spec"], "suspend": False}
    assert copy["metadata"].keys() == {"name", "namespace"}
    assert re.fullmatch(r"a{37}-[0-9]{14}", copy["metadata"]["name"])
    assert "status" not in copy


def test_rerun_leaves_out_what_lua_cannot_tell_from_a_list() -> None:
    job = job_in(Phase.FAILED, lora={"rank": 8, "rankPattern": {}, "modulesToSave": []})
    [made] = run_lua(script("actions/rerun"), job)
    assert made["resource"]["spec"]["lora"] == {"rank": 8}


def config_map() -> str:
    """The ConfigMap of Argo CD with these scripts; its administrator merges it into the one that is there."""
    definitions = [{"name": name, "action.lua": script(f"actions/{name}")} for name in ACTIONS]
    actions = {"discovery.lua": script("actions/discovery"), "definitions": definitions}
    data = {
        f"resource.customizations.health.{KIND}": script("health"),
        f"resource.customizations.actions.{KIND}": yaml.dump(actions, Dumper=Literal, sort_keys=False),
    }
    metadata = {"name": "argocd-cm", "namespace": "argocd", "labels": {"app.kubernetes.io/part-of": "argocd"}}
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    note = "# Written from the .lua files by `QLORA_WRITE_DOCS=1 pytest tests/unit/gitops`; do not edit.\n"
    return note + yaml.dump(manifest, Dumper=Literal, sort_keys=False)


class Literal(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Literal.add_representer(str, _write_text)


def test_the_config_map_has_these_scripts() -> None:
    if os.environ.get("QLORA_WRITE_DOCS"):
        CONFIG.write_text(config_map(), encoding="utf-8")
    assert CONFIG.read_text(encoding="utf-8") == config_map()
    data = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]
    assert yaml.safe_load(data[f"resource.customizations.actions.{KIND}"])["discovery.lua"] == script(
        "actions/discovery"
    )
