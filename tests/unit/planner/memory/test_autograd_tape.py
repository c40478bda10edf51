"""The tape holds and frees what autograd does; answers are counted by hand."""

import pytest

from qlora_planner.memory.autograd_tape import Played, Tensor, play
from qlora_planner.memory.torch_ops import Recorder

WEIGHT = 100
LEARNED = Tensor(WEIGHT, 4, learns=True, lasting=True)
FROZEN = Tensor(WEIGHT, 4, lasting=True)


def given(record: Recorder, *, learns: bool) -> Tensor:
    """An input of 10 numbers in fp32."""
    return record.made(10, 4, [LEARNED] if learns else [])


def played(record: Recorder, output: Tensor) -> Played:
    return play([record.cut(output)], recompute=[False])


def test_a_frozen_product_keeps_nothing_of_an_input_that_does_not_learn():
    record = Recorder()
    assert played(record, record.product(given(record, learns=False), FROZEN, 20)).kept == 20 * 4


def test_a_product_with_a_weight_that_learns_keeps_its_input():
    record = Recorder()
    assert played(record, record.product(given(record, learns=False), LEARNED, 20)).kept == 10 * 4 + 20 * 4


def test_a_sum_keeps_nothing_and_its_gradient_is_shared():
    record = Recorder()
    one, other = given(record, learns=True), given(record, learns=True)
    played_sum = played(record, record.add(one, other))
    assert played_sum.kept == 10 * 4
    # The result and its gradient, and after them a gradient of the weight.
    assert played_sum.peak == 10 * 4 + 10 * 4 + WEIGHT * 4


def test_what_two_operations_save_is_there_once():
    record = Recorder()
    states = given(record, learns=True)
    total = record.add(record.from_input(states), record.from_input(states))
    assert played(record, total).kept == (10 + 10) * 4


def test_a_view_takes_no_memory_but_its_gradient_does():
    record = Recorder()
    states = given(record, learns=True)
    half = record.part(states, 5)
    output = record.from_input(half)
    shown = played(record, output)
    assert shown.kept == (10 + 5) * 4
    assert shown.peak == max((10 + 5 + 5 + 5) * 4, (5 + 5 + 10) * 4, (5 + 10 + WEIGHT) * 4)


def test_a_variable_holds_what_nothing_reads_any_more():
    sizes = []
    for held in (False, True):
        record = Recorder()
        states = given(record, learns=False)
        wide = record.made(1000, 4, [states])
        narrow = record.made(10, 4, [wide])
        last = record.made(1, 4, [record.made(2000, 4, [narrow])])
        if held:
            record.until_here(wide)
        sizes.append(played(record, last).peak)
    assert sizes[1] - sizes[0] == 1000 * 4


@pytest.mark.parametrize("layers", [2, 5])
def test_a_recomputed_layer_keeps_its_input_only(layers: int):
    record = Recorder()
    segments = [record.cut(record.view(given(record, learns=False), 10, learns=True))]
    for _ in range(layers):
        states = segments[-1].output
        for _ in range(4):
            states = record.from_input(states)
        segments.append(record.cut(states))
    kept = play(segments, recompute=[False] * (layers + 1)).kept
    assert kept == (4 * layers + 1) * 10 * 4
    again = play(segments, recompute=[False] + [True] * layers)
    assert again.kept == (layers + 1) * 10 * 4
    assert again.peak < (4 * layers + 1) * 10 * 4 or layers == 2


def test_a_checkpoint_does_not_let_go_what_a_node_holds_by_itself():
    """As bitsandbytes' 8-bit layers do with their inputs; recomputed ones are held besides, until backward goes on."""
    kept, peaks = [], []
    for clings in (False, True):
        record = Recorder()
        start = record.cut(record.view(given(record, learns=False), 10, learns=True))
        wide = record.from_input(record.made(1000, 4, [start.output]))
        record.made(10, 4, [wide])
        layer = record.cut(record.amend(clung=(wide,) if clings else ()))
        made = play([start, layer], recompute=[False, True])
        kept.append(made.kept)
        peaks.append(made.peak)
    assert kept[1] - kept[0] == 1000 * 4
    assert peaks[1] - peaks[0] >= 1000 * 4


def test_gradients_that_wait_are_there_while_a_layer_is_recomputed():
    peaks = []
    for scales in (False, True):
        record = Recorder()
        start = record.cut(record.view(given(record, learns=False), 10, learns=True))
        record.from_input(start.output)
        last = record.amend(forward_work=10_000)
        output = record.add(record.scale(last) if scales else last, start.output)
        peaks.append(play([start, record.cut(output)], recompute=[False, True]).peak)
    # The gradient of what is scaled, beside that of the sum, which waits for the other summand.
    assert peaks[1] - peaks[0] == 10 * 4
