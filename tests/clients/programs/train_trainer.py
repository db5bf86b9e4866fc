"""Trains a causal language model with transformers' Trainer; `train_trainer.py [RUN]`."""

import sys

from rows import rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import ulysses_monitor as um

RUN = (sys.argv[1:] or [None])[0]
tokenizer = AutoTokenizer.from_pretrained("../llama")
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained("../llama"),
    args=TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        learning_rate=1e-2,
        max_grad_norm=0.1,
        logging_steps=1,
        save_steps=5,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        report_to="none",
        seed=3,
    ),
    train_dataset=[tokenizer(" ".join(row)) for row in rows()],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
if RUN:
    monitor = um.Monitor(RUN)
    monitor.attach(trainer)
trainer.train()
