"""Files of a model that ask for more than any model has: each ends as ModelUnsupported, soon and in bounded memory."""

import json
import time
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from qlora_api.reasons import Reason
from qlora_planner.models.families import read_recorded_shape, read_shape
from qlora_planner.models.shapes import UnknownModelError
from qlora_trainer.data import tokenization
from qlora_trainer.data.tokenization import decode, decode_answers, prompt_ids
from qlora_trainer.errors import RunError
from qlora_trainer.model import architecture
from qlora_trainer.model.architecture import build_empty, load_tokenizer
from qlora_trainer.runtime.resource_limits import memory_limit
from qlora_trainer.storage.snapshots import check_text_files
from qlora_trainer.storage.store import MODEL_FIELD

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4}
TRILLION = 10**12
MAX_SECONDS = 60


CONFIGS = {
    "layers": (LLAMA | {"num_hidden_layers": TRILLION}, "cannot build it: TimeoutError"),
    "labels": (LLAMA | {"num_labels": TRILLION}, "cannot build it"),
    "layer-types": ({"model_type": "gemma2", "num_hidden_layers": TRILLION}, "cannot build it"),
    "vocabulary": (LLAMA | {"vocab_size": 1 << 50}, "weights, more than 10,000,000,000,000"),
    "vocabulary-overflow": (LLAMA | {"vocab_size": 1 << 62}, "cannot build it"),
    "vocabulary-negative": (LLAMA | {"vocab_size": -1}, "cannot build it"),
    "vocabulary-float": (LLAMA | {"vocab_size": 1e300}, "cannot build it"),
    "no-heads": (LLAMA | {"num_attention_heads": 0}, "cannot build it"),
    "layers-text": (LLAMA | {"num_hidden_layers": "2"}, "cannot build it"),
    "list": ([LLAMA], "config.json is not a JSON object"),
    "digits": ("9" * 5000, "config.json is not JSON"),
    "deep": ('{"a":' + "[" * 100_000, "config.json is nested in more than 100 levels"),
    "deep-enough": ('{"a":' + "[" * 120 + "]" * 120 + "}", "config.json is nested in more than 100 levels"),
    "long": ('{"a": "' + "x" * (5 << 20) + '"}', "config.json has more than 4,194,304 bytes"),
    "empty": ("", "config.json is not JSON"),
    "not-utf8": ("\xff\xfe\xff", "config.json is not JSON"),
}


def write_config(folder: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    return folder


# The limit's exception may come inside hypothesis' callback of the garbage collector, which drops it; it is repeated.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("config", CONFIGS)
def test_config_that_cannot_be_built_is_model_unsupported(tmp_path, monkeypatch, config):
    monkeypatch.setattr("qlora_trainer.model.architecture._BUILD_SECONDS", 5.0)
    content, message = CONFIGS[config]
    start = time.process_time()
    with pytest.raises(RunError) as caught:
        build_empty(write_config(tmp_path, content))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert message in caught.value.message
    assert len(caught.value.message) < 1000
    assert time.process_time() - start < MAX_SECONDS


@pytest.mark.parametrize(
    "value", [TRILLION, 1 << 60, 0, -1, 1.5, 2.0, True, "2", None, [], float("nan"), float("inf"), 10**4000]
)
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"])
def test_planner_refuses_sizes_that_no_model_has(key, value):
    with pytest.raises(UnknownModelError):
        read_shape(LLAMA | {key: value})


@pytest.mark.parametrize("config", ["[]", "{", "[" * 2000, '"llama"', "9" * 2000, "{}" + " " * 4000])
def test_planner_refuses_a_recorded_config_that_is_no_object(config):
    with pytest.raises(UnknownModelError):
        read_recorded_shape(config)


def with_charsmap(charsmap: str) -> str:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    return json.dumps({"version": "1.0", "normalizer": normalizer, "model": model})


TOKENIZERS = {
    "no-json": "{",
    "other-json": '{"version": "1.0", "model": {"type": "X"}}',
    "list": "[]",
    "deep": "[" * 100_000,
    # Each of these makes the library panic.
    "merge-longer-than-any-token": json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"aa": 0, "bb": 1}, "merges": [["aa", "bb"]]}}
    ),
    "prefix-longer-than-a-token": json.dumps(
        {
            "version": "1.0",
            "model": {
                "type": "BPE",
                "vocab": {"a": 0},
                "merges": [["a", "a"]],
                "continuing_subword_prefix": "##########",
            },
        }
    ),
    "charsmap-no-base64": with_charsmap("!"),
    "charsmap-empty": with_charsmap(""),
    "charsmap-beyond": with_charsmap("////f2FiY2Q="),
    "regex": json.dumps(
        {
            "version": "1.0",
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        }
    ),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokenizer_that_cannot_be_loaded_is_model_unsupported(tmp_path, tokenizer):
    write_config(tmp_path, LLAMA)
    (tmp_path / "tokenizer.json").write_text(TOKENIZERS[tokenizer])
    with pytest.raises(RunError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_text_file_that_is_too_large_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(2 << 30)
    with pytest.raises(RunError, match=r"tokenizer\.json has 2,147,483,648 bytes, more than 134,217,728; remove it"):
        check_text_files(tmp_path, ("tokenizer.json",), MODEL_FIELD)


def test_regular_expression_of_exponential_time_is_model_unsupported():
    """The library stops such a match with a panic, which Python sees as a BaseException."""
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = Split(Regex("(a|aa)+$"), "isolated")
    with pytest.raises(RunError, match=r"spec\.model\.uri: its tokenizer cannot encode a row: Onig: ") as caught:
        prompt_ids(["a" * 34 + "b"], PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_tokenizer_that_does_not_come_back_is_model_unsupported(monkeypatch):
    monkeypatch.setattr(tokenization, "MAX_SECONDS", 0.1)
    with pytest.raises(
        RunError, match=r"spec\.model\.uri: its tokenizer cannot encode a row: it takes more than 0\.1 s; use"
    ) as caught:
        prompt_ids(["a"], lambda *_, **__: time.sleep(5))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_decoder_that_panics_is_model_unsupported():
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.Strip("a", 5, 5)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for call in (lambda: decode(wrapped, [0]), lambda: decode_answers(wrapped, [[0]])):
        with pytest.raises(RunError, match=r"its tokenizer cannot decode tokens: index out of bounds") as caught:
            call()
        assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_tokenizer_with_too_many_values_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "_MAX_TOKENIZER_VALUES", 1000)
    write_config(tmp_path, LLAMA)
    (tmp_path / "tokenizer.json").write_text("[" * 1001)
    with pytest.raises(RunError, match=r"tokenizer\.json has more than 1,000 values; use another tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_that_takes_too_long_to_load_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "_LOAD_SECONDS", 0.1)
    monkeypatch.setattr(architecture.AutoTokenizer, "from_pretrained", lambda *_, **__: time.sleep(5))
    write_config(tmp_path, LLAMA)
    with pytest.raises(RunError, match=r"its tokenizer cannot be loaded: it takes more than 0\.1 s"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_a_token_for_a_text_is_model_unsupported():
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="missing"))
    with pytest.raises(RunError, match=r"its tokenizer cannot encode a row: WordLevel error") as caught:
        prompt_ids(["b"], PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_memory_limit_ends_with_its_block():
    with pytest.raises(MemoryError), memory_limit(64 << 20):
        bytearray(128 << 20)
    assert len(bytearray(128 << 20)) == 128 << 20
