"""Two real processes, connected by gloo, learn what one process does (traps 1, 2 and 27)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.interrupt import StopFlag
from tests.unit.trainer.tuned import DEAF, weights_of
from tests.unit.trainer.two_processes import make_shared_loop

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder with what two processes with eight rows each left."""
    folder = tmp_path_factory.mktemp("shared")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.unit.trainer.two_processes", folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def losses_of(folder: Path, rank: int) -> list[float]:
    return [float(line) for line in Path(folder, f"losses-{rank}").read_text().splitlines()]


def test_trap_02_two_times_eight_rows_are_sixteen(shared):
    loop = make_shared_loop(micro_batch=16)
    history = loop.run(StopFlag(), DEAF)
    expected = [*(record.loss for record in history.steps), *(look.loss for look in history.held_out)]
    assert losses_of(shared, 0) == pytest.approx(expected, abs=1e-5)
    found = load_file(shared / "weights-0.safetensors")
    names = [name for name, weight in loop.tuned.peft.named_parameters() if weight.requires_grad]
    for name, wanted in zip(names, weights_of(loop.tuned), strict=True):
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0)


def test_both_processes_end_with_the_same_adapter_and_the_same_losses(shared):
    first, second = (load_file(shared / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_of(shared, 0) == losses_of(shared, 1)


def test_a_stop_of_one_process_is_a_stop_of_both(shared):
    assert [Path(shared, f"stopped-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
