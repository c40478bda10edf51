"""What prepare reports if bitsandbytes can quantize only a part of a base, or nothing."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import MixtralConfig, MixtralForCausalLM

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import load_architecture
from qlora_trainer.model.base_model import load_base
from qlora_trainer.model.quantization import QuantizableWeights, describe_quantizable
from qlora_trainer.prepare import prepare
from tests.unit.trainer.families import write_family
from tests.unit.trainer.tiny import SMALL, instruction_rows, make_spec, make_tokenizer, prepare_config, write_rows

SIXTEEN = {"method": "lora", "quantization": {"bits": 16}}
FALCONS = {"lora": {"targets": ["query_key_value"]}}


def spec_of(folder, **blocks):
    rows = write_rows(folder / "rows.jsonl", instruction_rows())
    return make_spec(f"file://{folder}/model", rows, f"file://{folder}/output", **blocks)


def write_mixtral(folder):
    """Write a Mixtral with four experts, two of them active, stacked in one weight."""
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_local_experts=4)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_base_without_quantizable_layers_is_refused(tmp_path, bits):
    write_family("falcon", tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(
        RunError, match=rf"^spec\.quantization\.bits: FalconForCausalLM has no layer .* {bits} bits"
    ) as caught:
        prepare(prepare_config(spec_of(tmp_path, quantization={"bits": bits}, **FALCONS)), work=tmp_path / "work")
    assert caught.value.reason == Reason.MODEL_UNSUPPORTED
    assert "set spec.method to lora and spec.quantization.bits to 16" in caught.value.message
    prepared = prepare(prepare_config(spec_of(tmp_path, **SIXTEEN, **FALCONS)), work=tmp_path / "work")
    assert prepared.model.architecture == "FalconForCausalLM"


def test_base_with_few_quantizable_weights_is_logged(tmp_path):
    write_mixtral(tmp_path / "model")
    quantizable, notes = load_architecture(tmp_path / "model").quantizable, []
    base = load_base(tmp_path / "model", QuantizationSpec(bits=4), torch.float32, "sdpa", "cpu")
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    router_and_experts = 2 * (4 * 64 + 4 * 3 * 64 * 128)
    norms = 2 * 2 * 64 + 64
    assert quantizable == QuantizableWeights(attention, attention + router_and_experts + norms)
    assert quantizable.weights == sum(layer.in_features * layer.out_features for layer in layers)
    prepare(prepare_config(spec_of(tmp_path)), notes.append, work=tmp_path / "work")
    (note,) = [note for note in notes if "stored in 4 bits" in note]
    assert note.startswith("only 11% of the weights outside the embeddings are linear layers")


# peft names ranks of modules that Mixtral has in other releases of transformers.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_all_linear_includes_experts_and_changes_the_digest(tmp_path):
    write_mixtral(tmp_path / "model")
    names = sorted({name.rpartition(".")[2] for name in load_architecture(tmp_path / "model").linears})
    all_linear, by_name = (
        prepare(prepare_config(spec_of(tmp_path, lora={"dropout": 0, "targets": targets})), work=tmp_path / "work")
        for targets in (["all-linear"], names)
    )
    assert all_linear.digest != by_name.digest


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_prepare_refuses_adapter_settings_that_peft_rejects(tmp_path):
    write_mixtral(tmp_path / "model")
    with pytest.raises(RunError, match=r"^spec\.lora\.dropout: all-linear includes the experts .* to 0") as caught:
        prepare(prepare_config(spec_of(tmp_path, lora={"targets": ["all-linear"]})), work=tmp_path / "work")
    assert caught.value.reason == Reason.MODEL_UNSUPPORTED


def test_prepare_refuses_incompatible_target_with_the_reason_of_peft(tmp_path):
    write_family("mamba", tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(RunError, match=r"^spec\.lora\.targets: PEFT cannot adapt .* 'out_proj' is incompatible"):
        prepare(prepare_config(spec_of(tmp_path, lora={"targets": ["all-linear"]})), work=tmp_path / "work")


@pytest.mark.parametrize(
    ("found", "bits", "messages"),
    [
        pytest.param(QuantizableWeights(50, 100), 4, [], id="half"),
        pytest.param(QuantizableWeights(0, 100), 16, [], id="not-quantized"),
        pytest.param(QuantizableWeights(1 << 30, 21 << 30), 8, ["stays in 16 bits: 40.0 GiB"], id="little"),
    ],
)
def test_quantization_note_appears_only_below_the_threshold(found, bits, messages):
    notes = list(describe_quantizable(found, bits))
    assert len(notes) == len(messages)
    assert all(message in note for message, note in zip(messages, notes, strict=True))
