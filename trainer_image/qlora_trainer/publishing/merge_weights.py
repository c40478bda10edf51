"""Merges an adapter into its base as one bf16 model: layer by layer in fp32, then saved, reloaded and measured.

The base is the original one, or the one used in training: 4-bit weights, dequantized. Nothing is merged into quantized
weights: that would round them a second time, to 4 bits (peft#2321).
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
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from qlora_api.report import AdapterRecord, MergeDifference, MergeReport
from qlora_api.v1alpha1 import MergeBase, QuantizationSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.inference.compatibility import check_adapter_config
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.model.attention import FLASH
from qlora_trainer.model.base_model import load_base
from qlora_trainer.model.generation_config import read_stop_tokens, save_model, write_generation_config
from qlora_trainer.model.loss import token_losses
from qlora_trainer.model.weight_check import reading_model
from qlora_trainer.observability.progress import LogFn, no_log

MERGE_REPORT: Final = "merge.json"
"""In the folder of the merged model."""
MEASURED_TOKENS: Final = 256
"""Supervised tokens whose logits are compared: 125 MiB in fp32 for a vocabulary of 128,256."""
_UNQUANTIZED: Final = QuantizationSpec(bits=16)


@dataclass(frozen=True)
class MergeTask:
    """An adapter, its base and the rows to measure the merge on."""

    model: Path
    """Folder with the original, unquantized base."""
    adapter: Path
    base: MergeBase
    record: AdapterRecord
    rows: Sequence[TokenRow]
    """Held-out rows to compare logits on; if there are none, nothing is measured."""

    @property
    def attention(self) -> str:
        """Return the attention implementation: merging runs on the CPU, which FlashAttention does not support."""
        return "sdpa" if self.record.attention == FLASH else self.record.attention

    @property
    def dtype(self) -> torch.dtype:
        """Return the compute dtype of the base during training."""
        dtype: torch.dtype = getattr(torch, self.record.dtype)
        return dtype


@dataclass(frozen=True)
class Outputs:
    """Logits and labels of a model at supervised positions."""

    logits: torch.Tensor
    """[positions, vocabulary], fp32."""
    labels: torch.Tensor
    """[positions], the next tokens."""


def merge_adapter(task: MergeTask, target: Path, note: LogFn = no_log) -> MergeReport:
    """Write the merged model in the transformers format, and return its difference from the unmerged model."""
    check_adapter_config(task.adapter)
    rows = choose_rows(task.rows)
    note(
        f"evaluating base and adapter unmerged on {len(rows)} held-out rows"
        if rows
        else "there are no held-out rows to compare"
    )
    before = _unmerged_outputs(task, rows) if rows else None
    gc.collect()
    note(f"merging into the {task.base} base, layer by layer")
    save_merged(task, target)
    gc.collect()
    if rows:
        note("evaluating the merged model")
    after = _merged_outputs(target, rows) if rows else None
    difference = compare_outputs(before, after, len(rows)) if before and after else None
    report = MergeReport(base=task.base, difference=difference)
    (target / MERGE_REPORT).write_text(report.model_dump_json(by_alias=True, indent=2))
    return report


def choose_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return the first rows with at most MEASURED_TOKENS labels in total, but at least one row."""
    chosen: list[TokenRow] = []
    for row in rows:
        if chosen and sum(other.label_count for other in chosen) + row.label_count > MEASURED_TOKENS:
            break
        chosen.append(row)
    return chosen


def save_merged(task: MergeTask, target: Path) -> None:
    """Merge and save the model with its tokenizer."""
    tokenizer = load_tokenizer(task.adapter, field=f"the adapter {task.adapter}")  # first, as merging takes long
    merged = build_merged(task)
    save_model(merged, target)
    if stops := read_stop_tokens(task.adapter):
        write_generation_config(merged.generation_config, stops, target)
    with reading_model("the adapter", "its tokenizer cannot be saved"):
        tokenizer.save_pretrained(target)


def build_merged(task: MergeTask) -> Any:
    """Return the merged model; tied embeddings stay tied unless the adapter trained them separately."""
    base = load_base(task.model, _UNQUANTIZED, torch.bfloat16, task.attention, "cpu")
    dequantized = _dequantized_weights(task) if task.base == "dequantised" else {}
    for name, weight in dequantized.items():
        base.get_submodule(name).weight.data = weight.to(torch.bfloat16)
    with reading_model("the adapter", "PEFT cannot merge it"):
        return _merge_layers(PeftModel.from_pretrained(base, task.adapter), dequantized)


def _dequantized_weights(task: MergeTask) -> dict[str, torch.Tensor]:
    """Return the dequantized weights that the adapter was trained on, by module name."""
    base = load_base(task.model, task.record.quantization, task.dtype, task.attention, "cpu")
    return {
        name: dequantize_module_weight(module).detach()
        for name, module in base.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
    }


def _merge_layers(peft: Any, dequantized: dict[str, torch.Tensor]) -> Any:
    """Merge one layer at a time: sums in bf16 lose most of a small update, and all of fp32 would not fit in memory."""
    for name, layer in peft.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            # The stacked experts of a mixture have several weights, each with an adapter of its own.
            weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
            weight.data = dequantized.get(name, weight.data).float()
            layer.merge(safe_merge=True)
            weight.data = weight.data.to(torch.bfloat16)
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
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return _outputs(model, rows)


@torch.no_grad()
def _outputs(model: Any, rows: Sequence[TokenRow]) -> Outputs:
    """Run one forward pass per row, without padding or packing."""
    logits, labels = [], []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        row_logits = model(input_ids=ids, use_cache=False).logits[0].float()
        for start, end in row.label_spans:
            logits.append(row_logits[start - 1 : end - 1])
            labels.append(ids[0, start:end])
    return Outputs(torch.cat(logits), torch.cat(labels))


def compare_outputs(before: Outputs, after: Outputs, rows: int) -> MergeDifference:
    """Return the difference of the merged model from the unmerged one."""
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
