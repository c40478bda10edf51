"""An adapter loads on the model that it was trained on, and on no other, however similar."""

import pytest

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.inference.compatibility import check_compatible
from qlora_trainer.inference.published_adapter import open_adapter
from qlora_trainer.model.architecture import load_architecture
from tests.unit.trainer.tiny import write_model
from tests.unit.trainer.trained import PLAIN, RESOLVER, write_published
from tests.unit.trainer.tuned import NF4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    write_model(folder)
    return folder


def published(tmp_path, model, **lora):
    adapter = write_published(tmp_path, model, PLAIN.model_copy(update=lora), NF4)
    return open_adapter(RESOLVER, f"file://{adapter}", "ADAPTER", tmp_path)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"dora": True},
        {"rslora": True, "targets": ("q_proj", "v_proj"), "rank_pattern": {"v_proj": 2}},
        {"modules_to_save": ("lm_head", "norm"), "init": "gaussian"},
    ],
    ids=["plain", "dora", "ranks", "modules-to-save"],
)
def test_adapter_is_compatible_with_its_base(tmp_path, model, lora):
    check_compatible(published(tmp_path, model, **lora), model, "--base-model")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"num_hidden_layers": 1},
            "layers.1.mlp.down_proj.lora_A.weight is 4 x 128 in the adapter and would be missing",
        ),
        (
            {"intermediate_size": 96},
            "layers.0.mlp.down_proj.lora_A.weight is 4 x 128 in the adapter and would be 4 x 96",
        ),
    ],
)
def test_other_shape_is_rejected_with_the_first_difference(tmp_path, model, changes, difference):
    adapter = published(tmp_path, model)
    write_model(tmp_path / "other", **changes)
    with pytest.raises(RunError) as caught:
        check_compatible(adapter, tmp_path / "other", "--base-model")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert caught.value.message.startswith("--base-model: the adapter colours does not fit this model: ")
    assert difference in caught.value.message
    assert caught.value.message.endswith(f"use file://{model}, which it was trained on")


def test_larger_model_with_the_same_modules_is_rejected_by_its_size(tmp_path, model):
    adapter = write_published(tmp_path, model, PLAIN, NF4, parameters=load_architecture(model).parameters)
    found = open_adapter(RESOLVER, f"file://{adapter}", "ADAPTER", tmp_path)
    check_compatible(found, model, "--base-model")
    write_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(RunError, match="it has 135,616 weights, but the adapter's base has 98,624; use file://"):
        check_compatible(found, tmp_path / "other", "--base-model")


def test_model_without_the_target_modules_is_rejected(tmp_path, model):
    adapter = published(tmp_path, model, targets=("q_proj",))
    settings = adapter.folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"q_proj"', '"c_attn"'))
    with pytest.raises(RunError, match="does not fit this model"):
        check_compatible(adapter, model, "--base-model")
