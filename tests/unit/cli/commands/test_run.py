import json
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Invocation

from qlora_api.model_config import reduce_config
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import Platform, PrepareConfig, RunConfig, S3Config
from qlora_cli.__main__ import app
from qlora_cli.commands import run
from qlora_cli.local.runner import Trainer
from qlora_cli.manifests.loader import parse_manifest
from qlora_cli.manifests.yaml_documents import parse_documents
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import GpuPool
from qlora_planner.validation import COMMON_RULES
from qlora_trainer.errors import RunError
from tests.unit.cli.make import JOB, RESULT, make_prepared, make_progress

CONFIGS = Path(__file__).parents[2] / "planner" / "configs"


@dataclass
class FakeTrainer:
    """Remembers what it was asked, and answers at once."""

    error: BaseException | None = None
    published: bool = False
    gpus: tuple[GpuPool, ...] = ()
    config: str = ""
    prepares: list[PrepareConfig] = field(default_factory=list)
    runs: list[RunConfig] = field(default_factory=list)

    def prepare(self, config, note):
        self.prepares.append(config)
        note("24 rows [checked]")
        prepared = make_prepared(RESULT if self.published else None)
        return prepared.model_copy(update={"model": prepared.model.model_copy(update={"config": self.config})})

    def run(self, config, sink):
        self.runs.append(config)
        for step in (1, 2, 3):
            sink.report(make_progress(step))
        if self.error:
            raise self.error
        sink.report(make_progress(3, Phase.EVALUATING))
        return RESULT

    def load(self):
        return Trainer(lambda: self.gpus, self.prepare, self.run)


@pytest.fixture
def trainer(monkeypatch):
    fake = FakeTrainer()
    monkeypatch.setattr(run, "load_trainer", fake.load)
    before = signal.getsignal(signal.SIGTERM)
    yield fake
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def job(tmp_path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def qlora(*arguments: object) -> Invocation:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["run", *map(str, arguments)])


@pytest.mark.usefixtures("trainer")
def test_run_prepares_plans_trains_and_prints_comparison(job):
    result = qlora(job)
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.stdout.splitlines()] == [
        "Published: The adapter is complete and verified in the output.",
        "112 held-out rows, 1400 answer tokens",
        "┏━━━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━━┓",
        "┃                ┃  base ┃ adapter ┃       change ┃",
        "┡━━━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━━┩",
        "│ loss           │ 4.000 │   3.000 │       -25.0% │",
        "│ perplexity     │  54.6 │    20.1 │       -63.2% │",
        "│ token accuracy │ 25.0% │   40.0% │ +15.0 points │",
        "└────────────────┴───────┴─────────┴──────────────┘",
        "adapter  /out/support-bot/0123456789abcdef/adapter",
        "report   /out/support-bot/0123456789abcdef/report/report.html",
    ]


@pytest.mark.usefixtures("trainer")
def test_without_a_terminal_progress_is_lines_on_standard_error(job):
    (document,) = parse_documents(JOB, "job.yaml")
    plan = make_plan(parse_manifest(document, COMMON_RULES).spec, make_prepared())
    assert qlora(job).stderr.splitlines() == [
        "24 rows [checked]",
        *plan.reasons,
        "Training     33%  step 1/3  loss 3.750  225 tok/s  2:10 left",
        "Training    100%  step 3/3  loss 3.250  225 tok/s",
        "Evaluating  adapter",
    ]


def test_options_reach_the_trainer(trainer, job):
    result = qlora(
        job, "--set", "lora.rank=8", "--hub-mirror", "/mirror", "--hub-endpoint", "http://hub", "--s3-endpoint", "http://s3"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (config,) = trainer.prepares
    assert config.spec.lora.rank == 8
    assert (config.job, config.namespace) == ("support-bot", "default")
    assert config.platform == Platform(
        s3=S3Config(endpoint="http://s3"), hub_endpoint="http://hub", hub_mirror="file:///mirror"
    )
    assert trainer.runs[0].plan.total_steps == 6


def test_published_result_is_shown_and_not_trained_again(trainer, job):
    trainer.published = True
    result = qlora(job)
    assert result.exit_code == 0
    assert result.stdout.startswith("AlreadyPublished: ")
    assert "-25.0%" in result.stdout
    assert trainer.runs == []


@pytest.mark.usefixtures("trainer")
def test_json_output_is_termination_message(job):
    result = qlora(job, "-o", "json")
    outcome = TerminationMessage.model_validate_json(result.stdout)
    assert outcome == TerminationMessage(reason=Reason.PUBLISHED, step=3, prepared=make_prepared(), result=RESULT)
    assert json.loads(result.stdout)["result"]["evaluation"]["adapter"]["loss"] == 3.0


def test_run_error_prints_reason_message_and_fix(trainer, job):
    trainer.error = RunError(Reason.NON_FINITE_LOSS, "the loss of step 3 is [nan]", step=3)
    result = qlora(job)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-3:] == [
        "error: NonFiniteLoss",
        "the loss of step 3 is [nan]",
        "fix: See the message; usually lower spec.training.learningRate or correct the dataset.",
    ]


def test_memory_that_did_not_suffice_is_a_reason_and_not_a_traceback(trainer, job):
    trainer.error = MemoryError()
    result = qlora(job)
    assert result.exit_code == 1
    assert "error: HostOutOfMemory\n" in result.stderr
    assert "fix: For a training pod raise spec.resources.memory;" in result.stderr


def test_interrupted_run_exits_with_130(trainer, job):
    trainer.error = KeyboardInterrupt()
    result = qlora(job)
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped; nothing was published\n")


def test_interrupted_run_with_checkpoint_says_how_to_resume(trainer, job):
    trainer.error = RunError(Reason.INTERRUPTED, "stopped", step=3)
    result = qlora(job)
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped; step 3 is done; the same command resumes from its checkpoint\n")


def test_trainer_bug_keeps_traceback(trainer, job):
    trainer.error = ZeroDivisionError("ours")
    assert isinstance(qlora(job).exception, ZeroDivisionError)


def test_missing_gpu_is_an_error_before_preparation(trainer, job):
    result = qlora(job, "--set", "resources.gpusPerNode=1")
    assert result.exit_code == 1
    assert "--set resources.gpusPerNode=0" in result.stderr
    assert trainer.prepares == []


def test_local_gpu_is_used(trainer, job):
    trainer.gpus = (GpuPool("NVIDIA L4", 24 << 30, 1, 1, (8, 9)),)
    assert qlora(job, "--set", "resources.gpusPerNode=1").exit_code == 0
    assert trainer.runs[0].plan.device == "cuda"
    assert trainer.runs[0].plan.peak_bytes is None


def test_run_is_sized_for_the_local_gpu(trainer, job):
    trainer.gpus = (GpuPool("NVIDIA L4", 24 << 30, 1, 1, (8, 9)),)
    trainer.config = reduce_config(json.loads((CONFIGS / "llama-3.2-3b.json").read_text()))
    assert qlora(job, "--set", "resources.gpusPerNode=1").exit_code == 0
    plan = trainer.runs[0].plan
    assert plan.peak_bytes < 24 << 30
    assert plan.reasons[0] == "1 x NVIDIA L4 on 1 node: as spec.resources asks"
    trainer.config = reduce_config(json.loads((CONFIGS / "llama-2-70b.json").read_text()))
    result = qlora(job, "--set", "resources.gpusPerNode=1")
    assert (result.exit_code, len(trainer.runs)) == (1, 1)
    assert "error: DoesNotFit" in result.stderr
    assert "GiB more than the 23.5 GiB that a process has on a NVIDIA L4" in result.stderr
    assert "fix: Make the change that the message names" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (JOB.replace("rank: 16", "rank: 0"), "job.yaml:11: spec.lora.rank: must be ≥ 1, got 0"),
        (f"{JOB}---\n{JOB}", "job.yaml: has 2 QLoRAJobs; pass a file with one"),
        ("kind: Secret\n", "job.yaml: contains no QLoRAJob, only Secret; write a manifest with qlora init"),
        ("a: [", "job.yaml:1: while parsing a flow node"),
    ],
)
def test_manifest_that_cannot_run_is_rejected(trainer, job, text, message):
    job.write_text(text)
    result = qlora(job)
    assert result.exit_code == 1
    assert message in result.stderr
    assert trainer.prepares == []


def test_missing_manifest_is_reported(tmp_path):
    result = qlora(tmp_path / "missing.yaml")
    assert result.exit_code == 1
    assert "missing.yaml: No such file or directory" in result.stderr
