"""Trains in a loop of its own with accelerate; `loop_accelerate.py [RUN]`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from rows import rows
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    set_seed,
)

import ulysses_monitor as um

RUN = (sys.argv[1:] or [None])[0]
set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained("../llama")
model = AutoModelForCausalLM.from_pretrained("../llama")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
loader = DataLoader(
    [tokenizer(" ".join(row)) for row in rows()],
    batch_size=4,
    shuffle=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
log = []


def train_watched(monitor):
    with monitor.watch(model, optimizer):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                monitor.observe(loss=loss / 2, tokens=batch["attention_mask"].sum())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    monitor.before_clip()
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    log.append({"loss": loss.item(), "grad_norm": norm.item()})
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def train_bare():
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                log.append({"loss": loss.item(), "grad_norm": norm.item()})
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


if RUN:
    train_watched(um.Monitor(RUN))
else:
    train_bare()
if accelerator.is_main_process:
    Path("log.json").write_text(json.dumps(log))
    torch.save(accelerator.unwrap_model(model).state_dict(), "weights.pt")
accelerator.end_training()
