"""Rehearsal: a whole run on a shrunk copy of the model finds in prepare what a GPU would find in its first minute."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_trainer import rehearsal
from qlora_trainer.errors import RunError
from qlora_trainer.model.shrunk_model import MAX_PARAMETERS, CannotShrinkError, shrink, write_shrunk_model
from qlora_trainer.prepare import prepare
from qlora_trainer.rehearsal import Rehearsal, RehearsalTask, rehearse, rehearse_in_process
from tests.unit.trainer.families import write_family
from tests.unit.trainer.tiny import SMALL, instruction_rows, make_spec, make_tokenizer, prepare_config, write_rows

# PEFT names weights of experts that a model of few layers does not have.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:target_parameters=")

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LONGCAT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_layers": 2,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Its router multiplies with the weight of a linear layer, which in 4 bits is no matrix."""


def make_task(folder: Path, **changes: Any) -> RehearsalTask:
    fields: dict[str, Any] = {
        "method": "qlora",
        "quantization": QuantizationSpec(bits=4),
        "lora": LoraSpec(rank=4, alpha=8, dropout=0.0, targets=("all-linear",)),
        "merged": None,
        "largest_token": 5,
    }
    return RehearsalTask(folder=str(folder), **fields | changes)


def write_config(folder: Path, family: str, **settings: Any) -> Path:
    AutoConfig.for_model(family, **settings).save_pretrained(folder)
    return folder


def test_copy_of_a_large_model_fits_and_keeps_the_size_of_a_head(tmp_path):
    write_shrunk_model(write_config(tmp_path / "large", "llama", **LLAMA_70B), tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert copy.num_parameters() <= MAX_PARAMETERS
    assert (copy.config.num_hidden_layers, copy.config.vocab_size) == (2, 128256)
    assert copy.config.hidden_size // copy.config.num_attention_heads == 128


def test_copy_has_a_layer_of_each_kind():
    kinds = [*3 * ["sliding_attention"], "full_attention"] * 8
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=32, layer_types=kinds)
    shrunk = shrink(config, 1)
    assert (shrunk.num_hidden_layers, shrunk.layer_types) == (4, kinds[:4])
    assert config.num_hidden_layers == 32


def test_model_whose_narrowest_copy_is_too_large_is_not_rehearsed(tmp_path):
    folder = write_config(tmp_path / "model", "llama", vocab_size=MAX_PARAMETERS)
    with pytest.raises(CannotShrinkError, match="too large"):
        write_shrunk_model(folder, tmp_path / "copy")
    assert "no smaller copy" in rehearse(make_task(folder), tmp_path).not_rehearsed


@pytest.mark.parametrize("changes", [{}, {"method": "full", "quantization": QuantizationSpec(bits=16)}], ids=str)
def test_family_that_no_test_trains_is_rehearsed(tmp_path, changes):
    assert rehearse(make_task(write_config(tmp_path / "model", "olmo2", **SMALL), **changes), tmp_path) == Rehearsal()


def test_stacked_experts_are_trained_and_merged(tmp_path):
    settings = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    task = make_task(write_config(tmp_path / "model", "mixtral", **settings), merged="original")
    assert rehearse(task, tmp_path) == Rehearsal()


def test_sparse_attention_is_trained_without_its_indexer(tmp_path):
    settings = SMALL | {"num_key_value_heads": 4, "index_n_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 16}
    assert rehearse(make_task(write_config(tmp_path / "model", "deepseek_v32", **settings)), tmp_path) == Rehearsal()


def test_prompts_of_different_lengths_are_generated_from(tmp_path, monkeypatch):
    """An evaluation pads them on the left, which a model may not support."""
    monkeypatch.setattr(rehearsal, "_train_with_transformers", lambda _: None)
    real = GenerationMixin.generate

    def refuse_padding(self: Any, attention_mask: Any = None, **settings: Any) -> Any:
        if attention_mask is not None and not attention_mask.all():
            raise NotImplementedError("left padding")
        return real(self, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(GenerationMixin, "generate", refuse_padding)
    found = rehearse(make_task(write_config(tmp_path / "model", "olmo2", **SMALL)), tmp_path)
    assert found.failed == "generating answers failed with NotImplementedError: left padding"


def test_stage_that_fails_is_named_with_its_error(tmp_path):
    folder = write_config(tmp_path / "model", "longcat_flash", **LONGCAT)
    found = rehearse(make_task(folder), tmp_path)
    assert found.failed.startswith(
        "comparing packed rows with separate ones failed with RuntimeError: mm: mat1 and mat2"
    )


def test_model_that_transformers_cannot_train_either_is_not_refused(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("strides should be multiple of 16 bytes")

    monkeypatch.setattr(rehearsal, "_train_with_transformers", fail)
    found = rehearse(make_task(write_config(tmp_path / "model", "olmo2", **SMALL)), tmp_path)
    assert (
        found.not_rehearsed
        == "transformers cannot train its copy: RuntimeError: strides should be multiple of 16 bytes"
    )


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("import sys; sys.stderr.write('Killed'); sys.exit(9)", "the process ended with 9: Killed"),
        ("import time; time.sleep(60)", "longer than 1 s"),
    ],
    ids=["killed", "slow"],
)
def test_process_that_is_killed_or_slow_refuses_nothing(tmp_path, monkeypatch, program, sentence):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(rehearsal, "_TIMEOUT_SECONDS", 1.0)
    assert sentence in "".join(rehearse_in_process(make_task(tmp_path), "OlmoForCausalLM", tmp_path))


def test_preparation_refuses_what_the_rehearsal_cannot_train(tmp_path):
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("longcat_flash", **LONGCAT))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    spec = make_spec(
        f"file://{folder}", rows, f"file://{tmp_path / 'output'}", lora={"targets": ["all-linear"], "dropout": 0.0}
    )
    with pytest.raises(RunError, match=r"spec\.model\.uri: a copy of LongcatFlash.* mat1 and mat2") as caught:
        prepare(prepare_config(spec), work=tmp_path / "work")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_family_that_tests_train_is_not_rehearsed(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse_in_process", lambda *_: pytest.fail("rehearsed"))
    folder = tmp_path / "model"
    write_family("qwen2", folder)
    make_tokenizer().save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    prepare(
        prepare_config(make_spec(f"file://{folder}", rows, f"file://{tmp_path / 'output'}")), work=tmp_path / "work"
    )


def test_result_that_was_published_before_is_not_rehearsed(tmp_path, monkeypatch):
    rehearsed: list[str] = []
    monkeypatch.setattr(rehearsal, "rehearse_in_process", lambda *_: iter(rehearsed.append("yes") or ()))
    folder = tmp_path / "model"
    write_family("olmo2", folder)
    make_tokenizer().save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    config = prepare_config(make_spec(f"file://{folder}", rows, f"file://{tmp_path / 'output'}"))
    prepared = prepare(config, work=tmp_path / "work")
    monkeypatch.setattr("qlora_trainer.prepare._name_result", lambda *_: prepared.model_copy(update={"published": 1}))
    monkeypatch.setattr("qlora_trainer.prepare.update_latest", lambda *_: None)
    prepare(config, work=tmp_path / "work")
    assert rehearsed == ["yes"]
