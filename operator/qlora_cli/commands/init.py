"""`qlora init`: writes a first manifest with the fields to decide, each with its description."""

import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

import typer
import yaml
from pydantic import ValidationError

from qlora_api import names
from qlora_api.escapes import escape_line, shell_command
from qlora_api.v1alpha1 import ModelSpec, QLoRAJobSpec
from qlora_cli.console import Console, echo, print_line
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.local.data_preview import DataPreview, PreviewError, preview_data
from qlora_cli.local.gpu_count import count_gpus
from qlora_cli.manifests.loader import JobManifest, ManifestError, parse_manifest
from qlora_cli.manifests.local_paths import local_fields, resolve_local_paths, to_local_uri
from qlora_cli.manifests.model_config import NoConfigError, load_config
from qlora_cli.manifests.validation_messages import field_at
from qlora_cli.manifests.yaml_documents import STDIN, YamlError, parse_documents
from qlora_cli.uris import to_absolute_path, to_display_path, using_path
from qlora_planner.validation import COMMON_RULES

SHOWN_FIELDS: Final = (
    "model.uri",
    "dataset.uri",
    "dataset.evaluation.fraction",
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
SHOWN_IF_CHOSEN: Final = frozenset({"dataset.evaluation.fraction", "output.secretRef.name"})
FEW_ROWS: Final = 400
"""Below it, the default share of held-out rows is less than 20 rows, on which figures mean little."""
MIN_LENGTH: Final = 16
"""Least value of spec.training.maxLength."""
WIDTH: Final = 100
HEADER_COMMENT: Final = (
    "kubectl explain qlorajob.spec shows every field; qlora validate and qlora plan check this file."
)


def init(  # noqa: PLR0913, PLR0917 (an option each)
    file: Annotated[str, typer.Argument(help="Manifest to write; - writes to standard output.")] = "job.yaml",
    name: Annotated[str, typer.Option(help="Name of the QLoRAJob.")] = "my-adapter",
    model: Annotated[
        str, typer.Option(help="Base model: hf://organization/name, another URI, or a local folder.")
    ] = "hf://HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset: Annotated[
        str, typer.Option("--dataset", "--data", help="Training data: a URI or a local file.")
    ] = "s3://my-bucket/train.jsonl",
    to: Annotated[
        str | None, typer.Option("--to", help="URI prefix or folder for the result; default: out for local data.")
    ] = None,
    secret: Annotated[str, typer.Option(help="Name of the Secret with the S3 credentials.")] = "s3-credentials",  # noqa: S107 (a name)
    gpus: Annotated[
        int | None,
        typer.Option(min=0, max=16, help="GPUs of the training pod; 0: the CPU. Default: 1, or what is there."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a first manifest, with the description of each field."""
    console = Console(stderr=True)
    to_absolute_path(f"./{file}" if file.startswith("~") else file, "FILE")  # the shell has expanded what it can
    try:
        chosen, notes = choose_fields(InitOptions(model, dataset, to, secret, gpus), _folder_of(file))
        text = write_manifest(name, chosen, notes)
        [document] = parse_documents(text, "the new manifest")
        parse_manifest(resolve_local_paths(document, _folder_of(file)), COMMON_RULES)
    except (ManifestError, YamlError, PreviewError) as error:
        exit_error_without_remedy(
            console, None, escape_line(str(error)) if isinstance(error, PreviewError) else str(error)
        )
    if file == STDIN:
        echo(text, nl=False)
        return
    if os.path.lexists(file) and not force:  # also a link to nothing, through which somebody else's file would be made
        exit_error_without_remedy(console, None, f"{file} already exists; choose another name, or use --force")
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        exit_error_without_remedy(console, None, f"cannot write {file}: {error.strerror}; choose another name")
    word = f"./{file}" if file.startswith("-") else file
    is_local = bool(local_fields(resolve_local_paths(document, _folder_of(file)).value))
    steps = [shell_command("qlora", "run", word)] if is_local else [
        shell_command("qlora", "plan", word), shell_command("qlora", "submit", word)
    ]  # fmt: skip
    print_line(console, f"wrote {file}; next: {', then '.join(steps)}")


def _folder_of(file: str) -> Path:
    return Path.cwd() if file == STDIN else Path(file).parent


@dataclass(frozen=True)
class InitOptions:
    """Options of `qlora init` that decide about fields."""

    model: str
    dataset: str
    to: str | None
    secret: str
    gpus: int | None


def choose_fields(options: InitOptions, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a new manifest, and notes for its comments, by path below spec.

    Raises:
        PreviewError: The data is a local file that cannot be trained on.

    """
    data = _to_manifest_path("dataset", options.dataset, folder)
    is_local = "://" not in data or data.startswith("file:")
    to = _to_manifest_path("output", options.to or ("out" if is_local else "s3://my-bucket/adapters"), folder)
    model = _to_manifest_path("model", options.model, folder)
    chosen: dict[str, Any] = {
        "model.uri": model, "dataset.uri": data, "output.uri": to, "lora.targets": ["all-linear"],
        "resources.gpusPerNode": options.gpus,
    }  # fmt: skip
    notes: dict[str, str] = {}
    if to.startswith("s3://"):
        chosen["output.secretRef.name"] = options.secret
    if options.gpus is None:
        found = count_gpus() if is_local else 1
        chosen["resources.gpusPerNode"] = min(found, 1)
        if is_local:
            notes["resources.gpusPerNode"] = f"This machine has {found} GPUs that nvidia-smi lists."
    rows = Path(to_display_path(to_local_uri(("spec", "dataset", "uri"), data, folder)))
    with using_path(rows, "--data"):
        is_file = is_local and not rows.is_dir()
    if is_file:
        preview = preview_data(rows)
        notes["dataset.uri"] = f"{preview}."
        chosen |= _choose_for(preview)
    if (longest := _longest_of_model(model, folder)) and longest < default_of("training.maxLength"):
        chosen["training.maxLength"] = longest
        notes["training.maxLength"] = f"The model takes {longest:,} tokens."
    return chosen, notes


def _choose_for(preview: DataPreview) -> dict[str, Any]:
    """Return settings for few rows: enough of them held out, and several steps per epoch."""
    chosen: dict[str, Any] = {}
    if preview.complete and preview.rows < FEW_ROWS:
        chosen["dataset.evaluation.fraction"] = 0.2
    if preview.complete and preview.rows < FEW_ROWS // 4:
        chosen["training.globalBatchSize"] = 4
    return chosen


def _to_manifest_path(block: str, text: str, folder: Path) -> str:
    """Return a URI as it is, a name of the hub as hf://, and a local path relative to the manifest's folder."""
    if "://" in text:
        return text
    uri = to_local_uri(("spec", block, "uri"), text, Path.cwd())
    if not uri.startswith("file://"):
        return f"hf://{text}" if block == "model" and text.count("/") == 1 else text
    path = to_display_path(uri)
    relative = os.path.relpath(path, folder.resolve())
    shown = path if relative.startswith("..") and Path(text).is_absolute() else relative
    return shown + ("/" if text.endswith("/") else "")


def _longest_of_model(model: str, folder: Path) -> int | None:
    """Return the most tokens that a model takes, if its config.json is on this machine."""
    uri = to_local_uri(("spec", "model", "uri"), model, folder)
    try:
        config = load_config(ModelSpec(uri=uri), None, None)
    except (NoConfigError, ValidationError):
        return None
    longest = config.get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest >= MIN_LENGTH else None


def write_manifest(name: str, chosen: Mapping[str, Any], notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return a manifest with the given values, and the defaults of all other shown fields.

    Args:
        name: Name of the QLoRAJob.
        chosen: Values by path below spec, such as `model.uri`.
        notes: What was found out about fields, for their comments.

    """
    lines = [f"apiVersion: {names.API_VERSION}", f"kind: {names.KIND}", "metadata:", f"  name: {_scalar(name)}"]
    return "\n".join((f"# {HEADER_COMMENT}", *lines, "spec:", *_fields(chosen, notes))) + "\n"


def _fields(chosen: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[str]:
    parents: tuple[str, ...] = ()
    for path in SHOWN_FIELDS:
        if path in SHOWN_IF_CHOSEN and path not in chosen:
            continue
        *above, last = path.split(".")
        shared = next((depth for depth, (a, b) in enumerate(zip(parents, above, strict=False)) if a != b), len(parents))
        for depth, parent in enumerate(above):
            if depth >= shared:
                yield f"{_indent(depth)}{parent}:"
        parents = tuple(above)
        yield from _comment(path, notes.get(path), _indent(len(above)))
        yield f"{_indent(len(above))}{last}: {_scalar(chosen[path] if path in chosen else default_of(path))}"


def _indent(depth: int) -> str:
    return "  " * (depth + 1)


def _comment(path: str, note: str | None, indent: str) -> Iterator[str]:
    field = field_at(("spec", *path.split(".")), JobManifest)
    text = " ".join(filter(None, (field.description if field else None, note and escape_line(note))))
    for line in textwrap.wrap(text, WIDTH - len(indent) - 2):
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
