"""A hanging process ends the run, with the stack traces of every process in the output."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.v1alpha1 import Plan
from tests.chaos.promises import promise
from tests.chaos.trainer.lives import STEPS, TrainerRuns
from tests.cluster.services.s3 import S3
from tests.unit.trainer.processes import ROOT

HEARTBEAT = "8s"
PLAN = Plan(
    device="cpu", nodes=2, gpus_per_node=0, strategy="ddp", micro_batch_size=4, gradient_accumulation=4,
    total_steps=STEPS, reasons=(),
)  # fmt: skip


@promise(
    fault="a training process hangs",
    promise="every process of the run ends as HeartbeatLost, its stacks are in the output, and no GPU is held",
    how="one of two processes sleeps forever inside a step",
)
def test_hung_process_ends_the_run(runs: TrainerRuns, s3: S3, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    run = runs.make()
    deadlines = run.config.spec.deadlines.model_copy(update={"heartbeat": HEARTBEAT})
    spec = run.config.spec.model_copy(update={"deadlines": deadlines})
    config = run.config.model_copy(update={"spec": spec, "plan": PLAN})
    (tmp_path / "run.json").write_text(config.model_dump_json(by_alias=True))
    done = run_both(tmp_path, s3)
    assert done.returncode != 0
    messages = [TerminationMessage.model_validate_json((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert {message.reason for message in messages} == {Reason.HEARTBEAT_LOST}, done.stderr[-3000:]
    paths = [f"hangs/attempt-1-rank-{rank}.txt" for rank in (0, 1)]
    for message, path in zip(messages, paths, strict=True):
        assert message.message.endswith(f"{config.prepared.prefix}/{path}")
    waiting, sleeping = (run.read(path).decode() for path in paths)
    assert ["in all_reduce" in stacks for stacks in (waiting, sleeping)] == [True, False]
    last_lines = [run.uploaded_log(1, rank)[-1] for rank in (0, 1)]
    assert [line["message"] for line in last_lines] == [f"the run failed: {message.message}" for message in messages]
    assert messages[0].checkpoint is not None
    assert messages[0].checkpoint.step == 2
    outcome("both processes ended as HeartbeatLost, and the stacks show which one slept and where the other waited")


def run_both(folder: Path, s3: S3) -> subprocess.CompletedProcess[str]:
    """Run both processes until they exit."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(
        [*launcher, "-m", "tests.chaos.trainer.hanging", str(folder)],
        cwd=ROOT,
        env=os.environ | variables | s3.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
