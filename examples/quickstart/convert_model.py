"""Converts the GGUF file of SmolLM2-135M-Instruct to the files of its hub repository; called by make_model.py."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

PARAMETERS: Final = 134_515_008
CONTEXT: Final = 8192
PROMPT, ANSWER = "The capital of France is", "Paris"
_SOURCE_ONLY: Final = ("quantization_config", "_model_name_or_path")


def convert(gguf: Path, target: Path) -> None:
    """Write configuration, weights and tokenizer into a folder."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = {key: value for key, value in source.config.to_dict().items() if key not in _SOURCE_ONLY}
    model = LlamaForCausalLM(LlamaConfig(**settings | {"dtype": "bfloat16"}))
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    write_tokenizer(gguf, target)


def write_tokenizer(gguf: Path, target: Path) -> None:
    """Write the tokenizer under a class name that releases 4 and 5 of transformers know."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # SmolLM2 splits numbers into single digits; GGUF stores this only as the pre-tokenizer name "smollm".
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def check(files: Path) -> None:
    """Load the files with transformers, and complete a prompt with a known answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(files, trust_remote_code=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(files, trust_remote_code=False)
    output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0])
    if model.num_parameters() != PARAMETERS or not tokenizer.chat_template or ANSWER not in answer:
        raise RuntimeError(
            f"the converted model is wrong: {model.num_parameters()} parameters, and its answer is {answer!r}"
        )
