"""Bases and adapters of somebody else in `qlora chat` and `qlora merge`: refused with file and cause."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers, processors
from transformers import GenerationConfig as GenerationSettings

from qlora_api.local_requests import ChatRequest, GenerationConfig, MergeRequest
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.generation import generate_batch
from qlora_trainer.inference.compatibility import check_adapter_config, check_adapter_weights
from qlora_trainer.inference.multi_adapter_chat import MultiAdapterModel, load_multi_adapter_model
from qlora_trainer.inference.published_adapter import open_adapter
from qlora_trainer.merge_job import check_target, merge_published
from qlora_trainer.model.architecture import build_empty, load_tokenizer
from qlora_trainer.model.generation_config import check_generation_config, read_stop_tokens
from qlora_trainer.model.model_files import check_model_files
from qlora_trainer.publishing import merge_weights
from tests.unit.trainer.conftest import THIRD_PARTY_WARNINGS
from tests.unit.trainer.tiny import make_tokenizer, write_model
from tests.unit.trainer.trained import PLAIN, RESOLVER, write_published

pytestmark = [
    pytest.mark.timeout(120),  # a library that waits for a pipe fails, and does not stop the others
    *(pytest.mark.filterwarnings(warning) for warning in THIRD_PARTY_WARNINGS),
]
WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
GENERATION = "generation_config.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter of it."""
    folder = tmp_path_factory.mktemp("published")
    write_model(folder / "model")
    return write_published(folder / "result", folder / "model", PLAIN, QuantizationSpec(bits=16))


@pytest.fixture
def adapter(published: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, for changes."""
    return Path(shutil.copytree(published, tmp_path / "adapter"))


@pytest.fixture
def base(published: Path, tmp_path: Path) -> Path:
    """A copy of the base, for changes."""
    return Path(shutil.copytree(published.parents[1] / "model", tmp_path / "model"))


def open_chat(adapter: Path, base: Path, work: Path) -> MultiAdapterModel:
    request = ChatRequest(adapters=(adapter.as_uri(),), device="cpu", model=base.as_uri())
    return load_multi_adapter_model(request, RESOLVER, work)


def ask(loaded: MultiAdapterModel, temperature: float = 0.0) -> list[str]:
    generation = GenerationConfig(max_new_tokens=3, temperature=temperature)
    return [reply.text for reply in loaded.start_conversation(generation, keep_history=False).ask("What?").replies]


def merge(adapter: Path, base: Path, work: Path) -> None:
    target = str(work / "merged")
    merge_published(
        MergeRequest(adapter=adapter.as_uri(), target=target, base="original", model=base.as_uri()), RESOLVER, work
    )


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


ODD_SETTINGS = [
    {"r": 10**18}, {"r": "8"}, {"r": [1]}, {"r": None}, {"r": 1.5}, {"r": 8.0}, {"r": True}, {"r": 0},
    {"lora_alpha": "8"}, {"lora_alpha": None}, {"lora_alpha": 10**400}, {"lora_alpha": float("nan")},
    {"lora_dropout": "0"}, {"lora_dropout": 5}, {"lora_dropout": None},
    {"task_type": "X"}, {"task_type": ["CAUSAL_LM"]}, {"task_type": "SEQ_CLS"}, {"use_dora": "yes"},
    {"inference_mode": []}, {"base_model_name_or_path": ["x"]}, {"revision": 5},
    {"rank_pattern": {"q_proj": "x"}}, {"rank_pattern": {"q_proj": 10**18}}, {"alpha_pattern": {"q_proj": None}},
    {"alpha_pattern": {"q_proj": 10**400}},
]  # fmt: skip


@pytest.mark.parametrize("setting", ODD_SETTINGS, ids=str)
def test_adapter_setting_of_another_type_is_refused(adapter: Path, setting: dict[str, Any]) -> None:
    edit(adapter / SETTINGS, **setting)
    with pytest.raises(
        RunError, match=rf"adapter_config\.json: {next(iter(setting))} is .*; use the adapter"
    ) as caught:
        check_adapter_config(adapter)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_published_adapter_has_the_expected_settings_and_weights(published: Path) -> None:
    check_adapter_config(published)
    check_adapter_weights(published)


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return lambda path: save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def with_header(header: bytes, length: int | None = None) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def leave_pickle(path: Path) -> None:
    path.unlink()
    path.with_name("adapter_model.bin").write_bytes(pickle.dumps({}))


ODD_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No such file"),
    "pickle-only": (leave_pickle, "No such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "not a regular file"),
    "circle": (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links"),
    "empty": (lambda path: path.write_bytes(b""), "header"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 100), "has a header of"),
    "header-beyond": (with_header(b"{}", 2**63), "has a header of"),
    "header-long": (with_header(b"[" * (17 << 20)), "has a header of 17,825,792 bytes, more than 16,777,216"),
    "header-nested": (with_header(b"[" * 100_000), "header"),
    "not-a-number": (change_weights(lambda tensor: tensor * float("nan")), "no finite"),
    "infinite": (change_weights(lambda tensor: tensor + float("inf")), "no finite"),
    "integers": (change_weights(lambda tensor: tensor.to(torch.int64)), "no finite"),
    "complex": (change_weights(lambda tensor: tensor.to(torch.complex64)), "no finite"),
    "8-bit": (change_weights(lambda tensor: tensor.to(torch.float8_e4m3fn)), "no finite"),
}


@pytest.mark.parametrize(("change", "cause"), ODD_WEIGHTS.values(), ids=ODD_WEIGHTS)
def test_weights_that_are_no_finite_numbers_are_refused(
    adapter: Path, change: Callable[[Path], object], cause: str
) -> None:
    change(adapter / WEIGHTS)
    with pytest.raises(
        RunError, match=rf"the adapter's adapter_model\.safetensors: .*{cause}.*; use the adapter"
    ) as caught:
        check_adapter_weights(adapter)
    assert caught.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize("use", [open_chat, merge])
def test_chat_and_merge_check_weights_before_loading_them(
    adapter: Path, base: Path, tmp_path: Path, use: Callable[[Path, Path, Path], object]
) -> None:
    (adapter / WEIGHTS).unlink()
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: No such file"):
        use(adapter, base, tmp_path)


REFUSED_GENERATION: dict[str, bytes] = {
    "list": b"[]",
    "null": b"null",
    "no-json": b"{",
    "nested": b"[" * 100_000,
    "token-text": b'{"eos_token_id": "abc"}',
    "token-beyond": b'{"eos_token_id": 1e400}',
    "token-long": b'{"eos_token_id": 1000000000000000000000000}',
    "token-object": b'{"pad_token_id": {"a": 1}}',
    "token-nested": b'{"eos_token_id": [[1]]}',
    "class": b'{"watermarking_config": {"x": 1}}',
    "class-number": b'{"watermarking_config": 5}',
    "method": b'{"to_dict": "x"}',
    "validator": b'{"validate": 1}',
}


@pytest.mark.parametrize("content", REFUSED_GENERATION.values(), ids=REFUSED_GENERATION)
def test_generation_settings_that_cannot_be_read_are_model_unsupported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / GENERATION).write_bytes(content)
    with pytest.raises(
        RunError, match=r"^--base-model: generation_config\.json .*; correct it, or remove it$"
    ) as caught:
        check_generation_config(tmp_path, "--base-model")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize("tokens", ["abc", [1, "x"], 10**30, -5, 1.5, {"a": 1}, [[1]]], ids=str)
def test_stop_tokens_of_an_adapter_that_are_none_are_refused(tmp_path: Path, tokens: Any) -> None:
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": tokens}))
    with pytest.raises(RunError, match=r"the adapter's generation_config\.json has eos_token_id: .*; use the adapter"):
        read_stop_tokens(tmp_path)


@pytest.fixture(scope="module")
def chat(published: Path, tmp_path_factory: pytest.TempPathFactory) -> MultiAdapterModel:
    return open_chat(published, published.parents[1] / "model", tmp_path_factory.mktemp("work"))


UNUSED_GENERATION: list[dict[str, Any]] = [
    {"stop_strings": ["a"]}, {"prompt_lookup_num_tokens": "x"}, {"num_beams": 10**9}, {"force_words_ids": [[1]]},
    {"suppress_tokens": ["x"]}, {"bad_words_ids": "x"}, {"guidance_scale": "x"}, {"forced_eos_token_id": "x"},
    {"sequence_bias": {"a": 1}}, {"num_return_sequences": 10**9}, {"temperature": "x"}, {"penalty_alpha": 0.5},
    {"repetition_penalty": -1.0}, {"exponential_decay_length_penalty": [1]}, {"max_time": "x"}, {"dola_layers": "low"},
]  # fmt: skip
"""Some load code of the hub, need a tokenizer or take any memory; others are of another type."""


@pytest.mark.parametrize("setting", UNUSED_GENERATION, ids=str)
def test_answers_are_generated_without_settings_that_are_not_simple(
    chat: MultiAdapterModel, setting: dict[str, Any]
) -> None:
    model = chat.loaded.model
    expected, own = ask(chat), model.generation_config
    odd = GenerationSettings()
    vars(odd).update(setting)
    model.generation_config = odd
    try:
        assert ask(chat) == expected
        assert model.generation_config is odd
    finally:
        model.generation_config = own


def test_answers_are_generated_with_settings_that_are_simple(chat: MultiAdapterModel) -> None:
    model, tokenizer = chat.loaded.model, make_tokenizer()
    own = model.generation_config
    [plain] = generate_batch(chat.loaded, [[3, 4, 5]], tokenizer, 4)
    model.generation_config = GenerationSettings(suppress_tokens=tokenizer(plain.text)["input_ids"])
    try:
        [other] = generate_batch(chat.loaded, [[3, 4, 5]], tokenizer, 4)
    finally:
        model.generation_config = own
    assert other.text != plain.text


def test_model_whose_outputs_are_not_finite_cannot_be_sampled(
    chat: MultiAdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = chat.loaded.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda states: states * float("nan"))
    with pytest.raises(RunError, match="base: its outputs are not finite, so that no answer can be sampled"):
        ask(chat, temperature=1.0)


METHODS = [{"save_pretrained": 5}, {"get_text_config": 5}, {"to_dict": 5}, {"text_config": {"to_json_string": "x"}}]


@pytest.mark.parametrize("field", [*METHODS, {"quantization_config": 5}, {"quantization_config": []}], ids=str)
def test_field_of_a_configuration_that_hides_a_method_is_refused(base: Path, field: dict[str, Any]) -> None:
    edit(base / "config.json", **field)
    with pytest.raises(RunError, match=r"^--base-model: config\.json has .*; remove it$") as caught:
        build_empty(base, "--base-model")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


ODD_QUANTIZATION: list[dict[str, Any]] = [
    {}, {"quant_method": "gptq"}, {"quant_method": ["x"]}, {"quant_method": "bitsandbytes", "load_in_4bit": "x"},
]  # fmt: skip


@pytest.mark.parametrize("stored", ODD_QUANTIZATION, ids=str)
def test_base_that_transformers_cannot_load_is_model_unsupported(
    published: Path, base: Path, tmp_path: Path, stored: dict[str, Any]
) -> None:
    edit(base / "config.json", quantization_config=stored)
    with pytest.raises(
        RunError, match=r"^spec\.model\.uri: transformers cannot load the model: .*; correct it"
    ) as caught:
        open_chat(published, base, tmp_path)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(
    "name", [GENERATION, "tokenizer.json", "model.safetensors", "additional_chat_templates/x.jinja"]
)
def test_pipe_in_a_folder_that_a_library_reads_is_refused(base: Path, name: str) -> None:
    (base / name).unlink(missing_ok=True)
    (base / name).parent.mkdir(exist_ok=True)
    os.mkfifo(base / name)
    message = rf"^--base-model: {name} is a pipe or a device, and no file; remove it$"
    with pytest.raises(RunError, match=message):
        check_model_files(base, "--base-model")
    with pytest.raises(RunError, match=message):
        load_tokenizer(base, field="--base-model")


def test_socket_of_a_version_control_tool_is_no_part_of_a_model(base: Path) -> None:
    (base / ".git").mkdir()
    os.mkfifo(base / ".git" / "fsmonitor--daemon.ipc")
    (base / "README.md").symlink_to("nowhere")
    check_model_files(base)


def set_part(**parts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({name: json.loads(part.__getstate__()) for name, part in parts.items()})


TOKENIZER_BOMBS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "replacements": (
        set_part(normalizer=normalizers.Sequence([normalizers.Replace(Regex("."), "." * 1000)] * 4)),
        "its normalizer may make a text 1,000,000,000,000 times as long",
    ),
    "prefix": (set_part(normalizer=normalizers.Prepend("a" * 50_000)), "its normalizer may make a text 50,000 times"),
    "template": (
        set_part(
            post_processor=processors.TemplateProcessing(
                single=["<s>"] * 20_000 + ["$A"], pair="$A $B", special_tokens=[("<s>", 0)]
            )
        ),
        "its post_processor may make a text",
    ),
}


@pytest.mark.parametrize(("change", "cause"), TOKENIZER_BOMBS.values(), ids=TOKENIZER_BOMBS)
def test_tokenizer_that_makes_a_text_thousands_of_times_as_long_is_refused(
    adapter: Path, change: Callable[[dict[str, Any]], object], cause: str
) -> None:
    content = json.loads((adapter / "tokenizer.json").read_text())
    change(content)
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"^--adapter: its tokenizer cannot be loaded: {cause}") as caught:
        load_tokenizer(adapter, field="--adapter")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize("template", [5, [{"name": "../../x", "template": "x"}], [{"name": "default", "template": 5}]])
def test_chat_template_that_is_no_text_is_refused(adapter: Path, template: Any) -> None:
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    edit(adapter / "tokenizer_config.json", chat_template=template)
    with pytest.raises(RunError, match="--adapter: its tokenizer cannot be loaded: "):
        load_tokenizer(adapter, field="--adapter")


def test_text_file_that_is_too_large_is_no_tokenizer(adapter: Path) -> None:
    with (adapter / "tokenizer.json").open("wb") as stream:
        stream.truncate(2 << 30)
    with pytest.raises(RunError, match=r"tokenizer\.json has more than 134,217,728 bytes; use another tokenizer"):
        load_tokenizer(adapter)


def test_link_out_of_an_adapter_that_no_manifest_lists_is_refused(adapter: Path, tmp_path: Path) -> None:
    """Otherwise `qlora merge` would copy what it points to into the merged model."""
    (tmp_path / "secret").write_text("token")
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match=r"chat_template\.jinja points outside its folder; put the file itself there"):
        open_adapter(RESOLVER, adapter.as_uri(), "ADAPTER", tmp_path)


def test_merge_into_a_link_is_refused_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(RunError, match=f"--to: .*{name} is not an empty folder; choose another one"):
            check_target(tmp_path / name)


def test_base_that_makes_merged_weights_infinite_is_refused(
    published: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("NaNs detected in the merged weights")

    monkeypatch.setattr(merge_weights, "_merge_layers", fail)
    with pytest.raises(RunError, match="the adapter: PEFT cannot merge it: ValueError: NaNs detected"):
        merge(published, base, tmp_path)
