"""What the plan knows of the size of every causal architecture, at its default configuration; writes a page."""

import logging
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families.models import SETTINGS
from qlora_api.model_config import MAX_CONFIG, SIZED_TYPES
from qlora_planner.models.families import read_recorded_shape
from qlora_planner.models.shapes import UnknownModelError
from qlora_trainer.model.module_sizes import describe_size

PAGE: Final = Path(__file__).parents[1] / "results" / "model-sizes.md"
_HEAD: Final = f"""# Sizes of every causal architecture

`python -m benchmarks.families.sizes` writes this page: each architecture that the pinned transformers has a causal
language model of, with the sizes of its default configuration, built without allocating memory. *All* means that
weights and activations are estimated from `config.json`; *weights* that preparation records the sizes of all modules,
of which the plan counts base, adapter, gradients and optimizer exactly
([plan](../../docs/plan.md#every-other-architecture)). *Recorded* are the characters in the status, at most
{MAX_CONFIG:,}.

"""


def main() -> None:
    """Write the page."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    rows = [_row(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    kinds = [known for _, _, known, _ in rows]
    summary = f"{kinds.count('all')} architectures: all. {kinds.count('weights')}: weights; before, nothing.\n"
    others = len(rows) - kinds.count("all") - kinds.count("weights")
    summary += f"{others}: transformers builds no model of the default configuration, which real models replace.\n\n"
    table = "| architecture | weights | known | recorded |\n|---|---|---|---|\n"
    PAGE.write_text(_HEAD + summary + table + "".join(f"| {' | '.join(row)} |\n" for row in rows))


def _row(model_type: str) -> tuple[str, str, str, str]:
    try:
        model = _build(model_type)
    # transformers raises whatever Python raises for a default configuration that lacks something.
    except Exception:
        return f"`{model_type}`", "", "no model", ""
    weights = sum(weight.numel() for weight in model.parameters())
    if model_type in SIZED_TYPES:
        return f"`{model_type}`", f"{weights:,}", "all", ""
    recorded = describe_size(model, {"model_type": model_type})
    return f"`{model_type}`", f"{weights:,}", _known(recorded, weights), str(len(recorded))


def _known(recorded: str, weights: int) -> str:
    try:
        shape = read_recorded_shape(recorded)
    except UnknownModelError as error:
        return str(error)
    return "weights" if shape.parameters == weights else f"{shape.parameters:,} weights"


def _build(model_type: str) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


if __name__ == "__main__":
    main()
