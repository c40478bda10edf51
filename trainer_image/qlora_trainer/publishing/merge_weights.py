"""Adapter and base as one model in bf16: merged layer by layer in fp32, saved, loaded again and measured.

The base is the original one, or the one that was trained on: 4-bit weights, dequantised. Nothing is ever merged into
quantised weights: they would be rounded a second time, and coarsely (peft#2321).
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_api.report import AdapterRecord, MergeDifference, MergeReport
from qlora_api.v1alpha1 import MergeBase, QuantizationSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.model.attention import FLASH
from qlora_trainer.model.base_model import load_base
from qlora_trainer.model.loss import token_losses
from qlora_trainer.observability.progress import LogFn, no_log

MERGE_REPORT: Final = "merge.json"
"""Beside the merged model."""
MEASURED_TOKENS: Final = 256
"""Supervised tokens whose logits are compared: 125 MiB in fp32 for a vocabulary of 128,256."""
_UNQUANTIZED: Final = QuantizationSpec(bits=16)


@dataclass(frozen=True)
class MergeTask:
    """What to merge."""

    model: Path
    """Folder of the base as its publisher has it."""
    adapter: Path
    base: MergeBase
    record: AdapterRecord
    rows: Sequence[TokenRow]
    """Held-out rows to measure on; without any, nothing is measured."""

    @property
    def attention(self) -> str:
        """Return the kernel to compute with: merging is done on the CPU, where FlashAttention does not run."""
        return "sdpa" if self.record.attention == FLASH else self.record.attention

    @property
    def dtype(self) -> torch.dtype:
        """Return what the base computed in when the adapter was trained."""
        dtype: torch.dtype = getattr(torch, self.record.dtype)
        return dtype


@dataclass(frozen=True)
class Outputs:
    """What a model says at supervised positions."""

    logits: torch.Tensor
    """[positions, vocabulary], fp32."""
    labels: torch.Tensor
    """The tokens that follow."""


def merge_adapter(task: MergeTask, target: Path, note: LogFn = no_log) -> MergeReport:
    """Write the merged model as anybody loads it, and return how far it is from adapter and base apart."""
    rows = choose_rows(task.rows)
    note(
        f"asking base and adapter apart: {len(rows)} held-out rows" if rows else "there are no held-out rows to compare"
    )
    before = _unmerged_outputs(task, rows) if rows else None
    gc.collect()
    note(f"merging into the {task.base} base, layer by layer")
    save_merged(task, target)
    gc.collect()
    if rows:
        note("asking the merged model")
    after = _merged_outputs(target, rows) if rows else None
    difference = compare_outputs(before, after, len(rows)) if before and after else None
    report = MergeReport(base=task.base, difference=difference)
    (target / MERGE_REPORT).write_text(report.model_dump_json(by_alias=True, indent=2))
    return report


def choose_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return the first rows, as many as have MEASURED_TOKENS in all, or one."""
    chosen: list[TokenRow] = []
    for row in rows:
        if chosen and sum(seen.label_count for seen in chosen) + row.label_count > MEASURED_TOKENS:
            break
        chosen.append(row)
    return chosen


def save_merged(task: MergeTask, target: Path) -> None:
    """Merge and save; embeddings that were one weight stay one."""
    base = load_base(task.model, _UNQUANTIZED, torch.bfloat16, "sdpa", "cpu")
    exact = _dequantized_weights(task) if task.base == "dequantised" else {}
    for name, weight in exact.items():
        base.get_submodule(name).weight.data = weight.to(torch.bfloat16)
    merged = _merge_layers(PeftModel.from_pretrained(base, task.adapter), exact)
    merged.save_pretrained(target)
    AutoTokenizer.from_pretrained(task.adapter).save_pretrained(target)


def _dequantized_weights(task: MergeTask) -> dict[str, torch.Tensor]:
    """Return the weights that the adapter was trained on, by the names of their modules."""
    base = load_base(task.model, task.record.quantization, task.dtype, task.attention, "cpu")
    return {
        name: dequantize_module_weight(module).detach()
        for name, module in base.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
    }


def _merge_layers(peft: Any, exact: dict[str, torch.Tensor]) -> Any:
    """Merge one layer at a time: a sum in bf16 would lose most of a small update, and a whole model in fp32 memory."""
    for name, layer in peft.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            linear = layer.get_base_layer()
            linear.weight.data = exact.get(name, linear.weight.data).float()
            layer.merge(safe_merge=True)
            linear.weight.data = linear.weight.data.to(torch.bfloat16)
    merged = peft.unload().to(torch.bfloat16)
    output = merged.get_output_embeddings()
    if output is not None and output.weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False
    return merged


def _unmerged_outputs(task: MergeTask, rows: Sequence[TokenRow]) -> Outputs:
    base = load_base(task.model, task.record.quantization, task.dtype, task.attention, "cpu")
    with torch.autocast("cpu", task.dtype, enabled=task.dtype == torch.bfloat16):
        return _outputs(PeftModel.from_pretrained(base, task.adapter).eval(), rows)


def _merged_outputs(folder: Path, rows: Sequence[TokenRow]) -> Outputs:
    return _outputs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True), rows)


@torch.no_grad()
def _outputs(model: Any, rows: Sequence[TokenRow]) -> Outputs:
    """Let each row run alone, without padding or packing."""
    logits, labels = [], []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        found = model(input_ids=ids, use_cache=False).logits[0].float()
        for start, end in row.label_spans:
            logits.append(found[start - 1 : end - 1])
            labels.append(ids[0, start:end])
    return Outputs(torch.cat(logits), torch.cat(labels))


def compare_outputs(before: Outputs, after: Outputs, rows: int) -> MergeDifference:
    """Return how far the merged model is from the unmerged one."""
    difference = after.logits - before.logits
    losses = [float(token_losses(outputs.logits, outputs.labels).mean()) for outputs in (before, after)]
    return MergeDifference(
        rows=rows,
        tokens=len(before.labels),
        max_logit=float(difference.abs().max()),
        relative=float(difference.norm() / before.logits.norm()),
        same_choice=float((before.logits.argmax(-1) == after.logits.argmax(-1)).float().mean()),
        unmerged_loss=losses[0],
        merged_loss=losses[1],
    )
