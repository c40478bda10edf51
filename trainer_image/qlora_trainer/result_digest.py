"""The digest that names a result: of every setting that determines it, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlora_api import __version__
from qlora_api.optimizers import ADAMW
from qlora_api.steps import total_steps, warmup_steps
from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec

_DIGITS: Final = 16
_ROW_SETTINGS: Final = "the digest of the token rows includes its effect"
_STEP_COUNT_SETTINGS: Final = "it only determines the number of steps, which is in the digest"
_IN_THE_MODULES: Final = "rank and scale of each module are in the digest, however the manifest sets them"
_BATCHING_SETTINGS: Final = "a step has the same rows and weights, however it is split into micro-batches and processes"
_ACCESS: Final = "it gives access to a source, whose content is in the digest"
LEFT_OUT: Final[Mapping[str, str]] = {
    "class_name": "it says how pods run, and when",
    "model.revision": "the commit that it was resolved to is in the digest",
    "model.secret_ref": _ACCESS,
    "dataset.uri": _ROW_SETTINGS,
    "dataset.sources": _ROW_SETTINGS,
    "dataset.format": "the detected format of the rows is in the digest",
    "dataset.template": _ROW_SETTINGS,
    "dataset.chat_template": "it is in the digest unless it is the model's own",
    "dataset.on_invalid_row": _ROW_SETTINGS,
    "dataset.secret_ref": _ACCESS,
    "dataset.evaluation": _ROW_SETTINGS,
    "dataset.max_samples": _ROW_SETTINGS,
    "lora.rank": _IN_THE_MODULES,
    "lora.alpha": _IN_THE_MODULES,
    "lora.rank_pattern": _IN_THE_MODULES,
    "lora.alpha_pattern": _IN_THE_MODULES,
    "lora.targets": _IN_THE_MODULES,
    "lora.modules_to_save": "the modules that it names are in the digest, by their paths",
    "training.epochs": _STEP_COUNT_SETTINGS,
    "training.max_steps": _STEP_COUNT_SETTINGS,
    "training.warmup_ratio": _STEP_COUNT_SETTINGS,
    "training.micro_batch_size": _BATCHING_SETTINGS,
    "training.packing": _BATCHING_SETTINGS,
    "training.loss": _ROW_SETTINGS,
    "training.max_length": _ROW_SETTINGS,
    "training.long_rows": _ROW_SETTINGS,
    "resources": _BATCHING_SETTINGS,
    "distribution": _BATCHING_SETTINGS,
    "checkpoint": "a resumed run takes the same steps",
    "tracking": "it shows a run and does not change it",
    "evaluation": "it measures a result and does not change it",
    "output": "it says where a result is published",
    "retries": "a resumed run takes the same steps",
    "deadlines": "a run ends in time, or has no result",
    "queue": "it says when a run starts",
    "suspend": "a resumed run takes the same steps",
    "ttl": "it says when pods are deleted",
}
"""Fields of the spec that are not in the digest, each with its reason; all others are in it, new ones included."""

_OF_4_BITS: Final = frozenset({"type", "double_quant"})
"""Fields of spec.quantization that have no effect with 8 or 16 bits."""


@dataclass(frozen=True)
class ResolvedSpec:
    """Values of a manifest resolved for its model and rows."""

    model: ModelStatus
    dataset: DataStatus
    rows_digest: str
    """Digest of the token rows."""
    adapter: Mapping[str, Any]
    """Rank and scale of each module, and the fully trained modules; empty with method full."""
    chat_template: str | None
    """Published instead of the model's own; None keeps that."""


def result_digest(spec: QLoRAJobSpec, resolved: ResolvedSpec) -> str:
    """Return the first 16 hex digits of the full digest, which name the result."""
    return full_digest(spec, resolved)[:_DIGITS]


def full_digest(spec: QLoRAJobSpec, resolved: ResolvedSpec) -> str:
    """Return 64 hex digits; settings that do not change a result are left out.

    The digest covers resolved values, so that `auto` and the value it resolves to give the same result. Output,
    resources, names and deadlines are not in it, nor are the URIs of the rows: the dataset's digest covers the rendered
    rows with their repetitions, and the digest of the token rows covers their labels and prompts.
    """
    model, dataset = resolved.model, resolved.dataset
    fields = _fields(spec)
    determining = fields | {
        "model": fields["model"] | {"commit": model.commit},
        "dataset": fields["dataset"]
        | {"digest": dataset.digest, "format": dataset.format, "chatTemplate": resolved.chat_template},
        "rows": resolved.rows_digest,
        "quantization": _quantization_settings(fields["quantization"]),
        "lora": {} if spec.method == "full" else fields["lora"] | resolved.adapter,
        "training": _training_settings(spec, fields["training"], dataset.training_rows),
        "trainer": __version__,
    }
    canonical = json.dumps(determining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _fields(spec: QLoRAJobSpec) -> dict[str, Any]:
    """Return every field of the spec that is in the digest."""
    fields = spec.model_dump(mode="json")
    for path in LEFT_OUT:
        block, _, field = path.rpartition(".")
        del (fields[block] if block else fields)[field]
    return fields


def _quantization_settings(quantization: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization settings that have an effect; data type and double quantization apply to 4 bits only."""
    four_bits = quantization["bits"] == 4
    return {name: value for name, value in quantization.items() if four_bits or name not in _OF_4_BITS}


def _training_settings(spec: QLoRAJobSpec, training: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the training settings; validation has no effect unless it stops the training or selects the checkpoint."""
    total = total_steps(spec.training, rows)
    validation_matters = spec.training.early_stopping is not None or spec.training.keep == "best"
    settings = {name: value for name, value in training.items() if validation_matters or name != "evaluate_every"}
    # For an adapter auto is AdamW on every device; with method full it depends on the free memory of the device.
    optimizer = {"optimizer": ADAMW.name} if spec.training.optimizer == "auto" and spec.method != "full" else {}
    return settings | optimizer | {"steps": total, "warmup_steps": warmup_steps(spec.training, total)}
