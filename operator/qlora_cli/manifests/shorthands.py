"""Says which line to write for a value of the wrong shape, such as `model: organization/name`."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from qlora_cli.manifests.yaml_hints import RENDER_FIRST, has_template

Location = tuple[str | int, ...]
_WORD: Final = re.compile(r"[A-Za-z0-9_./:@-]+(?<!:)")
_PLACEHOLDER: Final = re.compile(r"\$\{?\(?[A-Za-z_][A-Za-z0-9_]*\)?\}?|<[A-Za-z_ -]+>")
_NUMBER: Final = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_HUB_PAGE: Final = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/")
_HUB_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+")
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*):(/*)(.+)")
_QUOTES: Final = "\u201c\u201d\u201e\u201f\u2018\u2019"
LOCAL_OR_S3: Final = "copy it to s3://, or to a local file for qlora run"


def to_yaml_value(value: Any) -> str:
    """Format a value as YAML in one line, as people write it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {to_yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_yaml_value, value)) + "]"
    if isinstance(value, str) and _WORD.fullmatch(value) and not _NUMBER.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def unresolved(value: Any) -> str | None:
    """Return what to do with a value that another program has to fill in, or None."""
    if isinstance(value, str) and has_template(value):
        return RENDER_FIRST
    if isinstance(value, str) and (found := _PLACEHOLDER.fullmatch(value.strip())):
        return f"{found[0]} is a placeholder; write the value, or fill it in first, such as with envsubst"
    if isinstance(value, str) and set(value) & set(_QUOTES):
        return 'has typographic quotes; write straight ones, ", or none'
    return None


def uri_to_write(field: str, text: str) -> str:
    """Return what to write for a URI without a known scheme."""
    block = field.split(".")[1]
    if page := _HUB_PAGE.match(text):
        return _hub_uri(text[page.end() :], is_model=block == "model")
    found = _SCHEME.fullmatch(text)
    if found and (wanted := _scheme_to_write(block, *found.groups())):
        return wanted
    if "://" in text:
        text = {"model": "model", "dataset": "train.jsonl", "output": "out"}[block]
    path = text if text.startswith(("/", ".")) else f"./{text}"
    is_name = _HUB_NAME.fullmatch(text)
    if block == "model":
        return f"write hf://{text if is_name else 'organization/name'}, or {path} for a local folder"
    if block == "output":
        return f"write s3://{text if is_name else 'bucket/prefix'}, or {path} for a local folder"
    wanted = f"hf://datasets/{text}/FILE" if is_name and "." not in text else f"s3://bucket/{text.lstrip('./')}"
    return f"write {wanted}, or {path} for a local file or folder"


def _scheme_to_write(block: str, scheme: str, slashes: str, rest: str) -> str | None:
    if scheme in {"hf", "s3", "pvc"} and not rest.strip("/"):
        return None
    if scheme in {"hf", "s3", "pvc"} and slashes != "//":
        return f"write {scheme}://{rest}"
    if scheme in {"huggingface", "hub"}:
        return _hub_uri(rest, is_model=block == "model")
    if scheme in {"pvc", "hf"} and block == "output":
        return "a result is published to a bucket; write s3://bucket/prefix"
    if scheme == "pvc":
        return "write pvc://claim/path; the name of a claim has lower-case letters, digits, dots and hyphens"
    return f"{scheme}:// is not read; {LOCAL_OR_S3}" if slashes else None


def _hub_uri(rest: str, *, is_model: bool) -> str:
    rest = re.sub(r"/(tree|blob|resolve)/([^/]+)", "", rest.strip("/"))
    if is_model and not rest.startswith("datasets/"):
        return f"write hf://{'/'.join(rest.split('/')[:2])}"
    name, _, file = rest.removeprefix("datasets/").partition("/")
    return f"write hf://datasets/{name}/{file if '/' in file else f'{file}/FILE'}"


def _with_uri(name: str, example: str) -> Callable[[Any], str | None]:
    def write(value: Any) -> str | None:
        if isinstance(value, str):
            return f"{name}: {{uri: {_as_uri(name, value)}}}"
        if isinstance(value, list) and name == "dataset" and value:
            return f"dataset: {{sources: {to_yaml_value([_as_source(item) for item in value])}}}"
        return f"{name}: {{uri: {example}}}"

    return write


def _as_source(item: Any) -> Any:
    return {"uri": _as_uri("dataset", item)} if isinstance(item, str) else item


def _as_uri(block: str, text: str) -> str:
    if "://" in text or text.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(text):
        return to_yaml_value(text)
    scheme = {"model": "hf://", "dataset": "hf://datasets/", "output": "s3://"}[block]
    is_file = block == "dataset" and "." in text.rsplit("/", 1)[1]
    return text if is_file else f"{scheme}{text}{'/FILE' if block == 'dataset' else ''}"


def _quantization(value: Any) -> str:
    bits = "8" if "8" in str(value) else "16" if "16" in str(value) or value is False else "4"
    return f"quantization: {{bits: {bits}}}"


def _evaluation(value: Any) -> str:
    key = "uri" if isinstance(value, str) else "fraction"
    return f"evaluation: {{{key}: {to_yaml_value(value) if isinstance(value, (str, float)) else '0.05'}}}"


def _number(name: str, field: str, default: int) -> Callable[[Any], str]:
    def write(value: Any) -> str:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return f"{name}: {{{field}: {value if is_number else default}}}"

    return write


def _tracking(value: Any) -> str:
    if "mlflow" in str(value).lower():
        return "tracking: {mlflow: {uri: https://HOST, experiment: NAME}}"
    return "tracking: {wandb: {project: NAME, secretRef: {name: SECRET}}}"


def _name(field: str) -> Callable[[Any], str]:
    return lambda value: f"{field}: {{name: {value if isinstance(value, str) else 'NAME'}}}"


_LINES: Final[Mapping[str, Callable[[Any], str | None]]] = {
    "spec.model": _with_uri("model", "hf://organization/name"),
    "spec.dataset": _with_uri("dataset", "s3://bucket/train.jsonl"),
    "spec.output": _with_uri("output", "s3://bucket/prefix"),
    "spec.quantization": _quantization,
    "spec.dataset.evaluation": _evaluation,
    "spec.lora": _number("lora", "rank", 16),
    "spec.resources": _number("resources", "gpusPerNode", 1),
    "spec.training": _number("training", "epochs", 3),
    "spec.training.earlyStopping": _number("earlyStopping", "patience", 3),
    "spec.retries": _number("retries", "maxAttempts", 5),
    "spec.checkpoint": lambda value: f"checkpoint: {{every: {value if isinstance(value, str) else '10m'}}}",
    "spec.deadlines": lambda value: f"deadlines: {{total: {value if isinstance(value, str) else '24h'}}}",
    "spec.queue": _name("queue"),
    "spec.tracking": _tracking,
    "spec.tracking.wandb": lambda value: f"wandb: {{project: {value if isinstance(value, str) else 'NAME'}}}",
    "spec.dataset.template": lambda _value: "template: {prompt: 'Q: {question}', answer: ' {answer}'}",
    "metadata": _name("metadata"),
}


def line_to_write(location: Location, path: str, value: Any) -> str | None:
    """Return the line for a block that has a single value instead of fields, or None."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return f"{location[-1]}: {to_yaml_value(value[0])}, without the '-'"
    if str(location[-1]) == "secretRef":
        return _name("secretRef")(value)
    write = _LINES.get(path)
    return write(value) if write else None


def list_to_write(name: str, value: Any) -> str | None:
    """Return the line for a list of which somebody wrote the single entry, or None."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
        return f"{name}: {to_yaml_value(parts)}"
    if isinstance(value, dict):
        return f"{name}: [{to_yaml_value(value)}]"
    return None


def number_to_write(value: Any) -> str | None:
    """Return the number inside quotes, or None."""
    return value.strip() if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else None


def text_to_write(name: str, value: Any) -> str | None:
    """Return the text to write for a number, with its unit where the field has one, or None."""
    if isinstance(value, list) and name == "uri" and value and all(isinstance(item, str) for item in value):
        return f"sources: {to_yaml_value([{'uri': item} for item in value])}, instead of uri"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name}: {value['name']}" if isinstance(value, dict) and "name" in value else None
    if name == "memory":
        return f"{value}Gi"
    if name in {"startup", "total", "heartbeat", "ttl", "every"}:
        return f"a number and a unit, such as {value}h"
    return f'"{value}"'
