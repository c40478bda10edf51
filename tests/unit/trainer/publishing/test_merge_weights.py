"""Merging: the merged model computes the same as base and adapter, on either base, and the difference is measured."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.model.attention import FLASH
from qlora_trainer.publishing.merge_weights import MergeTask, choose_rows, merge_adapter
from tests.unit.trainer.trained import PLAIN, with_base, write_trained
from tests.unit.trainer.tuned import NF4


@pytest.mark.parametrize("dora", [False, True])
def test_merge_into_dequantized_base_is_nearly_exact(tmp_path, dora):
    task = write_trained(tmp_path, PLAIN.model_copy(update={"dora": dora}), NF4)
    exact = merge_adapter(with_base(task, "dequantised"), tmp_path / "exact").difference
    other = merge_adapter(task, tmp_path / "other").difference
    assert exact.tokens == sum(row.label_count for row in task.rows)
    assert exact.relative < 0.02  # bf16 keeps 8 bits
    assert exact.same_choice > 0.9
    # The original base differs from the one used in training by the quantization error.
    assert other.relative > 3 * exact.relative
    assert abs(exact.merged_loss - exact.unmerged_loss) < 0.05


# LLM.int8 also quantizes the inputs of a layer, which a merged model does not.
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.05), (16, 0.02)])
def test_8_and_16_bit_bases_can_be_merged(tmp_path, bits, bound):
    task = write_trained(tmp_path, PLAIN, QuantizationSpec(bits=bits))
    assert merge_adapter(with_base(task, "dequantised"), tmp_path / "merged").difference.relative < bound


def test_adapter_trained_with_flash_attention_is_merged_on_cpu(tmp_path):
    task = write_trained(tmp_path, PLAIN, NF4)
    plain = merge_adapter(with_base(task, "dequantised"), tmp_path / "plain").difference
    flash = replace(task, base="dequantised", record=task.record.model_copy(update={"attention": FLASH}))
    assert merge_adapter(flash, tmp_path / "flash").difference == plain


def test_merge_report_and_tokenizer_are_written_with_the_model(tmp_path):
    task = write_trained(tmp_path, PLAIN, NF4)
    report = merge_adapter(task, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/merge.json").read_text()) == json.loads(report.model_dump_json(by_alias=True))
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_merge_without_rows_has_no_difference(tmp_path):
    task = write_trained(tmp_path, PLAIN, NF4)
    report = merge_adapter(MergeTask(task.model, task.adapter, "original", task.record, ()), tmp_path / "merged")
    assert report.difference is None


def test_choose_rows_stops_at_the_token_limit_but_keeps_one_row():
    long, short = TokenRow(tuple(range(400)), ((1, 400),)), TokenRow(tuple(range(101)), ((1, 101),))
    assert choose_rows([long, short]) == [long]
    assert choose_rows([short, short, short]) == [short, short]
    assert choose_rows([]) == []
