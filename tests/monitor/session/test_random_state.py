"""Watching a training leaves every stream of random numbers as it is."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from ulysses_monitor.common.random_state import keep_random_state

SCRIPT = """
import random, sys
import numpy as np
import torch
from tests.support.hf_cases import build_trainer

def seed():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)

def states():
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state().tolist()

seed()
before = states()
import ulysses_monitor as um
assert states() == before, "import"
monitor = um.Monitor(sys.argv[1] + "/plain")
assert states() == before, "Monitor"
model = torch.nn.Linear(3, 1)
seed()
optimizer = torch.optim.AdamW(model.parameters())
with monitor.watch(model, optimizer):
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        monitor.log({"my/metric/total": 1.0})
assert states() == before, "watch"

ends = []
from pathlib import Path
for is_watched in (False, True):
    trainer = build_trainer("plain", Path(sys.argv[1]))
    seed()
    if is_watched:
        um.Monitor(sys.argv[1] + "/hf", sinks=["console"], policies=["agc"]).attach(trainer)
        assert states() == before, "attach"
    trainer.train()
    ends.append(states())
assert ends[0] == ends[1], "train"
print("the same")
"""


def test_importing_attaching_and_training_draw_no_random_numbers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["the same"], done.stderr


def test_a_state_is_kept_also_when_an_import_fails() -> None:
    state = random.getstate()
    try:
        with keep_random_state():
            random.random()
            raise ImportError
    except ImportError:
        pass
    assert random.getstate() == state
