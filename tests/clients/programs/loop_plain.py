"""Trains in a plain loop; `loop_plain.py [RUN]`."""

import json
import sys
from pathlib import Path

import torch
from rows import rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import ulysses_monitor as um

RUN = (sys.argv[1:] or [None])[0]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained("../llama")
model = AutoModelForCausalLM.from_pretrained("../llama")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(
    [tokenizer(" ".join(row)) for row in rows()],
    batch_size=4,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
log = []


def train_watched(monitor):
    with monitor.watch(model, optimizer):
        for batch in loader:
            loss = model(**batch).loss
            monitor.observe(loss=loss, tokens=batch["attention_mask"].sum())
            loss.backward()
            monitor.before_clip()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            monitor.log({"my/metric/total": 1.0})
            log.append({"loss": loss.item(), "grad_norm": norm.item()})


def train_bare():
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": loss.item(), "grad_norm": norm.item()})


if RUN:
    train_watched(um.Monitor(RUN))
else:
    train_bare()
Path("log.json").write_text(json.dumps(log))
torch.save(model.state_dict(), "weights.pt")
