"""The QLoRA recipe of common tutorials.

Differences from the tutorials: rows in file order and a constant learning rate, so that all contenders train alike;
bf16 instead of the fp16 of T4 notebooks, because this must run on a CPU.
"""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.trainer import task
from benchmarks.trainer.contenders.command import ContenderOptions, parse_options
from benchmarks.trainer.contenders.trainer_callback import TimedSteps
from benchmarks.trainer.exam import make_evaluation
from benchmarks.trainer.measurement import Stopwatch


def main(options: ContenderOptions) -> None:
    """Train and measure."""
    tokenizer = AutoTokenizer.from_pretrained(options.task.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.eos_token
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.task.model,
        quantization_config=quantization,
        device_map={"": options.task.device},
        trust_remote_code=False,
    )
    model = prepare_model_for_kbit_training(model)
    adapter = LoraConfig(
        r=task.RANK,
        lora_alpha=task.ALPHA,
        lora_dropout=task.DROPOUT,
        target_modules=list(task.TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)

    def tokenize(example: dict[str, str]) -> dict[str, Any]:
        tokens = tokenizer(example["text"], truncation=True, padding="max_length", max_length=options.task.max_length)
        tokens["labels"] = tokens["input_ids"].copy()
        return dict(tokens)

    texts = [pair.prompt + pair.answer for pair in task.training_pairs(options.task)]
    dataset = Dataset.from_list([{"text": text} for text in texts]).map(tokenize, remove_columns=["text"])
    lengths = [sum(mask) for mask in dataset["attention_mask"]]
    stopwatch = Stopwatch("recipe", options.task.device, options.every)
    stopwatch.evaluate = make_evaluation(options.task, model, tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output.with_suffix(".trainer")),
            per_device_train_batch_size=task.BATCH,
            gradient_accumulation_steps=task.ACCUMULATION,
            learning_rate=task.LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=options.steps,
            bf16=True,
            activation_checkpointing=True,
            train_sampling_strategy="sequential",
            use_cpu=options.task.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=task.SEED,
        ),
        train_dataset=dataset,
        data_collator=default_data_collator,
        # Every token is a label, padding included; only tokens that are not padding are useful.
        callbacks=[TimedSteps(stopwatch, [(length, length - 1) for length in lengths])],
    )
    trainer.train()
    stopwatch.measurement.write(options.output)


if __name__ == "__main__":
    main(parse_options())
