"""Recomputes a report's metrics from the published files; imports nothing of this project.

`python recompute.py RESULT BASE` prints them as JSON. RESULT is the folder with manifest.json, BASE that of the model.
All metrics follow from evaluation.jsonl. The losses are also measured: transformers loads the base, peft the adapter,
and every row gets its own forward pass in fp32, without padding or packing.
"""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def figures(rows, side):
    tokens = sum(row["tokens"] for row in rows)
    loss = math.fsum(row[side]["loss"] for row in rows) / tokens
    found = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokenAccuracy": sum(row[side]["correct"] for row in rows) / tokens,
    }
    if scores := answers(rows, side):
        found["exactMatch"] = math.fsum(match for match, _ in scores) / len(scores)
        found["rougeL"] = math.fsum(rouge for _, rouge in scores) / len(scores)
    return found


def answers(rows, side):
    pairs = [(row["reference"], row[side]["answer"]) for row in rows if row[side]["answer"] is not None]
    return [(float(reference.split() == answer.split()), rouge_l(reference, answer)) for reference, answer in pairs]


def rouge_l(reference, answer):
    one, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, answer))
    lengths = [0] * (len(other) + 1)
    for word in one:
        above = lengths
        lengths = [0]
        for index, candidate in enumerate(other):
            lengths.append(above[index] + 1 if word == candidate else max(above[index + 1], lengths[index]))
    if not lengths[-1]:
        return 0.0
    precision, recall = lengths[-1] / len(other), lengths[-1] / len(one)
    return 2 * precision * recall / (precision + recall)


def confidence(rows, seed, resamples, level):
    sides = {}
    for side in ("base", "adapter"):
        sums = resample([(row["tokens"], row[side]["loss"], row[side]["correct"]) for row in rows], seed, resamples)
        loss = sums[:, 1] / sums[:, 0]
        sides[side] = {"loss": loss, "perplexity": np.exp(loss), "tokenAccuracy": sums[:, 2] / sums[:, 0]}
        if scores := answers(rows, side):
            means = resample(scores, seed, resamples) / len(scores)
            sides[side] |= {"exactMatch": means[:, 0], "rougeL": means[:, 1]}
    sides["change"] = {name: sides["adapter"][name] - sides["base"][name] for name in sides["base"]}
    tail = 50 * (1 - level)
    return {
        side: {
            name: dict(zip(("low", "high"), map(float, np.percentile(values, [tail, 100 - tail])), strict=True))
            for name, values in columns.items()
        }
        for side, columns in sides.items()
    }


def resample(table, seed, resamples):
    table, generator = np.array(table, dtype=float), np.random.default_rng(seed)
    return np.array([table[generator.integers(0, len(table), len(table))].sum(axis=0) for _ in range(resamples)])


def measure(result, base, quantization):
    """Return the mean losses of base and adapter, measured with transformers and peft only."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization["type"],
        bnb_4bit_use_double_quant=quantization["doubleQuant"],
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=settings if quantization["bits"] == 4 else None
    )
    model = PeftModel.from_pretrained(model, result / "adapter").eval()
    held_out = pq.read_table(result / "prepared/evaluation.parquet").to_pylist()

    @torch.no_grad()
    def mean_loss():
        total, tokens = 0.0, 0
        for row in held_out:
            ids = torch.tensor([row["input_ids"]])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
            for start, end in zip(row["learned"][::2], row["learned"][1::2], strict=True):
                total += float(losses[start - 1 : end - 1].sum())
                tokens += end - start
        return total / tokens

    adapter = mean_loss()
    with model.disable_adapter():
        return {"base": mean_loss(), "adapter": adapter}


def check_files(result):
    manifest = json.loads((result / "manifest.json").read_text())
    for file in manifest["files"]:
        content = (result / file["path"]).read_bytes()
        if (len(content), hashlib.sha256(content).hexdigest()) != (file["size"], file["sha256"]):
            raise SystemExit(f"{file['path']} does not match the manifest")
    return len(manifest["files"])


def main(result, base):
    report = json.loads((result / "report/report.json").read_text())
    rows = [json.loads(line) for line in (result / "report/evaluation.jsonl").read_text().splitlines()]
    settings = report["confidence"]
    found = {
        "files": check_files(result),
        "evaluation": {
            "base": figures(rows, "base"),
            "adapter": figures(rows, "adapter"),
            "rows": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "answers": len(answers(rows, "adapter")),
        },
        "confidence": confidence(rows, settings["seed"], settings["resamples"], settings["level"]),
        "measured": measure(result, base, report["spec"]["quantization"]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
