"""Loads a published adapter as any reader would, and computes its held-out loss; imports nothing of ours.

Usage: plain_peft.py BASE_FOLDER ADAPTER_FOLDER HELD_OUT_JSONL; prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base_folder, adapter_folder, held_out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base_folder)
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16, quantization_config=quantization)
for module in base.modules():
    if isinstance(module, bnb.nn.Linear4bit):
        # The CPU's repacked weights round the scales to bf16: another model by about 1e-3.
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, adapter_folder).eval()


def held_out_loss() -> tuple[float, int]:
    """Mean cross-entropy over the answers' tokens, one row at a time, and how many there are."""
    total, count = 0.0, 0
    for line in Path(held_out).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n").input_ids
        answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(answer)
    return total / count, count


adapter_loss, tokens = held_out_loss()
with model.disable_adapter():
    base_loss, _ = held_out_loss()
print(json.dumps({"adapter": adapter_loss, "base": base_loss, "tokens": tokens}))
