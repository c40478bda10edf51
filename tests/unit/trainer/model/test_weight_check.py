"""What is found of a model's weights in preparation, from headers alone, and again wherever they are loaded."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import describe
from qlora_trainer.model.base_model import load_base
from qlora_trainer.prepare import prepare
from tests.hub import FakeHub, Repository
from tests.unit.trainer.families import family_config
from tests.unit.trainer.tiny import (
    instruction_rows,
    make_spec,
    make_tokenizer,
    prepare_config,
    write_model,
    write_rows,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(tmp_path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: weights.pop(name))


def reshape(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({QUERY: weights[QUERY][:8].contiguous()}))


def rename(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"model.embeddings.weight": weights.pop(EMBEDDING)}))


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def replace_with(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content) and None


def shard(folder: Path) -> None:
    """Split the weights over two files, of which the second is not copied."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    first = dict(list(weights.items())[:5])
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    names = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in weights}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def index_of(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(content) and None


def declare(**quantization: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "quantization_config": quantization}))

    return change


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"
BROKEN = {
    "no-embedding": (without(EMBEDDING), Reason.MODEL_UNSUPPORTED, ["lack", EMBEDDING, "random"]),
    "no-projection": (without(QUERY), Reason.MODEL_UNSUPPORTED, ["lack 1 weights", QUERY]),
    "renamed": (rename, Reason.MODEL_UNSUPPORTED, ["lack", EMBEDDING]),
    "other-shape": (reshape, Reason.MODEL_UNSUPPORTED, ["another shape", f"{QUERY} is [8, 64] and should be [64, 64]"]),
    "cut": (cut, Reason.MODEL_UNSUPPORTED, [WEIGHTS, "that its header announces", "copy the model again"]),
    "git-lfs-pointer": (replace_with(POINTER), Reason.MODEL_UNSUPPORTED, [WEIGHTS, "git lfs pull"]),
    "empty": (replace_with(b""), Reason.MODEL_UNSUPPORTED, [WEIGHTS, "0 bytes"]),
    "html": (replace_with(b"<html>Please log in</html>"), Reason.MODEL_UNSUPPORTED, ["no safetensors file"]),
    "huge-header": (replace_with(struct.pack("<Q", 2**60)), Reason.MODEL_UNSUPPORTED, ["no safetensors file"]),
    "header-of-text": (replace_with(struct.pack("<Q", 4) + b"weig"), Reason.MODEL_UNSUPPORTED, ["not JSON of tensors"]),
    "header-of-lists": (
        replace_with(struct.pack("<Q", 4) + b"[[]]"),
        Reason.MODEL_UNSUPPORTED,
        ["not JSON of tensors"],
    ),
    "missing-shard": (shard, Reason.MODEL_NOT_FOUND, ["names 2 files", "'model-00002-of-00002.safetensors'"]),
    "index-of-text": (index_of("weights"), Reason.UNSAFE_MODEL_FORMAT, [INDEX, "correct the index"]),
    "index-of-lists": (index_of('{"weight_map": []}'), Reason.UNSAFE_MODEL_FORMAT, [INDEX, "correct the index"]),
    "index-elsewhere": (
        index_of('{"weight_map": {"model.embed_tokens.weight": "../../secret"}}'),
        Reason.UNSAFE_MODEL_FORMAT,
        [INDEX, "'..'"],
    ),
    "other-name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "weights.safetensors"),
        Reason.MODEL_UNSUPPORTED,
        ["weight files cannot be read"],
    ),
    "gptq": (declare(quant_method="gptq", bits=4), Reason.MODEL_UNSUPPORTED, ["(gptq)", "original weights"]),
    "awq": (
        declare(quant_method="awq", bits=4, group_size=128, version="gemm", zero_point=True),
        Reason.MODEL_UNSUPPORTED,
        ["(awq)", "original weights"],
    ),
    "gpt-oss": (
        declare(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"]),
        Reason.MODEL_UNSUPPORTED,
        ["(mxfp4)", "original weights", "quantization_config=Mxfp4Config(dequantize=True)"],
    ),
    "deepseek-v3": (
        declare(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[128, 128]),
        Reason.MODEL_UNSUPPORTED,
        ["(fp8)", "original weights", "quantization_config=FineGrainedFP8Config(dequantize=True)"],
    ),
    "qwen3-fp8": (
        declare(quant_method="fp8", activation_scheme="dynamic", modules_to_not_convert=["lm_head"]),
        Reason.MODEL_UNSUPPORTED,
        ["(fp8)", "FineGrainedFP8Config(dequantize=True)"],
    ),
    "llama-4-fp8": (
        declare(quant_method="compressed-tensors", format="float-quantized", quantization_status="compressed"),
        Reason.MODEL_UNSUPPORTED,
        ["(compressed-tensors)", "CompressedTensorsConfig(dequantize=True)"],
    ),
    "nameless": (declare(bits=4), Reason.MODEL_UNSUPPORTED, ["original weights"]),
    "stored-in-8-bits": (
        declare(quant_method="bitsandbytes", load_in_8bit=True),
        Reason.MODEL_UNSUPPORTED,
        ["spec.quantization.bits", "already stored in 8 bits", "and 8 in bits"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_trap_45_broken_weights_are_refused_in_preparation(model, tmp_path, case):
    damage, reason, fragments = BROKEN[case]
    damage(model)
    error = prepare_error(f"file://{model}", tmp_path)
    assert error.reason == reason, error.message
    for fragment in ("spec.", *fragments):
        assert fragment in error.message


@pytest.mark.parametrize("case", ["no-embedding", "other-shape", "cut", "git-lfs-pointer", "missing-shard"])
def test_broken_weights_on_the_hub_are_refused_without_downloading_them(model, tmp_path, case):
    damage, reason, fragments = BROKEN[case]
    damage(model)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with FakeHub({"org/tiny": Repository(files)}) as hub:
        error = prepare_error("hf://org/tiny", tmp_path, Platform(hub_endpoint=hub.endpoint))
    assert error.reason == reason, error.message
    for fragment in fragments:
        assert fragment in error.message


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("case", ["no-embedding", "no-projection", "other-shape"])
def test_trap_44_broken_weights_are_never_loaded(model, bits, case):
    damage, reason, fragments = BROKEN[case]
    damage(model)
    with pytest.raises(RunError) as caught:
        load_base(model, QuantizationSpec(bits=bits), torch.bfloat16, "sdpa", "cpu")
    assert caught.value.reason == reason
    for fragment in fragments:
        assert fragment in caught.value.message


def test_stale_index_beside_a_single_file_is_ignored(model, tmp_path):
    shard(model)
    write_model(model)
    assert {path.name for path in model.glob("*.safetensors*")} >= {WEIGHTS, INDEX}
    assert prepare(prepare_config(spec_of(f"file://{model}", tmp_path)), work=tmp_path / "work").published is None


def test_base_stored_by_bitsandbytes_in_the_bits_of_the_spec_is_prepared_and_not_merged(model, tmp_path):
    base = load_base(model, QuantizationSpec(bits=4), torch.bfloat16, "sdpa", "cpu")
    base.save_pretrained(tmp_path / "stored")
    make_tokenizer().save_pretrained(tmp_path / "stored")
    uri, rows = f"file://{tmp_path}/stored", write_rows(tmp_path / "rows.jsonl", instruction_rows())
    spec = make_spec(uri, rows, f"file://{tmp_path}/output")
    assert prepare(prepare_config(spec), work=tmp_path / "work").model.architecture == "LlamaForCausalLM"
    load_base(tmp_path / "stored", QuantizationSpec(bits=4), torch.bfloat16, "sdpa", "cpu")
    merged = make_spec(uri, rows, f"file://{tmp_path}/output", output={"merged": "bf16"})
    with pytest.raises(RunError, match=r"spec\.output\.merged: .* stored in 4 bits"):
        prepare(prepare_config(merged), work=tmp_path / "work")


def test_weights_that_are_not_part_of_the_architecture_are_logged(model, tmp_path):
    rewrite(model, lambda weights: weights.update({"model.layers.9.extra.weight": torch.zeros(3)}))
    notes: list[str] = []
    prepare(prepare_config(spec_of(f"file://{model}", tmp_path)), notes.append, work=tmp_path / "work")
    assert [note for note in notes if "1 weights in the model's files are not part" in note]


def test_trap_48_row_with_a_token_beyond_the_embedding_is_refused(model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<novel>"])
    tokenizer.save_pretrained(model)
    rows = [*instruction_rows(), {"instruction": "Say <novel>", "output": "<novel>"}]
    error = prepare_error(f"file://{model}", tmp_path, rows=rows)
    assert error.reason == Reason.MODEL_UNSUPPORTED
    assert "token id 384, and the model's embedding has 384 rows" in error.message


def test_row_longer_than_position_table_is_refused(tmp_path):
    opt_with_positions(40).save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    error = prepare_error(f"file://{tmp_path}/opt", tmp_path)
    assert error.reason == Reason.MODEL_UNSUPPORTED
    assert "spec.training.maxLength" in error.message
    assert "40 positions; set maxLength to 40" in error.message
    spec = spec_of(f"file://{tmp_path}/opt", tmp_path, training={"maxLength": 40})
    assert prepare(prepare_config(spec), work=tmp_path / "work").dataset.training_rows == 32


def opt_with_positions(positions: int) -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1}
    tokens = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=positions, num_attention_heads=2, **sizes, **tokens))


def test_rows_longer_than_the_pretrained_context_are_logged(tmp_path):
    write_model(tmp_path / "model", max_position_embeddings=16)
    notes: list[str] = []
    prepare(prepare_config(spec_of(f"file://{tmp_path}/model", tmp_path)), notes.append, work=tmp_path / "work")
    assert [note for note in notes if "more than the 16 that the model was pretrained on" in note]


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        pytest.param(GPT2LMHeadModel(GPT2Config(n_positions=48, n_embd=32, n_layer=1, n_head=2)), 48, id="gpt2"),
        pytest.param(
            GPTJForCausalLM(GPTJConfig(n_positions=56, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)), 56, id="gptj"
        ),
        # Its table is of the vision tower.
        pytest.param(AutoModelForCausalLM.from_config(family_config("gemma3")), None, id="gemma3"),
    ],
)
def test_position_limit_is_the_size_of_the_table(model, positions):
    assert describe(model).positions == positions


def spec_of(uri: str, tmp_path: Path, rows: list[dict[str, str]] | None = None, **blocks: Any) -> Any:
    written = write_rows(tmp_path / "rows.jsonl", rows or instruction_rows())
    return make_spec(uri, written, f"file://{tmp_path}/output", **blocks)


def prepare_error(uri: str, tmp_path: Path, platform: Platform | None = None, **changes: Any) -> RunError:
    with pytest.raises(RunError) as caught:
        prepare(prepare_config(spec_of(uri, tmp_path, **changes), platform=platform), work=tmp_path / "work")
    return caught.value
