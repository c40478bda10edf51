"""An adapter that does not load fails the run, with the stderr of the subprocess or its exit status."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.errors import RunError
from qlora_trainer.model.base_model import attach_lora, load_base
from qlora_trainer.publishing.load_check import LoadingTask, compute_loss, load_in_fresh_process
from qlora_trainer.stages import make_loading_check
from tests.make import make_prepared
from tests.unit.trainer.tiny import make_spec, run_config, write_model
from tests.unit.trainer.tuned import SETTINGS, token_rows

METHODS = {4: "qlora", 8: "qlora", 16: "lora"}

TASK = LoadingTask(
    method="lora",
    base="/nowhere",
    quantization=QuantizationSpec(bits=16),
    device="cpu",
    dtype="float32",
    attention="sdpa",
    rows=(((1, 2), ((1, 2),)),),
)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -KILL $$", r"was killed by SIGKILL, which usually means out of memory: $"),
        ("kill -TERM $$", r"was killed by SIGTERM: $"),
        ("echo no such folder >&2; exit 3", r"exited with code 3: no such folder\n$"),
        ("echo 2.5", r"has a loss of 2\.5000, but 1\.0000 after training"),
    ],
)
def test_failed_load_check_reports_exit_code_or_signal(tmp_path, monkeypatch, script, message):
    """The interpreter is replaced by a script that only exits."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(RunError, match=message) as caught:
        load_in_fresh_process(TASK, Path("/nowhere"), 1.0)
    assert caught.value.reason == Reason.TRAINER_ERROR


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_trap_47_reloaded_adapter_has_the_loss_of_training(tmp_path, bits):
    """Answers of one token, over many sets of rows: what is averaged over few labels shows each difference."""
    write_model(tmp_path / "model")
    quantization, dtype = QuantizationSpec(bits=bits), torch.bfloat16
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    base = load_base(tmp_path / "model", quantization, dtype, "sdpa", "cpu")
    trainable = attach_lora(base, LoraSpec(rank=4, dropout=0.0, targets=("all-linear",)), 1, settings)
    for weight in trainable.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    trainable.wrapped.save_pretrained(tmp_path / "adapter")
    spec = make_spec(
        "file:///model", "file:///rows", "file:///output", quantization={"bits": bits}, method=METHODS[bits]
    )
    config = run_config(spec, make_prepared())
    checks = []
    for seed in range(8):
        rows = [TokenRow(row.input_ids, ((len(row.input_ids) - 1, len(row.input_ids)),)) for row in token_rows(4, seed)]
        checks.append(make_loading_check(trainable, rows, config, settings, tmp_path / "model"))
    for check in checks:
        assert compute_loss(check.task, tmp_path / "adapter") == pytest.approx(check.expected_loss, abs=1e-3)
