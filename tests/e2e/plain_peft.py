"""Loads published adapters with plain peft and computes their held-out losses, without any code of this project.

Computed in float32, so that the rounding of bf16 is in one of the two compared losses only: with padded rows it shifts
the base's loss by 0.007, another way on each CPU and with each batch shape.

Usage: plain_peft.py BASE_FOLDER HELD_OUT_JSONL ADAPTER_FOLDER...; prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BATCH = 4
base_folder, held_out, *adapter_folders = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base_folder)
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, quantization_config=quantization)
for module in base.modules():
    if isinstance(module, bnb.nn.Linear4bit):
        # The CPU's repacked weights round the scales to bf16: another model by about 1e-3.
        module.support_avx512bf16_for_cpu = False
first, *others = enumerate(adapter_folders)
model = PeftModel.from_pretrained(base, first[1], adapter_name=str(first[0]))
for number, folder in others:
    model.load_adapter(folder, adapter_name=str(number))
model.eval()


def to_tokens(row: dict[str, str]) -> tuple[list[int], list[int]]:
    prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n").input_ids
    answer = tokenizer(row["response"], add_special_tokens=False).input_ids
    return prompt, [*answer, tokenizer.eos_token_id]


def held_out_loss() -> tuple[float, int]:
    """Mean cross-entropy over the answers' tokens, and how many there are; padded as in any tutorial."""
    rows = [to_tokens(json.loads(line)) for line in Path(held_out).read_text(encoding="utf-8").splitlines()]
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        for line, (prompt, answer) in enumerate(batch):
            ids[line, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[line, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in batch])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        wanted = labels[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum").item()
        count += int((wanted != -100).sum())
    return total / count, count


with model.disable_adapter():
    base_loss, tokens = held_out_loss()
losses = []
for number in range(len(adapter_folders)):
    model.set_adapter(str(number))
    losses.append(held_out_loss()[0])
print(json.dumps({"adapters": losses, "base": base_loss, "tokens": tokens}))
