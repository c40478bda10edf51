"""TRL's SFTTrainer with the recipe's settings and TRL's defaults; `fastest` changes what only changes the speed."""

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
    # One forward pass a step: what is dequantised is dequantised once. The gradient is the same.
    "per_device_train_batch_size": task.GLOBAL_BATCH,
    "gradient_accumulation_steps": 1,
    # Rows joined without padding; exact without FlashAttention too, since there is no mask and no cache.
    "padding_free": True,
    "max_length": None,
    "activation_checkpointing": False,
    "model_init_kwargs": {"dtype": "bfloat16"},
}


def main(order: ContenderOptions, settings: dict[str, Any], name: str) -> None:
    """Train and measure."""
    tokenizer = AutoTokenizer.from_pretrained(order.task.model)
    pairs = task.training_pairs(order.task)
    lengths = [_lengths(pair, tokenizer) for pair in pairs]
    stopwatch = Stopwatch(name, order.task.device, order.every)
    given = {"model_init_kwargs": {}} | settings
    given["model_init_kwargs"] = given["model_init_kwargs"] | {"device_map": {"": order.task.device}}
    trainer = SFTTrainer(
        model=order.task.model,
        args=SFTConfig(
            **{
                "output_dir": str(order.output.with_suffix(".trainer")),
                "max_length": order.task.max_length,
                "learning_rate": task.LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "max_steps": order.steps,
                "train_sampling_strategy": "sequential",
                "use_cpu": order.task.device == "cpu",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": task.SEED,
            }
            | given
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
    stopwatch.evaluate = make_evaluation(order.task, trainer.model, tokenizer)
    trainer.train()
    stopwatch.measurement.write(order.output)


def _lengths(pair: task.Pair, tokenizer: Any) -> tuple[int, int]:
    """Return a row's tokens, with the end token, and those of its answer."""
    tokens = len(tokenizer(pair.prompt + pair.answer)["input_ids"]) + 1
    return tokens, tokens - len(tokenizer(pair.prompt)["input_ids"])


if __name__ == "__main__":
    fastest = "--fastest" in sys.argv
    if fastest:
        sys.argv.remove("--fastest")
    main(parse_options(), FASTEST if fastest else DEFAULT, "trl-fastest" if fastest else "trl")
