"""The tape holds and frees what autograd does; answers are counted by hand."""

import pytest

from qlora_planner.memory.autograd_tape import SimulatedMemory, Tensor, simulate
from qlora_planner.memory.torch_ops import Recorder

WEIGHT = 100
LEARNED = Tensor(WEIGHT, 4, requires_grad=True, persistent=True)
FROZEN = Tensor(WEIGHT, 4, persistent=True)


def given(record: Recorder, *, requires_grad: bool) -> Tensor:
    """An input of 10 numbers in fp32."""
    return record.emit(10, 4, [LEARNED] if requires_grad else [])


def simulated(record: Recorder, output: Tensor) -> SimulatedMemory:
    return simulate([record.end_segment(output)], recompute=[False])


def test_frozen_matmul_saves_no_input_without_grad():
    record = Recorder()
    assert simulated(record, record.matmul(given(record, requires_grad=False), FROZEN, 20)).saved == 20 * 4


def test_trainable_matmul_saves_its_input():
    record = Recorder()
    assert simulated(record, record.matmul(given(record, requires_grad=False), LEARNED, 20)).saved == 10 * 4 + 20 * 4


def test_add_saves_nothing_and_shares_gradient():
    record = Recorder()
    one, other = given(record, requires_grad=True), given(record, requires_grad=True)
    played_sum = simulated(record, record.add(one, other))
    assert played_sum.saved == 10 * 4
    # The result and its gradient, and after them a gradient of the weight.
    assert played_sum.peak == 10 * 4 + 10 * 4 + WEIGHT * 4


def test_tensor_saved_twice_is_counted_once():
    record = Recorder()
    states = given(record, requires_grad=True)
    total = record.add(record.unary_saving_input(states), record.unary_saving_input(states))
    assert simulated(record, total).saved == (10 + 10) * 4


def test_view_takes_no_memory_but_gradient_does():
    record = Recorder()
    states = given(record, requires_grad=True)
    half = record.narrow(states, 5)
    output = record.unary_saving_input(half)
    shown = simulated(record, output)
    assert shown.saved == (10 + 5) * 4
    assert shown.peak == max((10 + 5 + 5 + 5) * 4, (5 + 5 + 10) * 4, (5 + 10 + WEIGHT) * 4)


def test_python_variable_keeps_tensor_alive():
    sizes = []
    for held in (False, True):
        record = Recorder()
        states = given(record, requires_grad=False)
        wide = record.emit(1000, 4, [states])
        narrow = record.emit(10, 4, [wide])
        last = record.emit(1, 4, [record.emit(2000, 4, [narrow])])
        if held:
            record.keep_alive(wide)
        sizes.append(simulated(record, last).peak)
    assert sizes[1] - sizes[0] == 1000 * 4


@pytest.mark.parametrize("layers", [2, 5])
def test_checkpointed_layer_saves_only_its_input(layers: int):
    record = Recorder()
    segments = [record.end_segment(record.view(given(record, requires_grad=False), 10, requires_grad=True))]
    for _ in range(layers):
        states = segments[-1].output
        for _ in range(4):
            states = record.unary_saving_input(states)
        segments.append(record.end_segment(states))
    kept = simulate(segments, recompute=[False] * (layers + 1)).saved
    assert kept == (4 * layers + 1) * 10 * 4
    again = simulate(segments, recompute=[False] + [True] * layers)
    assert again.saved == (layers + 1) * 10 * 4
    assert again.peak < (4 * layers + 1) * 10 * 4 or layers == 2


def test_checkpointed_layer_keeps_tensors_held_by_node():
    """As bitsandbytes' 8-bit layers do with their inputs; recomputed ones are held besides, until backward goes on."""
    kept, peaks = [], []
    for clings in (False, True):
        record = Recorder()
        start = record.end_segment(record.view(given(record, requires_grad=False), 10, requires_grad=True))
        wide = record.unary_saving_input(record.emit(1000, 4, [start.output]))
        record.emit(10, 4, [wide])
        layer = record.end_segment(record.update_last(held_by_node=(wide,) if clings else ()))
        made = simulate([start, layer], recompute=[False, True])
        kept.append(made.saved)
        peaks.append(made.peak)
    assert kept[1] - kept[0] == 1000 * 4
    assert peaks[1] - peaks[0] >= 1000 * 4


def test_pending_gradients_are_alive_during_recomputation():
    peaks = []
    for scales in (False, True):
        record = Recorder()
        start = record.end_segment(record.view(given(record, requires_grad=False), 10, requires_grad=True))
        record.unary_saving_input(start.output)
        last = record.update_last(forward_workspace=10_000)
        output = record.add(record.scale(last) if scales else last, start.output)
        peaks.append(simulate([start, record.end_segment(output)], recompute=[False, True]).peak)
    # The gradient of what is scaled, beside that of the sum, which waits for the other summand.
    assert peaks[1] - peaks[0] == 10 * 4
