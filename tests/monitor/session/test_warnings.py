"""Watching a training shows no warning again that Python shows once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import warnings
import torch
import ulysses_monitor as um

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.AdamW(model.parameters())
monitor = um.Monitor("run", sample_every=1)

def warn():
    warnings.warn("said once")

warn()
with monitor.watch(model, optimizer):
    warn()
    for _ in range(3):
        loss = model(torch.ones(2, 3)).sum()
        monitor.observe(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warn()
warn()
"""


def test_a_warning_is_not_shown_again_because_a_training_is_watched(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("said once") == 1, done.stderr
