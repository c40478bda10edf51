"""NEFTune: amount of noise per row, and when it is added."""

from math import sqrt

import pytest
import torch

from qlora_trainer.data.batching import collate, row_lengths
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.evaluation.evaluator import compute_metrics
from qlora_trainer.model.neftune import noise_for, noisy_embeddings
from tests.unit.trainer.tiny import CPU, make_model
from tests.unit.trainer.tuned import make_test_loop, make_trainable, run_steps, token_rows, weights_of

ROWS = tuple(TokenRow(tuple(range(2, 2 + length)), ((1, length),)) for length in (4, 9, 16))


def test_row_lengths_of_packed_and_padded_batches():
    packed, padded = collate(ROWS, CPU, packing=True), collate(ROWS, CPU, packing=False)
    assert row_lengths(packed).tolist() == [[4] * 4 + [9] * 9 + [16] * 16]
    assert row_lengths(padded).tolist() == [[4] * 4 + [0] * 12, [9] * 9 + [0] * 7, [16] * 16]


@pytest.mark.parametrize("packing", [True, False])
def test_noise_is_uniform_and_bounded_by_row_length(packing):
    torch.manual_seed(0)
    batch = collate(ROWS, CPU, packing=packing)
    embeddings = torch.zeros(*batch.input_ids.shape, 512)
    lengths = row_lengths(batch)
    noise = noise_for(embeddings, lengths, 5.0)
    for length in (4, 9, 16):
        bound, drawn = 5.0 / sqrt(length * 512), noise[lengths == length]
        assert 0.99 * bound < float(drawn.abs().max()) <= bound
        assert float(drawn.std()) == pytest.approx(bound / sqrt(3), rel=0.05)


def test_noise_is_added_only_within_the_context():
    model, batch = make_model(), collate(ROWS, CPU, packing=True)
    embed = model.get_input_embeddings()
    plain = embed(batch.input_ids)
    with noisy_embeddings(model, 5.0, batch):
        assert not torch.equal(embed(batch.input_ids), plain)
    assert torch.equal(embed(batch.input_ids), plain)
    with noisy_embeddings(model, 0.0, batch):
        assert torch.equal(embed(batch.input_ids), plain)


def trained(alpha: float) -> tuple[list[torch.Tensor], float]:
    trainable, rows = make_trainable(), token_rows(8)
    loop = make_test_loop(trainable, rows, neftune_alpha=alpha)
    loss = run_steps(loop)[0].loss
    with trainable.evaluating():
        assert compute_metrics(trainable, rows, 4, packing=True) == compute_metrics(trainable, rows, 4, packing=True)
    return weights_of(trainable), loss


def test_training_with_noise_is_reproducible_and_differs_from_training_without():
    first, again, without = trained(5.0), trained(5.0), trained(0.0)
    assert all(torch.equal(one, other) for one, other in zip(first[0], again[0], strict=True))
    assert first[1] != without[1]
    assert first[1] == pytest.approx(without[1], rel=0.2)
