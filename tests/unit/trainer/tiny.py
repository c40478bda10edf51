"""A tiny random model, its tokenizer, rows and configurations for trainer tests, without network access."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_api.prepared import Prepared
from qlora_api.runconfig import Platform, PrepareConfig, RunConfig
from qlora_api.v1alpha1 import Plan, Progress, QLoRAJobSpec

CPU = torch.device("cpu")
COLORS = ("red", "green", "blue", "white", "black", "grey")
THINGS = ("sky", "grass", "snow", "coal", "rose", "sea", "stone", "leaf")


def instruction_rows(count: int = 40) -> list[dict[str, str]]:
    """Rows of different lengths."""
    return [
        {
            "instruction": f"What colour has the {THINGS[number % 8]} number {number}?" + " Please say." * (number % 3),
            "output": f"It is {COLORS[number % 6]}" + ", indeed" * (number % 4) + ".",
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    """Write rows as JSON lines and return their URI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"file://{path}"


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose end token is also its padding token, as in many real ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(row.values()) for row in instruction_rows(48)] + ["### Instruction:\n\n### Response:\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


SMALL: Final[dict[str, Any]] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Sizes of a model that takes a step in milliseconds."""


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"tie_word_embeddings": True} | changes)).eval()


def write_model(folder: Path, **changes: Any) -> str:
    """Write model and tokenizer in the Hugging Face format and return the URI."""
    make_model(**changes).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return f"file://{folder}"


def make_spec(model: str, dataset: str, output: str, /, **blocks: Any) -> QLoRAJobSpec:
    """A valid spec with some blocks changed."""
    spec: dict[str, Any] = {
        "model": {"uri": model},
        "dataset": {"uri": dataset, "evaluation": {"fraction": 0.2}},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {"epochs": 1, "globalBatchSize": 8, "learningRate": 0.01, "maxLength": 64},
        "evaluation": {"generations": 2},
        "output": {"uri": output},
    }
    for name, block in blocks.items():
        spec[name] = {**spec.get(name, {}), **block} if isinstance(block, dict) else block
    return QLoRAJobSpec.model_validate(spec)


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on localhost while the context is open, and yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_job(folder: Path, **blocks: Any) -> QLoRAJobSpec:
    """Write model and rows into a folder, and return a spec that reads them and publishes next to them."""
    model = write_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", instruction_rows())
    return make_spec(model, rows, f"file://{folder / 'output'}", **blocks)


def prepare_config(spec: QLoRAJobSpec, job: str = "colours", platform: Platform | None = None) -> PrepareConfig:
    """The configuration of a prepare pod."""
    return PrepareConfig(namespace="ml", job=job, spec=spec, platform=platform or Platform())


def run_config(spec: QLoRAJobSpec, prepared: Prepared, job: str = "colours", **plan: Any) -> RunConfig:
    """The configuration of a training pod."""
    settings = {
        "device": "cpu",
        "nodes": 1,
        "gpus_per_node": 0,
        "micro_batch_size": 4,
        "gradient_accumulation": 2,
        "total_steps": 4,
        "reasons": ("a test",),
    }
    return RunConfig(namespace="ml", job=job, attempt=1, spec=spec, plan=Plan(**settings | plan), prepared=prepared)


class RecordingSink:
    """Records every progress report and every log line."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self.notes: list[str] = []
        self.metrics = ""
        """The Prometheus metrics, if a test stores them."""

    def report(self, progress: Progress) -> None:
        self.seen.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)
