"""The stop tokens of a published model: those with which its answers ended in training and evaluation.

Servers stop at the EOS token of the tokenizer and of generation_config.json, and know no chat template's end-of-turn
token: an adapter that was trained on a base model to end with it would talk on (hiyouga/LlamaFactory#7943).
"""

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.evaluation.generation import stop_tokens
from qlora_trainer.model.generation_config import write_generation_config

_EXAMINED_ROWS: Final = 256
"""Training rows whose last token is looked at."""


def save_stop_tokens(model: Any, tokenizer: Any, rows: Sequence[TokenRow], target: Path) -> None:
    """Write tokenizer and generation settings with the stop tokens of training and evaluation.

    Args:
        model: The model that was evaluated.
        tokenizer: The tokenizer that it was evaluated with; it is not changed.
        rows: Training rows; the token with which their answers end becomes the EOS token.
        target: Folder of the published weights.

    """
    stops = stop_tokens(model, tokenizer)
    trained = trained_stop_token(rows, stops)
    if trained is not None:
        stops = [trained, *(token for token in stops if token != trained)]
        tokenizer = with_eos_token(tokenizer, trained)
    tokenizer.save_pretrained(target)
    write_generation_config(model.generation_config, stops if len(stops) > 1 else stops[0], target)


def trained_stop_token(rows: Sequence[TokenRow], stops: Sequence[int]) -> int | None:
    """Return the stop token with which most of the first rows end; None if no row does, as when all are truncated."""
    last_tokens = (row.input_ids[row.label_spans[-1][1] - 1] for row in islice(rows, _EXAMINED_ROWS) if row.label_spans)
    found = Counter(token for token in last_tokens if token in stops)
    return max(found, key=found.__getitem__, default=None)


def with_eos_token(tokenizer: Any, token: int) -> Any:
    """Return the tokenizer with this EOS token; unchanged if its chat template writes the one that it has."""
    if tokenizer.eos_token_id == token or "eos_token" in str(tokenizer.chat_template):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = changed.convert_ids_to_tokens(token)
    return changed
