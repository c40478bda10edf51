"""The generated CRD says what the models say, in the form that an API server accepts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_api import crd
from qlora_api.qlora_class import QLoRAClassSpec
from qlora_api.reasons import REASONS, Reason
from qlora_api.v1alpha1 import MUTABLE_FIELDS, QLoRAJobSpec
from qlora_codegen.__main__ import stale_files

PRESERVE = "x-kubernetes-preserve-unknown-fields"
ROOT = Path(__file__).parents[2]
NOT_STRUCTURAL = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title", "examples", "propertyNames"}


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from walk(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{path}[]")


NODES = dict(walk(crd.root_schema()))
CLASS_NODES = dict(walk(crd.class_root_schema()))


@pytest.mark.parametrize("nodes", [NODES, CLASS_NODES], ids=["QLoRAJob", "QLoRAClass"])
def test_every_node_is_structural(nodes: dict[str, dict[str, Any]]):
    assert {path: bad for path, node in nodes.items() if (bad := NOT_STRUCTURAL & node.keys())} == {}
    assert [path for path, node in nodes.items() if "type" not in node] == []


@pytest.mark.parametrize("nodes", [NODES, CLASS_NODES], ids=["QLoRAJob", "QLoRAClass"])
def test_every_string_list_and_map_is_bounded_so_that_cel_stays_within_its_budget(nodes: dict[str, dict[str, Any]]):
    unbounded = {
        path: node["type"]
        for path, node in nodes.items()
        if path.startswith((".spec", ".status"))
        and (
            (node["type"] == "string" and not {"maxLength", "enum", "format"} & node.keys())
            or (node["type"] == "array" and "maxItems" not in node)
            or (node["type"] == "object" and "additionalProperties" in node and "maxProperties" not in node)
        )
    }
    assert unbounded == {}


@pytest.mark.parametrize("nodes", [NODES, CLASS_NODES], ids=["QLoRAJob", "QLoRAClass"])
def test_every_field_of_the_spec_is_described(nodes: dict[str, dict[str, Any]]):
    assert [path for path, node in nodes.items() if path.startswith(".spec") and "description" not in node
            and not path.endswith("[]")] == []  # fmt: skip


def test_every_block_of_the_spec_is_immutable_but_the_named_ones():
    guarded = {
        re.findall(r"oldSelf\.(\w+)", rule["rule"])[0]
        for rule in NODES[".spec"]["x-kubernetes-validations"]
        if "oldSelf." in rule["rule"]
    }
    assert guarded == NODES[".spec"]["properties"].keys() - MUTABLE_FIELDS


def test_every_immutable_block_is_always_present_or_its_rule_asks_whether_it_is():
    spec = NODES[".spec"]
    optional = {name for name, field in spec["properties"].items() if "default" not in field} - set(spec["required"])
    rules = " ".join(rule["rule"] for rule in spec["x-kubernetes-validations"])
    guarded = {name for name in optional if f"has(self.{name}) == has(oldSelf.{name})" in rules}
    assert optional <= MUTABLE_FIELDS | guarded


def test_class_has_only_what_somebody_wrote_but_for_words_that_cel_reads():
    filled = {
        path.removeprefix(".spec.pods"): node["default"] for path, node in CLASS_NODES.items() if "default" in node
    }
    assert filled == {f"{section}.tolerations[].operator": "Equal" for section in ("", ".prepare", ".train")}


@pytest.mark.parametrize("nodes", [NODES, CLASS_NODES], ids=["QLoRAJob", "QLoRAClass"])
def test_rules_read_only_fields_that_are_there_or_that_they_ask_for(nodes: dict[str, dict[str, Any]]):
    """CEL fails on a field that is absent, which refuses an object that is valid."""
    missing = []
    for path, node in nodes.items():
        for rule in node.get("x-kubernetes-validations", ()) if "properties" in node else ():
            asked = set(re.findall(r"has\((?:self|oldSelf)\.(\w+)\)", rule["rule"]))
            for name in set(re.findall(r"\b(?:self|oldSelf)\.(\w+)", rule["rule"])) - asked - {"metadata"}:
                field = node["properties"].get(name, {})
                if "default" not in field and name not in node.get("required", ()):
                    missing.append(f"{path}.{name}")
    assert missing == []


def test_objects_of_volumes_keep_their_fields_and_nothing_else_does():
    kept = {path.rpartition(".")[2] for path, node in CLASS_NODES.items() if PRESERVE in node}
    described = QLoRAClassSpec.model_json_schema(by_alias=True)["$defs"]["Volume"]["properties"].keys() - {"name"}
    assert kept == described | {"seccompProfile", "seLinuxOptions", "appArmorProfile"}
    assert [path for path, node in NODES.items() if PRESERVE in node] == [".status.class.settings"]


def test_a_status_is_in_progress_before_the_operator_has_written_one():
    assert NODES[".status"]["default"] == {"observedGeneration": -1}


def test_the_api_servers_defaults_are_the_models_defaults():
    minimal = {"model": {"uri": "hf://a/b"}, "dataset": {"uri": "s3://data/x.jsonl"}, "output": {"uri": "s3://out"}}
    assert QLoRAJobSpec.model_validate(defaulted(minimal, NODES[".spec"])) == QLoRAJobSpec.model_validate(minimal)


def defaulted(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """What the API server's defaulting makes of an object."""
    filled = dict(value)
    for name, field in schema.get("properties", {}).items():
        if name not in filled and "default" in field:
            filled[name] = field["default"]
        if name in filled and field["type"] == "object":
            filled[name] = defaulted(filled[name], field)
    return filled


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_sentence_and_a_remedy(reason: Reason):
    assert REASONS[reason].sentence.endswith(".")
    assert REASONS[reason].remedy.endswith(".")


def test_generated_files_are_current():
    assert stale_files(ROOT) == []
