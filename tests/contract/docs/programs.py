"""Checks the arguments of each program in the documentation; a wrong one raises. Nothing is executed."""

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import jsonschema
from typer.main import get_command

from qlora_api import names
from qlora_api.crd import build_class_crd, build_crd, class_root_schema, root_schema
from qlora_cli.__main__ import app
from qlora_cli.manifests.loader import JobManifest
from qlora_cli.manifests.overrides import parse_override
from qlora_cli.manifests.validation_messages import field_at
from qlora_cli.manifests.yaml_documents import parse_value
from tests.contract.docs.blocks import ROOT
from tests.make import merge

TREE: Final = re.compile(r"^(?:benchmarks|charts|crds|docs|examples|operator|requirements|tests|trainer_image)/")
"""How a path of the repository begins; others are the reader's own."""
_EAGER: Final = frozenset({"--help", "--version", "--install-completion", "--show-completion"})
_COMMON: Final = {
    "-n",
    "--namespace",
    "-A",
    "--all-namespaces",
    "-o",
    "--output",
    "-l",
    "-f",
    "--filename",
    "--as",
    "--context",
}
_KUBECTL: Final[Mapping[str, frozenset[str]]] = {
    "annotate": frozenset({"--overwrite"}),
    "apply": frozenset({"--server-side"}),
    "auth": frozenset({"--list"}),
    "cluster-info": frozenset(),
    "create": frozenset({"--from-literal"}),
    "delete": frozenset({"--force"}),
    "describe": frozenset(),
    "diff": frozenset(),
    "drain": frozenset(),
    "events": frozenset({"--for"}),
    "explain": frozenset(),
    "get": frozenset({"--watch"}),
    "kustomize": frozenset(),
    "logs": frozenset({"--previous"}),
    "patch": frozenset({"--type", "-p"}),
    "port-forward": frozenset(),
    "rollout": frozenset({"--timeout"}),
    "wait": frozenset({"--for", "--timeout"}),
}
"""Options of kubectl 1.36 that pages use, per command."""
_HELM: Final[Mapping[str, frozenset[str]]] = {
    "install": frozenset({"--namespace", "--create-namespace", "--set", "--wait"}),
    "upgrade": frozenset(
        {
            "--install",
            "--namespace",
            "--create-namespace",
            "--set",
            "--values",
            "--wait",
            "--timeout",
            "--reset-then-reuse-values",
        }
    ),
    "template": frozenset({"--show-only"}),
    "test": frozenset({"--namespace"}),
    "uninstall": frozenset({"--namespace"}),
}
"""Options of Helm 4.3 that pages use, per command."""


def _names_of(crd: Mapping[str, Any]) -> frozenset[str]:
    known = crd["spec"]["names"]
    return frozenset({known["plural"], known["singular"], *known["shortNames"]})


_CLASSES: Final = _names_of(build_class_crd())
_OURS: Final = _names_of(build_crd()) | _CLASSES
_BUILT_IN: Final = frozenset(
    {
        "configmap",
        "deployment",
        "events",
        "job",
        "lease",
        "namespace",
        "nodes",
        "pod",
        "pods",
        "secret",
        "service",
        "svc",
    }
)
_KUEUE: Final = frozenset({"workloads"})


def options_of(words: Iterable[str]) -> set[str]:
    """Return the options without their values."""
    return {word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)}


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Return the value of an option, given as --option=value or as the next argument."""
    after = [words[place + 1] for place, word in enumerate(words[:-1]) if word == option]
    return after + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def check_qlora(words: Sequence[str], complete: bool = True) -> None:
    """Parse the arguments as `qlora` does; without a subcommand, it is a sentence about the program."""
    group = get_command(app)
    eager = options_of(words) & _EAGER
    parameters = [option for parameter in group.params for option in parameter.opts]
    assert eager <= {*parameters, "--help"}, f"qlora has no {eager - set(parameters)}"
    rest = [word for word in words if word not in _EAGER]
    if not rest:
        return
    context = group.make_context("qlora", list(rest))
    name, command, arguments = group.resolve_command(context, rest)
    assert command is not None, f"qlora has no {name}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert options_of(arguments) <= known, f"qlora {name} has no {options_of(arguments) - known}"
    if complete:
        command.make_context(name, list(arguments), parent=context)
    for value in values_of("--set", arguments):
        location = parse_override(value).location
        assert field_at(location, JobManifest), f"a QLoRAJob has no {'.'.join(location)}"


def check_make(words: Sequence[str]) -> None:
    """Targets are in the Makefile, and variables are used there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert f"$({name})" in makefile if is_variable else word in targets, f"make knows no {name}"


def _nested(path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: _nested(rest, value) if rest else value}


def check_helm(words: Sequence[str]) -> None:
    """Check that the command and its options exist, and that the values match the chart's schema."""
    verb = words[0]
    assert options_of(words) <= _HELM[verb], f"helm {verb} has no {options_of(words) - _HELM[verb]}"
    values: dict[str, Any] = {}
    for path, _, value in (setting.partition("=") for setting in values_of("--set", words)):
        values = merge(values, _nested(path, parse_value(value)))
    jsonschema.validate(values, json.loads((ROOT / "charts/qlora-operator/values.schema.json").read_text("utf-8")))
    templates = values_of("--show-only", words)
    assert [name for name in templates if not (ROOT / "charts/qlora-operator" / name).is_file()] == []


def check_field(path: str, root: Mapping[str, Any] | None = None) -> None:
    """Check that a dotted path is a field of a QLoRAJob, or of what has another schema."""
    schema = {"properties": (root or root_schema())["properties"] | {"metadata": {"x-any": True}}}
    for name in filter(None, re.sub(r"\[[^]]*\]", "", path).split(".")):
        if "x-any" in schema:
            return
        fields = schema.get("properties") or schema.get("items", {}).get("properties", {})
        assert name in fields, f"there is no {path}"
        schema = fields[name]


def _check_condition(wanted: str) -> None:
    kind, _, what = wanted.partition("=")
    if kind == "condition":
        assert what.partition("=")[0] in {*names.ConditionType, "Available", "Complete", "Ready"}, wanted
    else:
        assert kind == "jsonpath"
        check_field(re.sub(r"[{}]", "", what.partition("}=")[0]))


def _check_resource(word: str) -> None:
    kind = word.partition("/")[0]
    assert set(kind.split(",")) <= _OURS | _BUILT_IN | _KUEUE, f"kubectl knows no {kind} here"


def check_kubectl(words: Sequence[str]) -> None:
    """Check that the command, its options and kinds exist, and that paths are fields of a QLoRAJob."""
    verb, rest = words[0], words[1:]
    known = _KUBECTL[verb] | _COMMON
    assert options_of(rest) <= known, f"kubectl {verb} has no {options_of(rest) - known}"
    if verb in {"describe", "get"} and rest:
        _check_resource(rest[0])
    for word in rest:
        if re.fullmatch(r"(qlj|[a-z]+)/[\w.-]+", word) and verb in {"logs", "rollout", "wait", "port-forward"}:
            _check_resource(word)
    for patch in values_of("-p", rest):
        for block, change in json.loads(patch).items():
            assert all(check_field(f"{block}.{name}") is None for name in change)
    if verb == "explain":
        kind, _, path = rest[0].partition(".")
        _check_resource(kind)
        check_field(path, class_root_schema() if kind in _CLASSES else None)
    if verb == "wait":
        for wanted in values_of("--for", rest):
            _check_condition(wanted)
    for output in values_of("-o", rest) + values_of("--output", rest):
        form, _, path = output.partition("=")
        assert form in {"json", "jsonpath", "name", "wide", "yaml"}, f"kubectl has no output {form}"
        if form == "jsonpath":
            check_field(path.strip("{}"))


def check_docker(words: Sequence[str]) -> None:
    """Targets are in the Dockerfile."""
    stages = re.findall(r"^FROM .* AS (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(values_of("--target", words)) <= set(stages)
    assert words[0] in {"build", "run", "pull", "tag", "push"}


def check_kind(words: Sequence[str]) -> None:
    """The commands of kind that pages use."""
    assert tuple(words[:2]) in {("create", "cluster"), ("delete", "cluster"), ("load", "docker-image")}
    assert options_of(words) <= {"--name"}


def check_aws(words: Sequence[str]) -> None:
    """The commands of the AWS CLI 2 that pages use."""
    assert tuple(words[:2]) in {("s3", "cp"), ("s3", "sync"), ("s3", "mb"), ("s3", "ls")}
    assert options_of(words) <= {"--recursive", "--endpoint-url"}


def check_python(words: Sequence[str]) -> None:
    """The module is there."""
    assert words[0] == "-m"
    assert importlib.util.find_spec(words[1]), f"there is no {words[1]}"


def check_pip(words: Sequence[str]) -> None:
    """The extras are those of pyproject.toml, and the package is installed from a checkout: no registry has it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for wanted in re.findall(r"\[(.+)\]", " ".join(words)):
        assert set(wanted.split(",")) <= set(extras)
    assert [word for word in words if word.startswith("qlora")] == []


def check_paths(words: Iterable[str]) -> None:
    """Check that whatever looks like a path of the repository exists."""
    paths = [part for word in words for part in word.split("=") if TREE.match(part)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
