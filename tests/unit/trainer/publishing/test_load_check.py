"""An adapter that does not load fails the run, with the stderr of the subprocess or its exit status."""

import sys
from pathlib import Path

import pytest

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.errors import RunError
from qlora_trainer.publishing.load_check import LoadingTask, load_in_fresh_process

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
