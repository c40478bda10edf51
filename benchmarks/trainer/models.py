"""Models with the shapes of well-known ones and random weights: speed does not depend on the weights."""

import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

CACHE: Final = Path.home() / ".cache" / "qlora-operator" / "random-models"
_LLAMA: Final[dict[str, Any]] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "Llama-3.2-3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


def make_random_model(name: str, tokenizer: Path) -> Path:
    """Return the folder of a model of a known shape, created if missing; the tokenizer is another model's."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    print(f"making {name} with random weights in {folder}")
    partial = folder.with_name(f"{name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = LlamaConfig(**_LLAMA | SHAPES[name])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(partial)
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copyfile(file, partial / file.name)
    del model
    torch.cuda.empty_cache()
    return partial.rename(folder)
