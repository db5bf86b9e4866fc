"""Trains with torchtitan's clipping and loggers in a loop; `loop_torchtitan.py [RUN]`.

torchtitan's own models and Trainer cannot be imported without triton, which CPU builds of torch do
not have.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torchtitan.components.metrics import BaseLogger, LoggerContainer
from torchtitan.distributed.utils import clip_grad_norm_

import ulysses_monitor as um

RUN = (sys.argv[1:] or [None])[0]


class UlyssesLogger(BaseLogger):
    def __init__(self, monitor):
        self.monitor = monitor

    def log(self, metrics, step):
        self.monitor.log({f"titan/{name}/total": value for name, value in metrics.items()})


class FileLogger(BaseLogger):
    def __init__(self):
        self.log_entries = []

    def log(self, metrics, step):
        self.log_entries.append({"step": step, **metrics})

    def close(self):
        Path("log.json").write_text(json.dumps(self.log_entries))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 32))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loggers = LoggerContainer()
loggers.add_logger(FileLogger())


def watched():
    return um.Monitor(RUN).watch(model, optimizer) if RUN else contextlib.nullcontext(None)


with watched() as monitor:
    if monitor:
        loggers.add_logger(UlyssesLogger(monitor))
    for step in range(1, 7):
        ids = torch.randint(0, 32, (4, 9))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        if monitor:
            monitor.observe(loss=loss, tokens=ids.numel())
        optimizer.zero_grad()
        loss.backward()
        if monitor:
            monitor.before_clip()
        grad_norm = clip_grad_norm_(model.parameters(), 0.1, foreach=True)
        optimizer.step()
        loggers.log({"global_avg_loss": loss.item(), "grad_norm": grad_norm.item()}, step)

loggers.close()
torch.save(model.state_dict(), "weights.pt")
