"""`qlora run`, stopped with Ctrl-C and started again, with the real trainer on a tiny model."""

import os
import signal

import pytest
import yaml
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from qlora_cli.display.progress import LineScreen
from tests.unit.trainer.tiny import instruction_rows, write_model, write_rows

# peft 0.21 reads transformers' old name of is_activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def manifest(tmp_path):
    spec = {
        "model": {"uri": write_model(tmp_path / "model")},
        "dataset": {"uri": write_rows(tmp_path / "rows.jsonl", instruction_rows())},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"epochs": 1, "globalBatchSize": 8, "maxLength": 64},
        "evaluation": {"generations": 0},
        "resources": {"gpusPerNode": 0},
        "output": {"uri": f"file://{tmp_path / 'output'}"},
    }
    file = tmp_path / "job.yaml"
    metadata = {"name": "colours"}
    file.write_text(
        yaml.safe_dump({"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": metadata, "spec": spec})
    )
    return file


def test_run_after_ctrl_c_resumes_from_checkpoint(manifest, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("qlora_trainer.stages.load_in_fresh_process", lambda *_: None)  # test_run.py has it
    report, pressed = LineScreen.report, []

    def interrupt(screen, progress):
        report(screen, progress)
        if progress.step == 2 and not pressed:
            pressed.append("Ctrl-C")
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LineScreen, "report", interrupt)
    stopped = CliRunner().invoke(app, ["run", str(manifest)])
    assert stopped.exit_code == 130, stopped.output
    assert (
        "stopping after this step and saving a checkpoint; press Ctrl-C again to stop immediately\n" in stopped.stderr
    )
    assert stopped.stderr.endswith("stopped; step 2 is done; the same command resumes from its checkpoint\n")
    monkeypatch.setattr(LineScreen, "report", report)
    resumed = CliRunner().invoke(app, ["run", str(manifest)])
    assert resumed.exit_code == 0, resumed.output
    assert "resumed from step 2, checkpoint file://" in resumed.stderr
    assert "step 1/" not in resumed.stderr
    assert resumed.stdout.startswith("Published: ")
