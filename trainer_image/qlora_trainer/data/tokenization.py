"""Encodes prompts, answers and texts as token rows: special tokens once, labels up to the end-of-text token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from qlora_api.reasons import Reason
from qlora_api.units import MIB
from qlora_trainer.data.rows import Example, Text
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.resource_limits import call_native

MAX_SECONDS: Final = 300.0
"""Time for a batch: tokenizers take 1 to 10 s for the 8 MiB that it may have, and Python's own up to a minute."""
MAX_BYTES: Final = 2560 * MIB
"""Memory for a batch, of the prepare pod's 4 GiB: it takes up to 2 GiB, at 256 bytes for each of 8 Mi tokens."""
Span: TypeAlias = tuple[int, int]
"""A half-open range of positions."""


@dataclass(frozen=True)
class TokenRow:
    """A tokenized row and its labels."""

    input_ids: tuple[int, ...]
    label_spans: tuple[Span, ...]
    """Positions of the label tokens, in order; never 0, as nothing predicts the first token of a row."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens of the prompt, for generation. Only validation rows have these and the two texts; plain text has none."""
    prompt: str = ""
    reference: str = ""
    earlier: "tuple[TokenRow, ...]" = ()
    """Rows for answers that the chat template renders otherwise once the conversation goes on; each ends with one."""

    @property
    def label_count(self) -> int:
        """Return the number of label tokens."""
        return sum(end - start for start, end in self.label_spans)

    def truncate(self, length: int) -> "TokenRow":
        """Return the row cut to at most `length` tokens."""
        if len(self.input_ids) <= length:
            return self
        label_spans = tuple((start, min(end, length)) for start, end in self.label_spans if start < length)
        return replace(self, input_ids=self.input_ids[:length], label_spans=label_spans)


def encode_examples(examples: Sequence[Example], tokenizer: Any, loss: str) -> list[TokenRow]:
    """Encode prompts and answers; labels are the answer and the end-of-text token, or all tokens with loss `all`."""
    prompts = prompt_ids([example.prompt for example in examples], tokenizer)
    ends = (tokenizer.eos_token or "",)
    answers = [without_end_token(example.answer, ends) for example in examples]
    texts = prompt_ids([example.prompt + answer for example, answer in zip(examples, answers, strict=True)], tokenizer)
    rows = []
    for example, answer, prompt, text in zip(examples, answers, prompts, texts, strict=True):
        # A token may span the boundary; prompt and full text then differ before the prompt ends, and it is a label.
        first = 1 if loss == "all" else max(common_prefix_length(prompt, text), 1)
        ids = (*text, tokenizer.eos_token_id)
        rows.append(TokenRow(ids, ((first, len(ids)),), tuple(prompt), example.prompt, answer))
    return rows


def encode_texts(texts: Sequence[Text], tokenizer: Any) -> list[TokenRow]:
    """Encode plain texts; all tokens but the first are labels, and so is the end-of-text token."""
    encoded = prompt_ids([without_end_token(text.text, (tokenizer.eos_token or "",)) for text in texts], tokenizer)
    return [TokenRow((*ids, tokenizer.eos_token_id), ((1, len(ids) + 1),)) for ids in encoded]


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize texts with the tokenizer's start token, exactly once, and without an end-of-text token."""
    encoded: list[list[int]] = tokenize(tokenizer, texts, add_special_tokens=True)["input_ids"]
    return [_without_end(_single_start(ids, tokenizer), tokenizer) for ids in encoded]


def without_end_token(text: str, ends: Sequence[str]) -> str:
    """Return a text without the end token that it was written with, and the white space after it.

    Datasets for other trainers have it in their answers, and here it is added: the row would end twice.
    """
    written = text.rstrip()
    rest = next((written.removesuffix(end) for end in ends if end and written.endswith(end)), "")
    return rest if rest.strip() else text


def tokenize(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Return what the tokenizer makes of a batch of texts, or raise ModelUnsupported if it fails or takes too much.

    Its regular expressions are the model author's, and may take exponential time; its steps may multiply a text.
    """
    return _call(lambda: tokenizer(list(texts), **options), "encode a row")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones included; raises as `tokenize`."""
    return str(_call(lambda: tokenizer.decode(list(ids)), "decode tokens"))


def decode_answers(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of answers without special tokens; raises as `tokenize`."""
    return list(_call(lambda: tokenizer.batch_decode(answers, skip_special_tokens=True), "decode tokens"))


def _call(call: Callable[[], Any], action: str) -> Any:
    try:
        return call_native(call, MAX_SECONDS, MAX_BYTES)
    except Exception as error:  # whatever a tokenizer raises for a text that it was not made for
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.model.uri: its tokenizer cannot {action}: {str(error)[:500]}; use another model",
        ) from error


def _single_start(ids: list[int], tokenizer: Any) -> list[int]:
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two token sequences."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))
