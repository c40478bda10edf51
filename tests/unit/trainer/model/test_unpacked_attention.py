"""Unpacked attention of packed rows equals the attention of one long masked sequence."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.batching import collate
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.model import unpacked_attention
from qlora_trainer.model.base_model import load_base
from qlora_trainer.model.unpacked_attention import UNPACKED_SDPA, packed_layout
from tests.unit.trainer.families import FAMILIES, write_family
from tests.unit.trainer.tiny import CPU, write_model
from tests.unit.trainer.tuned import token_rows


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def test_packed_layout_gives_each_row_its_own_line():
    layout = packed_layout(positions(2, 3))
    assert layout is not None
    assert layout.slot_of_token.tolist() == [0, 1, 3, 4, 5]
    assert layout.token_of_slot.tolist() == [[0, 1, 1], [2, 3, 4]]
    assert layout.filled.tolist() == [[True, True, False], [True, True, True]]
    states = torch.randn(1, 2, 5, 4)
    unpacked = layout.unpack(states)
    assert torch.equal(unpacked[0, :, :2], states[0, :, :2])
    assert torch.equal(unpacked[0, :, 2], states[0, :, 1])
    assert torch.equal(layout.repack(unpacked.transpose(1, 2)), states.transpose(1, 2))


def test_unpack_mask_keeps_the_row_mask_and_hides_padding():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[4, 2] = False  # sliding window: the third token of the second row does not attend to its first
    layout = packed_layout(positions(2, 3))
    assert layout is not None
    first, second = layout.unpack_mask(mask[None, None])[:, 0].tolist()
    assert first == [[True, False, False], [True, True, False], [True, True, False]]
    assert second == [[True, False, False], [True, True, False], [False, True, True]]


@pytest.mark.parametrize("lengths", [(7,), (9, 1, 1)])
def test_packed_layout_without_savings_is_none(lengths):
    assert packed_layout(positions(*lengths)) is None


@pytest.mark.parametrize(("family", "found"), [("llama", UNPACKED_SDPA), ("gemma2", "eager"), ("falcon", "sdpa")])
def test_unpacked_sdpa_replaces_sdpa_if_the_class_supports_it(family, found, tmp_path):
    write_family(family, tmp_path)
    base = load_base(tmp_path, QuantizationSpec(bits=16), torch.float32, FAMILIES[family].attention, "cpu")
    assert base.config._attn_implementation == found
    base.save_pretrained(tmp_path / "saved")
    assert UNPACKED_SDPA not in (tmp_path / "saved/config.json").read_text()


@pytest.mark.parametrize("max_fp32_tokens", [0, 256], ids=["model-dtype", "fp32"])
@pytest.mark.parametrize(
    "family", [name for name, facts in FAMILIES.items() if facts.attention == "sdpa" and facts.packing_is_exact]
)
def test_unpacked_attention_matches_masked_packed_attention(family, max_fp32_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked_attention, "_FP32_MAX_ROW_TOKENS", max_fp32_tokens)
    write_family(family, tmp_path)
    batch, found = collate(token_rows(5), CPU, packing=True), []
    for attention in ("sdpa", UNPACKED_SDPA):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float32)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_model_unpacks_packed_rows(tmp_path, monkeypatch):
    seen: list[tuple[int, ...]] = []
    real = unpacked_attention.sdpa_attention_forward

    def record(module, query, *rest, **settings):
        seen.append(tuple(query.shape[::2]))
        return real(module, query, *rest, **settings)

    monkeypatch.setattr(unpacked_attention, "sdpa_attention_forward", record)
    write_family("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=UNPACKED_SDPA)
    rows = token_rows(5)
    batch = collate(rows, CPU, packing=True)
    layouts = packed_layout.cache_info().misses
    model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    # Computed once for both layers: in each of 30 layers it would take 5 ms of a pass over 640 tokens (2 cores).
    assert packed_layout.cache_info().misses == layouts + 1
    assert len(packed_layout(batch.position_ids).masks) == 1
    model(input_ids=batch.input_ids, use_cache=False)
    unpacked_shape, packed_shape = (5, max(len(row.input_ids) for row in rows)), (1, batch.input_ids.shape[1])
    assert seen == [unpacked_shape] * (len(seen) // 2) + [packed_shape] * (len(seen) // 2)


def count_flops(model, batch) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).logits.sum().backward()  # with a cache, packed rows are not told apart
    return counter.get_total_flops()


def test_packed_rows_cost_as_much_as_the_same_rows_alone(tmp_path):
    """Without unpacking, these 16 rows cost 16 times the attention."""
    write_model(tmp_path, hidden_size=256, max_position_embeddings=512)
    base = load_base(tmp_path, QuantizationSpec(bits=16), torch.float32, "sdpa", "cpu")
    base.get_input_embeddings().requires_grad_()
    rows = [TokenRow(tuple(range(2, 2 + 60 + number % 5)), ((1, 20),)) for number in range(16)]
    ids = [torch.tensor([row.input_ids]) for row in rows]
    places = [torch.arange(len(row.input_ids))[None] for row in rows]
    alone = sum(
        count_flops(base, {"input_ids": one, "position_ids": place}) for one, place in zip(ids, places, strict=True)
    )
    packed = {"input_ids": torch.cat(ids, 1), "position_ids": torch.cat(places, 1)}
    assert count_flops(base, packed) == pytest.approx(alone, rel=0.05)
    base.set_attn_implementation("sdpa")
    assert count_flops(base, packed) > 1.1 * alone
