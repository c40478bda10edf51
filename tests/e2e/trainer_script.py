"""A script without any code of this project: transformers.Trainer on a tiny random model.

It reports progress because KubeflowCallback switches itself on in a pod that has the two variables.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False
)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (64, 8))]
arguments = TrainingArguments(
    output_dir="/work/out",
    max_steps=20,
    per_device_train_batch_size=4,
    logging_steps=1,
    save_strategy="no",
    use_cpu=True,
)
Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=rows).train()
