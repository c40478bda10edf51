"""TRL's SFTTrainer with the recipe's settings and TRL's defaults; `--fastest` only changes the speed."""

import sys
from typing import Any, Final

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.trainer import task
from benchmarks.trainer.contenders.command import ContenderOptions, parse_options
from benchmarks.trainer.contenders.trainer_callback import TimedSteps
from benchmarks.trainer.exam import make_evaluation
from benchmarks.trainer.measurement import Stopwatch

DEFAULT: Final[dict[str, Any]] = {
    "per_device_train_batch_size": task.BATCH,
    "gradient_accumulation_steps": task.ACCUMULATION,
}
FASTEST: Final[dict[str, Any]] = {
    # One forward pass per step, so weights are dequantized once. The gradient is the same.
    "per_device_train_batch_size": task.GLOBAL_BATCH,
    "gradient_accumulation_steps": 1,
    # Packing without padding; exact without FlashAttention too, since there is no mask and no cache.
    "padding_free": True,
    "max_length": None,
    "activation_checkpointing": False,
    "model_init_kwargs": {"dtype": "bfloat16"},
}


def main(options: ContenderOptions, settings: dict[str, Any], name: str) -> None:
    """Train and measure."""
    tokenizer = AutoTokenizer.from_pretrained(options.task.model, trust_remote_code=False)
    pairs = task.training_pairs(options.task)
    lengths = [_lengths(pair, tokenizer) for pair in pairs]
    stopwatch = Stopwatch(name, options.task.device, options.every)
    sft_options = {"model_init_kwargs": {}} | settings
    sft_options["model_init_kwargs"] = sft_options["model_init_kwargs"] | {"device_map": {"": options.task.device}}
    trainer = SFTTrainer(
        model=options.task.model,
        args=SFTConfig(
            **{
                "output_dir": str(options.output.with_suffix(".trainer")),
                "max_length": options.task.max_length,
                "learning_rate": task.LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "max_steps": options.steps,
                "train_sampling_strategy": "sequential",
                "use_cpu": options.task.device == "cpu",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": task.SEED,
            }
            | sft_options
        ),
        train_dataset=Dataset.from_list([{"prompt": pair.prompt, "completion": pair.answer} for pair in pairs]),
        processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        peft_config=LoraConfig(
            r=task.RANK,
            lora_alpha=task.ALPHA,
            lora_dropout=task.DROPOUT,
            target_modules=list(task.TARGETS),
            bias="none",
            task_type="CAUSAL_LM",
        ),
        callbacks=[TimedSteps(stopwatch, lengths)],
    )
    stopwatch.evaluate = make_evaluation(options.task, trainer.model, tokenizer)
    trainer.train()
    stopwatch.measurement.write(options.output)


def _lengths(pair: task.Pair, tokenizer: Any) -> tuple[int, int]:
    """Return the number of a row's tokens, end token included, and of its answer's tokens."""
    tokens = len(tokenizer(pair.prompt + pair.answer)["input_ids"]) + 1
    return tokens, tokens - len(tokenizer(pair.prompt)["input_ids"])


if __name__ == "__main__":
    fastest = "--fastest" in sys.argv
    if fastest:
        sys.argv.remove("--fastest")
    main(parse_options(), FASTEST if fastest else DEFAULT, "trl-fastest" if fastest else "trl")
