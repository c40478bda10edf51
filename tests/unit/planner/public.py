"""Configurations of public models, and the classes that transformers builds from them."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGS: Final = Path(__file__).parent / "configs"
NAMES: Final = sorted(path.stem for path in CONFIGS.glob("*.json"))


def load_config(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return content


def build(config: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """The class that the trainer would load, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
