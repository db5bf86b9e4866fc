"""What policies in shadow mode cost, beside the monitor alone, on the same gradients.

    python -m benchmarks.shadow [--size 2m|30m|100m] [--steps 20] [--output FILE.md]

One training runs on one process. Before each optimizer step, a monitor without policies and one
monitor for each set of policies read the same gradients in turn, in an order that changes from step
to step. The time covers `Session.gradients_ready`. The table shows its difference to the monitor
alone in the same step, as median and range over steps, and as a share of the median step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ulysses_monitor as um
from benchmarks.models import SIZES, build_llama
from benchmarks.tables import spread
from ulysses_monitor.engines import find_engine
from ulysses_monitor.session.opening import Training
from ulysses_monitor.session.session import Session

ALONE = "the monitor alone"
SETS: Mapping[str, list[Any]] = {
    ALONE: [],
    "ulysses-pro": ["ulysses-pro"],
    "adaptive": ["adaptive"],
    "every clipping policy": ["clip_threshold", "autoclip", "zclip", "adagc", "agc"],
    "a function of 256 records": [lambda history: [h["grad/norm/total"] for h in history] and []],
}


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(0)
    size = SIZES[arguments.size]
    model = build_llama(size, head_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: _open_session(name, Path(folder), model, optimizer) for name in SETS}
        for step in range(arguments.steps + 1):
            began = time.perf_counter()
            ids = torch.randint(0, size.vocabulary, (size.rows, size.tokens))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            spent = time.perf_counter() - began
            _read_in_turn(sessions, step, loss.detach(), seconds)
            began = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            seconds["step"].append(spent + time.perf_counter() - began)
        for session in sessions.values():
            session.close()
    text = _report(arguments, model, seconds)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


def _open_session(
    name: str, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Session:
    place = folder / str(list(SETS).index(name))
    monitor = um.Monitor(place, policies=SETS[name], shadow=True, tensorboard=False, rules=[])
    return monitor.open(find_engine(model, optimizer), Training(max_steps=10_000))


def _read_in_turn(
    sessions: Mapping[str, Session], step: int, loss: Any, seconds: dict[str, list[float]]
) -> None:
    names = list(sessions)
    for name in names[step % len(names) :] + names[: step % len(names)]:
        session = sessions[name]
        session.observe(loss=loss)
        began = time.perf_counter()
        session.gradients_ready()
        seconds[name].append(time.perf_counter() - began)
        session.stepped()
        session.step_ends()
        time.sleep(0.05)  # lets the sinks' threads write; a training computes far longer


def _report(
    arguments: argparse.Namespace, model: nn.Module, seconds: Mapping[str, list[float]]
) -> str:
    step = statistics.median(seconds["step"][1:])
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        "# What policies in shadow cost",
        "",
        f"{parameters / 1e6:.1f} M parameters, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {arguments.steps} steps of {step:.2f} s (median); "
        "milliseconds a step, median [range].",
        "",
        "| | reading and deciding, ms | more than alone, ms | of the step |",
        "|---|---|---|---|",
    ]
    for name in SETS:
        taken = [1e3 * s for s in seconds[name][1:]]
        more = [a - b for a, b in zip(taken, (1e3 * s for s in seconds[ALONE][1:]), strict=True)]
        share = statistics.median(more) / (1e3 * step)
        beside = "| | |" if name == ALONE else f"| {spread(more)} | {share:.4%} |"
        lines.append(f"| {name} | {spread(taken)} {beside}")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
