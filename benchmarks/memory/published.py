"""GPU memory peaks published by other trainers, compared with the planner's prediction for ours."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qlora_api.optimizers import OptimizerName
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.memory.estimate import Layout, MemoryEstimate, SequenceLengths, TrainingWorkload, estimate_memory
from qlora_planner.models.families import read_shape

_CONFIGS: Final = Path(__file__).parents[2] / "tests/unit/planner/configs"
_GIB: Final = 2**30
_GB: Final = 10**9
_TORCHTUNE: Final = "[torchtune](https://github.com/pytorch/torchtune#memory-and-training-speed)"
_LITGPT: Final = "[LitGPT](https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md)"
_UNSLOTH: Final = "[Unsloth](https://docs.unsloth.ai/basics/unsloth-benchmarks)"
_QLORA: Final = "[QLoRA](https://arxiv.org/abs/2305.14314)"
_EVERYTHING: Final[dict[str, Any]] = {"targets": ["all-linear"]}


@dataclass(frozen=True)
class Published:
    """One published peak, and our closest equivalent of its run."""

    source: str
    what: str
    theirs: float
    """Bytes as published: of torch's allocator, or of the smallest GPU that fits the run."""
    config: str | Mapping[str, Any]
    tokens: int
    rows: int = 1
    method: str = "qlora"
    lora: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: bool = True
    optimizer: OptimizerName = "adamw"
    why: str = ""

    def ours(self) -> MemoryEstimate:
        """Return the planner's estimate for the run."""
        spec = QLoRAJobSpec.model_validate(
            {
                "model": {"uri": "hf://a/model"},
                "dataset": {"uri": "hf://datasets/a/rows/train.jsonl"},
                "output": {"uri": "s3://bucket/a"},
                "method": self.method,
                "quantization": {"bits": 4 if self.method == "qlora" else 16},
                "lora": {"dropout": 0.0, **self.lora},
                "training": {"maxLength": self.tokens, "packing": False, "globalBatchSize": self.rows},
            }
        )
        work = TrainingWorkload(spec, read_shape(_config(self.config)), SequenceLengths(self.tokens, self.tokens))
        return estimate_memory(
            work, Layout(micro_batch=self.rows, checkpointing=self.checkpointing, optimizer=self.optimizer)
        )


def _config(config: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, str):
        read: Mapping[str, Any] = json.loads((_CONFIGS / f"{config}.json").read_text())
        return read
    return config


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> Mapping[str, Any]:
    """Return the shape of a Llama 1 or Llama 2 model."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 32_000,
    }


_LLAMA_7B: Final = _llama(4096, 11_008, 32, 32)
_LLAMA_13B: Final = _llama(5120, 13_824, 40, 40)
_LLAMA_65B: Final = _llama(8192, 22_016, 80, 64)
_QV: Final[Mapping[str, Any]] = {"rank": 8, "targets": ["q_proj", "v_proj"]}

_ALL_LOGITS: Final = "logits of all 128,256 tokens at once in fp32; ours are computed in chunks"
_BF16: Final = "adapters in bf16 without autocast; PyTorch 2.1"
_OLD: Final = f"{_BF16}; bitsandbytes 0.41 saved the inputs of frozen layers (until 0.43.2, its #1270)"
PUBLISHED: Final = (
    Published(
        _QLORA,
        "65B, r64, 1 x 512 tokens",
        48 * _GB,
        _LLAMA_65B,
        512,
        lora=_EVERYTHING | {"rank": 64},
        optimizer="pagedAdamw",
        why='"on a single 48GB GPU": an upper bound; adapters in bf16',
    ),
    Published(
        _TORCHTUNE,
        "Llama-3.1-8B QLoRA, 2 x 2048",
        7.4 * _GIB,
        "llama-3.1-8b",
        2048,
        2,
        lora=_EVERYTHING | {"rank": 8},
        why="compiled, adapters and optimizer in bf16; ours: adapters in fp32, 16-bit embedding and head",
    ),
    Published(
        _TORCHTUNE,
        "Llama-3.1-8B LoRA, 2 x 2048, 4090",
        16.2 * _GIB,
        "llama-3.1-8b",
        2048,
        2,
        "lora",
        _EVERYTHING | {"rank": 8},
        why="compiled, everything in bf16",
    ),
    Published(
        _LITGPT,
        "Llama-2-7B NF4 with double quantization, 1 x 1304",
        13.84 * _GB,
        _LLAMA_7B,
        1304,
        lora=_QV,
        checkpointing=False,
        why=_OLD,
    ),
    Published(
        _LITGPT,
        "Llama-2-7B bf16, 1 x 1304",
        21.30 * _GB,
        _LLAMA_7B,
        1304,
        1,
        "lora",
        _QV,
        checkpointing=False,
        why=_BF16,
    ),
    Published(
        _LITGPT,
        "Llama-2-7B bf16, 2 x 1304",
        29.07 * _GB,
        _LLAMA_7B,
        1304,
        2,
        "lora",
        _QV,
        checkpointing=False,
        why=_BF16,
    ),
    Published(
        _LITGPT,
        "Llama-2-13B NF4 with double quantization, 1 x 1304",
        22.55 * _GB,
        _LLAMA_13B,
        1304,
        lora=_QV,
        checkpointing=False,
        why=_OLD,
    ),
    Published(
        _LITGPT,
        "Llama-2-13B bf16, 1 x 1304",
        38.12 * _GB,
        _LLAMA_13B,
        1304,
        1,
        "lora",
        _QV,
        checkpointing=False,
        why=_BF16,
    ),
    *(
        Published(
            _UNSLOTH,
            f"Llama-3.1-8B QLoRA r32 with Hugging Face and FlashAttention, 1 x {tokens}",
            size * _GB,
            "llama-3.1-8b",
            tokens,
            lora=_EVERYTHING | {"rank": 32},
            why=_ALL_LOGITS,
        )
        for size, tokens in ((12, 932), (16, 2551), (24, 5789), (40, 12_264))
    ),
    *(
        Published(
            _UNSLOTH,
            f"Llama-3.1-8B QLoRA r32 with Unsloth, 1 x {tokens}",
            size * _GB,
            "llama-3.1-8b",
            tokens,
            lora=_EVERYTHING | {"rank": 32},
            why="checkpoints in host memory, own kernels",
        )
        for size, tokens in ((8, 2972), (12, 21_848))
    ),
)


def write_published() -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            "# GPU memory peaks published by others, and our predictions",
            "",
            "In GiB. This project measured none of these on a GPU: the published values are of other trainers, and "
            "the last column lists the known differences. *Tensors* is the memory allocated by torch, as LitGPT and "
            "torchtune report it; *the GPU* adds CUDA context, workspace and fragmentation. Unsloth gives the "
            "smallest GPU that fits a length.",
            "",
            "| source | run | published | ours: tensors | of which activations | ours: the GPU | what differs |",
            "|---|---|---|---|---|---|---|",
            *(_row(each) for each in PUBLISHED),
            "",
        ]
    )


def _row(each: Published) -> str:
    ours = each.ours()
    sizes = (f"{size / _GIB:.1f}" for size in (each.theirs, ours.allocated, ours.activations, ours.peak))
    return f"| {' | '.join((each.source, each.what, *sizes, each.why))} |"
