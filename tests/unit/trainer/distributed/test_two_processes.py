"""Two real processes with gloo train the same weights as one process, with every strategy (traps 1, 2 and 27)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.evaluation.evaluator import compute_row_statistics
from qlora_trainer.runtime.shutdown import StopFlag
from tests.unit.trainer.processes import run_two
from tests.unit.trainer.tuned import NO_CALLBACKS, token_rows
from tests.unit.trainer.two_processes import STRATEGIES, make_shared_loop


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The results of two processes with eight rows each."""
    folder = tmp_path_factory.mktemp("shared")
    run_two("tests.unit.trainer.two_processes", folder)
    return folder


@pytest.fixture(scope="module")
def single_process() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the weights of one process with all rows."""
    loop = make_shared_loop(micro_batch=16)
    history = loop.run(StopFlag(), NO_CALLBACKS)
    with loop.trainable.evaluating():
        sums = compute_row_statistics(loop.trainable, token_rows(5, seed=4), 2, packing=True)
    losses = [record.loss for record in history.steps] + [validation.loss for validation in history.validations]
    return [*losses, *(row.loss for row in sums)], dict(loop.engine.weights())


def losses_of(folder: Path, name: str, rank: int = 0) -> list[float]:
    return [float(line) for line in Path(folder, f"{name}-{rank}.losses").read_text().splitlines()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trap_02_two_processes_equal_one_with_the_same_global_batch(shared, single_process, strategy):
    losses, weights = single_process
    assert losses_of(shared, strategy) == pytest.approx(losses, rel=1e-5)
    found = load_file(shared / f"{strategy}-0.safetensors")
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ranks_have_equal_weights_and_losses(shared, strategy):
    first, second = (load_file(shared / f"{strategy}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Each validation row is on one rank only, so none counts twice (trap 27).
    assert losses_of(shared, strategy, 0) == losses_of(shared, strategy, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigterm_of_one_process_stops_both_after_the_same_step(shared, strategy):
    texts = {Path(shared, f"{strategy}-{rank}.stopped").read_text() for rank in (0, 1)}
    assert texts == {"the pod was terminated (SIGTERM) before the run was published"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stopped_run_resumes_bit_for_bit(shared, strategy):
    uninterrupted, resumed = (load_file(shared / f"{name}-0.safetensors") for name in (strategy, f"{strategy}-resumed"))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    losses = losses_of(shared, f"{strategy}-resumed")
    assert losses == losses_of(shared, strategy)[: len(losses)]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_only_the_main_process_holds_the_optimizer_state_of_all(shared, strategy):
    """With method full it is 8 bytes a weight: other ranks that held it too would run out of host memory."""
    assert [Path(shared, f"{strategy}-{rank}.state").read_text() for rank in (0, 1)] == ["0: 1:", ""]
