"""Limits of time and memory on what a library or a template does in one piece, where no exception ends it."""

import base64
import json
import signal
import struct

import pytest
from tokenizers import Tokenizer

from qlora_trainer.data import render_limits, tokenization
from qlora_trainer.data.render_limits import CpuBudget
from qlora_trainer.data.tokenization import tokenize
from tests.unit.security.children import run_in_child


def char_map(replacement: bytes) -> str:
    """Return a SentencePiece map of `a` to a text: a double array of three nodes, and the texts."""
    units = [0] * 1024
    units[0], units[256 ^ ord("a")] = 256 << 10, 512 << 10 | 1 << 8 | ord("a")
    units[256 ^ ord("a") ^ 512] = 1 << 31
    trie = struct.pack("<1024I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + replacement + b"\0").decode()


def several(kind: str, steps: str, step: dict[str, object], times: int) -> dict[str, object]:
    return {kind: {"type": "Sequence", steps: [step] * times}}


INSERTION: dict[str, object] = {"type": "Replace", "pattern": {"Regex": ""}, "content": "b"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEXT_TWICE = [{"Sequence": {"id": "A", "type_id": 0}}] * 2
EXPANSIONS: dict[str, dict[str, object]] = {
    "map-of-characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": char_map(b"z" * 8000)}},
    "insertions": several("normalizer", "normalizers", INSERTION, 10),
    "bytes-of-bytes": several("pre_tokenizer", "pretokenizers", BYTES, 10),
    "text-repeated": {
        "post_processor": {
            "type": "TemplateProcessing", "single": TEXT_TWICE * 500, "pair": TEXT_TWICE, "special_tokens": {},
        },
    },
}  # fmt: skip


def encode(steps: dict[str, object]) -> str:
    tokenization.MAX_BYTES = 64 << 20
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "z": 2, "\u00ff": 3}, "merges": []}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model} | steps))
    tokenize(tokenizer.encode_batch, ["a\u00ff" * 10_000])
    return "encoded"


@pytest.mark.parametrize("steps", EXPANSIONS.values(), ids=EXPANSIONS)
def test_tokenizer_that_multiplies_a_text_takes_bounded_memory(steps):
    ended = run_in_child(encode, steps)
    assert ended.reason == "ModelUnsupported"
    assert ended.message.endswith("cannot encode a row: it takes more than 64 MiB of memory; use another model")
    assert ended.grown < 768 << 20


def test_text_of_the_template_adds_no_time():
    budget = CpuBudget(left=1.0)
    with budget.one_row(1000):
        budget.add_for_text("x" * 20_000_000)
    assert budget.left < 1.01


def spend_the_time_of_a_row() -> str:
    render_limits.ROW_SECONDS = 0.1
    with CpuBudget(enabled=True).one_row(1000):
        while True:
            pass


def test_time_of_a_row_ends_the_process():
    """Renderings have a budget, but not what finds the answers in them: millions of tags, answers and spaces."""
    assert run_in_child(spend_the_time_of_a_row).reason == f"exit code {-signal.SIGVTALRM}"
