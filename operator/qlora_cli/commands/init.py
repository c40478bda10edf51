"""`qlora init`: writes a first manifest with the fields to decide, each with its description."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml

from qlora_api import names
from qlora_api.escapes import escape_line, shell_command
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.console import Console, echo, print_line
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.manifests.loader import JobManifest, ManifestError, parse_manifest
from qlora_cli.manifests.validation_messages import field_at
from qlora_cli.manifests.yaml_documents import STDIN, parse_documents
from qlora_planner.validation import COMMON_RULES

SHOWN_FIELDS: Final = (
    "model.uri",
    "dataset.uri",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "training.epochs",
    "training.globalBatchSize",
    "training.learningRate",
    "training.maxLength",
    "resources.gpusPerNode",
    "resources.memory",
    "output.uri",
    "output.secretRef.name",
)
"""Fields to decide in a first run; all others have suitable defaults."""
WIDTH: Final = 100
HEADER_COMMENT: Final = (
    "kubectl explain qlorajob.spec shows every field; qlora validate and qlora plan check this file."
)


def init(  # noqa: PLR0913, PLR0917 (an option each)
    file: Annotated[str, typer.Argument(help="Manifest to write; - writes to standard output.")] = "job.yaml",
    name: Annotated[str, typer.Option(help="Name of the QLoRAJob.")] = "my-adapter",
    model: Annotated[str, typer.Option(help="URI of the base model.")] = "hf://HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset: Annotated[str, typer.Option(help="URI of the training data.")] = "s3://my-bucket/train.jsonl",
    to: Annotated[str, typer.Option("--to", help="URI prefix for the result.")] = "s3://my-bucket/adapters",
    secret: Annotated[str, typer.Option(help="Name of the Secret with the S3 credentials.")] = "s3-credentials",  # noqa: S107 (a name)
    gpus: Annotated[int, typer.Option(min=0, max=16, help="GPUs of the training pod; 0 trains on the CPU.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a first manifest, with the description of each field."""
    console = Console(stderr=True)
    chosen = {
        "model.uri": model, "dataset.uri": dataset, "output.uri": to, "output.secretRef.name": secret,
        "resources.gpusPerNode": gpus,
    }  # fmt: skip
    text = write_manifest(name, chosen)
    try:
        [document] = parse_documents(text, "the new manifest")
        parse_manifest(document, COMMON_RULES)
    except ManifestError as error:
        exit_error_without_remedy(console, None, str(error))
    if file == STDIN:
        echo(text, nl=False)
        return
    if Path(file).exists() and not force:
        exit_error_without_remedy(console, None, f"{file} already exists; choose another name, or use --force")
    Path(file).write_text(text, encoding="utf-8")
    word = f"./{file}" if file.startswith("-") else file
    plan, submit = shell_command("qlora", "plan", word), shell_command("qlora", "submit", word)
    print_line(console, f"wrote {file}; next: {plan}, then {submit}")


def write_manifest(name: str, chosen: Mapping[str, Any]) -> str:
    """Return a manifest with the given values, and the defaults of all other shown fields.

    Args:
        name: Name of the QLoRAJob.
        chosen: Values by path below spec, such as `model.uri`.

    """
    lines = [f"apiVersion: {names.API_VERSION}", f"kind: {names.KIND}", "metadata:", f"  name: {_scalar(name)}"]
    return "\n".join((f"# {HEADER_COMMENT}", *lines, "spec:", *_fields(chosen))) + "\n"


def _fields(chosen: Mapping[str, Any]) -> Iterator[str]:
    parents: tuple[str, ...] = ()
    for path in SHOWN_FIELDS:
        *above, last = path.split(".")
        shared = next((depth for depth, (a, b) in enumerate(zip(parents, above, strict=False)) if a != b), len(parents))
        for depth, parent in enumerate(above):
            if depth >= shared:
                yield f"{_indent(depth)}{parent}:"
        parents = tuple(above)
        yield from _comment(path, _indent(len(above)))
        yield f"{_indent(len(above))}{last}: {_scalar(chosen[path] if path in chosen else default_of(path))}"


def _indent(depth: int) -> str:
    return "  " * (depth + 1)


def _comment(path: str, indent: str) -> Iterator[str]:
    field = field_at(("spec", *path.split(".")), JobManifest)
    for line in textwrap.wrap(field.description or "" if field else "", WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"


def default_of(path: str) -> Any:
    """Return the default of a field of the spec, as a JSON value."""
    value: Any = QLoRAJobSpec.model_validate(
        {"model": {"uri": "hf://a/b"}, "dataset": {"uri": "s3://abc/d"}, "output": {"uri": "s3://abc/d"}}
    ).model_dump(mode="json", by_alias=True)
    for part in path.split("."):
        value = value[part]
    return value


def _scalar(value: Any) -> str:
    """Format a value as YAML on one line: a word as it is, unless it is a word of YAML such as null."""
    if isinstance(value, str) and re.fullmatch("[A-Za-z][A-Za-z0-9_-]*", value) and yaml.safe_load(value) == value:
        return value
    return escape_line(json.dumps(value, ensure_ascii=False))
