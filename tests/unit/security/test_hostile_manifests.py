"""Hostile manifests are refused with field and fix before anything is created, or end up as data only."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import Document
from qlora_operator.cluster.parse import parse_job
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources import build_prepare_config, build_prepare_job, build_run_config, build_train_job
from qlora_operator.stored_job import read_job
from qlora_planner import make_plan
from qlora_planner.validation import CLUSTER_RULES, check
from tests.hostile import CORPUS, HARMLESS, REFUSED, Hostile
from tests.make import INSTALLATION, NOW, OWNER, UID, make_prepared, make_spec


def stored(case: Hostile) -> Mapping[str, Any]:
    """Return the manifest as the API server returns it."""
    manifest = case.manifest()
    facts = {"uid": UID, "generation": 1, "resourceVersion": "1", "creationTimestamp": NOW.isoformat()}
    return {**manifest, "metadata": {**manifest["metadata"], **facts}}


def render(spec: QLoRAJobSpec) -> tuple[Manifest, ...]:
    """Build every child of a run."""
    run = AttemptInputs(1, make_plan(spec, make_prepared()), make_prepared())
    return (
        build_prepare_config(OWNER, spec, INSTALLATION),
        build_prepare_job(OWNER, spec, INSTALLATION),
        build_run_config(OWNER, spec, run, INSTALLATION),
        build_train_job(OWNER, spec, run, INSTALLATION),
    )


def strings(value: Any) -> Iterator[str]:
    """Yield every key and every string of an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def test_corpus_has_at_least_forty_manifests() -> None:
    assert len(CORPUS) >= 40


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_hostile_manifest_is_refused_offline_with_field_and_fix(case: Hostile) -> None:
    with pytest.raises(ManifestError) as refusal:
        parse_manifest(Document("job.yaml", case.manifest(), {}), CLUSTER_RULES)
    [message] = [str(problem) for problem in refusal.value.problems if case.field in str(problem)]
    assert case.fix in message


@pytest.mark.parametrize(
    "case", [case for case in REFUSED.values() if case.change], ids=[key for key in REFUSED if REFUSED[key].change]
)
def test_hostile_manifest_past_an_older_crd_is_refused_by_the_operator(case: Hostile) -> None:
    read = read_job(parse_job(stored(case)))
    violations = check(read.spec) if read.spec and not read.skew.invalid else ()
    messages = [read.skew.invalid, *(violation.message for violation in violations)]
    if read.skew.ignored:  # a field that this version does not know has no effect
        assert case.field.removeprefix("spec.") in read.skew.ignored
        return
    assert any(case.field.replace("[0]", "") in message.replace(".0", "") for message in messages)


@pytest.mark.parametrize("case", HARMLESS.values(), ids=HARMLESS)
def test_harmless_manifest_changes_only_config_data(case: Hostile) -> None:
    """Apart from the JSON file that the trainer validates, the children equal those of a harmless spec."""
    spec, _, skew = read_job(parse_job(stored(case)))
    assert spec is not None
    assert (skew.invalid, check(spec)) == ("", ())
    hostile, good = render(spec), render(make_spec())
    assert [{**child, "data": {}} for child in hostile] == [{**child, "data": {}} for child in good]
    configs = [json.loads(text) for child in hostile for text in child.get("data", {}).values()]
    assert [QLoRAJobSpec.model_validate(config["spec"]) for config in configs] == [spec, spec]


def test_spec_text_never_reaches_commands_or_variables() -> None:
    """The kubelet expands $(NAME) in commands, arguments and variables, so none may contain text of the user."""
    spec = make_spec(**HARMLESS["variable"].change)
    containers = [
        container
        for child in render(spec)
        if child["kind"] == "Job"
        for container in child["spec"]["template"]["spec"]["containers"]
    ]
    assert len(containers) == 2
    assert not [text for container in containers for text in strings(container) if "$(" in text]
