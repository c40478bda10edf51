"""The name of a result: a digest of everything that decides it, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlora_api import __version__
from qlora_api.steps import total_steps, warmup_steps
from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec, QuantizationSpec

_DIGITS: Final = 16
_IN_THE_ROWS: Final = frozenset({"loss", "max_length", "long_rows"})
"""Settings that have done their work once there are token rows."""
_IN_THE_STEPS: Final = frozenset({"epochs", "max_steps", "warmup_ratio"})
"""Settings that only say how many steps there are."""
_DIVISION: Final = frozenset({"micro_batch_size", "packing"})
"""How a step's rows are divided into passes: a step is the same rows with the same weights, on any device."""


@dataclass(frozen=True)
class Resolved:
    """What a manifest's words came to for its model and its rows."""

    model: ModelStatus
    dataset: DataStatus
    rows: str
    """Digest of the token rows."""
    adapter: Mapping[str, Any]
    """Rank and scale of each module, and what else makes an adapter; empty with method full."""
    chat_template: str | None
    """What is published instead of the model's own."""


def result_digest(spec: QLoRAJobSpec, resolved: Resolved) -> str:
    """Return 16 hex digits; what does not change a result is left out.

    It is over what a manifest comes to and not over its words, so that `auto` and what it chooses are one run. Output,
    resources, names and deadlines do not count, nor does where rows lie: the dataset's digest is over rendered rows, as
    often as they are seen, and that of the token rows over what of them is learned and asked.
    """
    model, dataset = resolved.model, resolved.dataset
    decisive = {
        "model": {"uri": model.uri, "commit": model.commit},
        "dataset": {"digest": dataset.digest, "format": dataset.format, "chatTemplate": resolved.chat_template},
        "rows": resolved.rows,
        "method": spec.method,
        "quantization": _storage(spec.quantization),
        "lora": resolved.adapter,
        "training": _recipe(spec, dataset.training_rows),
        "trainer": __version__,
    }
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGITS]


def _storage(quantization: QuantizationSpec) -> dict[str, Any]:
    """Return how the base is stored; the data type and the scales are those of 4 bits."""
    return quantization.model_dump(mode="json", include=None if quantization.bits == 4 else {"bits"})


def _recipe(spec: QLoRAJobSpec, rows: int) -> dict[str, Any]:
    """Return the recipe; looks at the held-out rows change nothing unless something is chosen by them."""
    training, total = spec.training, total_steps(spec.training, rows)
    looks_decide = training.early_stopping is not None or training.keep == "best"
    idle = frozenset() if looks_decide else frozenset({"evaluate_every"})
    settings = training.model_dump(mode="json", exclude={*_IN_THE_ROWS, *_IN_THE_STEPS, *_DIVISION, *idle})
    # For an adapter auto is AdamW on every device; with method full it depends on the memory that is free there.
    chosen = {"optimizer": "adamw"} if training.optimizer == "auto" and spec.method != "full" else {}
    return settings | chosen | {"steps": total, "warmup_steps": warmup_steps(training, total)}
