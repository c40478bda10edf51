"""The name of a result: a digest of everything that decides it, and of nothing else."""

import hashlib
import json
from typing import Any, Final

from qlora_api import __version__
from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec, TrainingSpec

_DIGITS: Final = 16


def result_digest(spec: QLoRAJobSpec, model: ModelStatus, dataset: DataStatus) -> str:
    """Return 16 hex digits; what does not change a result is left out.

    Output, resources, names and deadlines do not; where the held-out rows lie does not either, only which they are,
    and the dataset's digest covers them, as it does templates and weights: it is over rendered rows, as often as seen.
    """
    decisive = {
        "model": {"uri": model.uri, "commit": model.commit},
        "dataset": {
            "digest": dataset.digest,
            "format": dataset.format,
            "chatTemplate": spec.dataset.chat_template,
        },
        "method": spec.method,
        "quantization": spec.quantization.model_dump(mode="json"),
        "lora": None if spec.method == "full" else spec.lora.model_dump(mode="json"),
        "training": _decisive(spec.training),
        "trainer": __version__,
    }
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGITS]


def _decisive(training: TrainingSpec) -> dict[str, Any]:
    """Return the recipe; looks at the held-out rows change nothing unless something is chosen by them."""
    looks_decide = training.early_stopping is not None or training.keep == "best"
    return training.model_dump(mode="json", exclude=None if looks_decide else {"evaluate_every"})
