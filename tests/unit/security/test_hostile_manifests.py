"""Hostile manifests: refused with field and fix before anything is made, or only ever data in what is made."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import Document
from qlora_operator.cluster.parse import parse_job
from qlora_operator.controller.reconcile import parse
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources import build_prepare_config, build_prepare_job, build_run_config, build_train_job
from qlora_planner import make_plan
from qlora_planner.validation import CLUSTER_RULES, Violation, check
from tests.hostile import CORPUS, HARMLESS, REFUSED, Hostile
from tests.make import INSTALLATION, NOW, OWNER, UID, make_prepared, make_spec


def stored(case: Hostile) -> Mapping[str, Any]:
    """The manifest as the API server hands it out."""
    manifest = case.manifest()
    facts = {"uid": UID, "generation": 1, "resourceVersion": "1", "creationTimestamp": NOW.isoformat()}
    return {**manifest, "metadata": {**manifest["metadata"], **facts}}


def render(spec: QLoRAJobSpec) -> tuple[Manifest, ...]:
    """Every child of a run."""
    run = AttemptInputs(1, make_plan(spec, make_prepared()), make_prepared(), 3600, ())
    return (
        build_prepare_config(OWNER, spec, INSTALLATION),
        build_prepare_job(OWNER, spec, INSTALLATION),
        build_run_config(OWNER, spec, run, INSTALLATION),
        build_train_job(OWNER, spec, run, INSTALLATION),
    )


def strings(value: Any) -> Iterator[str]:
    """Every key and every text of an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 40


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_offline_with_the_field_and_the_fix(case: Hostile) -> None:
    with pytest.raises(ManifestError) as refusal:
        parse_manifest(Document("job.yaml", case.manifest(), {}), CLUSTER_RULES)
    [message] = [str(problem) for problem in refusal.value.problems if case.field in str(problem)]
    assert case.fix in message


@pytest.mark.parametrize(
    "case", [case for case in REFUSED.values() if case.change], ids=[key for key in REFUSED if REFUSED[key].change]
)
def test_the_operator_refuses_it_too_where_an_older_crd_let_it_in(case: Hostile) -> None:
    found = parse(parse_job(stored(case)))
    messages = [found.message] if isinstance(found, Violation) else [violation.message for violation in check(found)]
    assert any(case.field.replace("[0]", "") in message.replace(".0", "") for message in messages)


@pytest.mark.parametrize("case", HARMLESS.values(), ids=HARMLESS)
def test_it_is_data_and_nothing_else(case: Hostile) -> None:
    """Beside the one JSON file that the trainer validates, the children are those of a harmless spec."""
    spec = parse(parse_job(stored(case)))
    assert isinstance(spec, QLoRAJobSpec)
    assert check(spec) == ()
    hostile, good = render(spec), render(make_spec())
    assert [{**child, "data": {}} for child in hostile] == [{**child, "data": {}} for child in good]
    configs = [json.loads(text) for child in hostile for text in child.get("data", {}).values()]
    assert [QLoRAJobSpec.model_validate(config["spec"]) for config in configs] == [spec, spec]


def test_no_text_of_a_spec_becomes_a_command_or_a_variable() -> None:
    """The kubelet expands $(NAME) in commands, arguments and variables, so none of them has anything of the user's."""
    spec = make_spec(**HARMLESS["variable"].change)
    containers = [
        container
        for child in render(spec)
        if child["kind"] == "Job"
        for container in child["spec"]["template"]["spec"]["containers"]
    ]
    assert len(containers) == 2
    assert not [text for container in containers for text in strings(container) if "$(" in text]
