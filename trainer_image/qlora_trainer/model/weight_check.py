"""Compares a model's weight files with its architecture; only the headers of the files are read."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError

_ABOUT_FILES: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RecursionError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and PEFT raise for files that they do not expect; a GPU raises RuntimeError, and a disk OSError."""
_NAMED: Final = 3
"""Weights that a message names; the others are counted."""


@contextmanager
def reading_model(field: str, what: str = "transformers cannot load the model") -> Iterator[None]:
    """Turn the exceptions of libraries about a model's or an adapter's files into ModelUnsupported, with the cause."""
    try:
        yield
    except _ABOUT_FILES as error:
        cause = f"{type(error).__name__}: {str(error)[:500]}"
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: {what}: {cause}; correct it, or use another one") from error


def check_weight_files(folder: Path, field: str = "spec.model.uri") -> tuple[str, ...]:
    """Check that the files in a folder have every weight of its architecture, in its shape.

    Transformers initializes a missing weight at random and only logs it, and does not compare the shapes of weights
    that it quantizes. It loads the model on the meta device here, so that renamed and stacked weights are found, and
    no tensor is read: a hole in the file will do.

    Args:
        folder: A model in the Hugging Face format.
        field: The field of the spec, for messages.

    Returns:
        Log lines about weights in the files that the architecture does not have.

    Raises:
        RunError: MODEL_UNSUPPORTED.

    """
    with reading_model(field):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if is_quantized(config):
        return ()  # the quantizer renames the weights while loading; check_loaded sees what it left out
    try:
        found = _load_without_tensors(folder)
    except (OSError, *_ABOUT_FILES) as error:  # files under other names, offsets that overlap
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: its weight files cannot be read: {str(error)[:500]}; copy the model again",
        ) from error
    check_loaded(found, field)
    unused = sorted(found["unexpected_keys"])
    if not unused:
        return ()
    return (f"{len(unused)} weights in the model's files are not part of its architecture: {_some(unused)}",)


def _load_without_tensors(folder: Path) -> Mapping[str, Any]:
    """Return transformers' loading info of a model on the meta device."""
    with _quiet():
        _, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # listed in what is returned
            output_loading_info=True,
        )
    return dict(found)


def check_loaded(found: Mapping[str, Any], field: str = "spec.model.uri") -> None:
    """Raise ModelUnsupported if transformers' loading info lists weights that were missing or had another shape."""
    if missing := sorted(found["missing_keys"]):
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: the model's files lack {len(missing)} weights of its architecture, which would be random: "
            f"{_some(missing)}; copy or convert the model again",
        )
    if mismatched := sorted(found["mismatched_keys"]):
        shapes = [f"{name} is {list(stored)} and should be {list(wanted)}" for name, stored, wanted in mismatched]
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: {len(mismatched)} weights in the model's files have another shape than config.json says: "
            f"{_some(shapes)}; use the config.json of these weights",
        )


def is_quantized(config: Any) -> bool:
    """Return whether the publisher stored the weights quantized."""
    return getattr(config, "quantization_config", None) is not None


def _some(names: Collection[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(list(names)[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing its own table of the weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
