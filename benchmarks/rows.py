"""What fingerprints of rows cost, and what keeping a step and computing it again costs.

    python -m benchmarks.rows [--size 2m|30m|100m] [--rows 8] [--tokens 512] [--steps 12]

Four loops train the same small Llama in turn, step by step: without fingerprints, with them, with
each step kept so that it could be computed again, and with each step computed again. It prints for
each the median CPU time of a step, which other programs hardly change, and the median
difference from the same step of the first loop; what the parts of a fingerprint take alone (hashes,
losses of rows from the logits); and the bytes that are kept of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ulysses_monitor as um
from benchmarks.models import SIZES, build_llama
from ulysses_monitor.probes.fingerprints import row_losses, row_numbers
from ulysses_monitor.records import StepRecord


@dataclass(frozen=True)
class Asks:
    """A rule that asks for each step to be computed again, or would if it found anything."""

    name: str
    finds: bool
    on_alert: tuple[str, ...] = ("rerun",)
    needs: tuple[str, ...] = ("grad/norm/total",)

    def check(self, history: Sequence[StepRecord]) -> list[um.Alert]:
        """See `um.Rule.check`."""
        if not self.finds:
            return []
        step = history[-1].step
        metric = f"my/step_{step}/total"  # a new one, so that each step has an alert
        return [um.Alert(rule="asks", step=step, metric=metric, value=1, threshold=0, message="")]


LOOPS: dict[str, dict[str, Any]] = {
    "without fingerprints": {"rows": 0, "rules": "off"},
    "with fingerprints": {"rows": 256, "rules": "off"},
    "and each step kept": {"rows": 256, "rules": [Asks("asks", finds=False)]},
    "and computed again": {"rows": 256, "rules": [Asks("asks", finds=True)]},
}


class Loop:
    """One training, and the seconds of its steps."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, settings: Any) -> None:
        torch.manual_seed(0)
        size = SIZES[arguments.size]
        self.model = build_llama(size, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.monitor = um.Monitor(folder, tensorboard=False, **settings)
        shape = arguments.rows, arguments.tokens
        self.batches = [torch.randint(0, size.vocabulary, shape) for _ in range(4)]
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """Trains one step."""
        ids = self.batches[number % len(self.batches)]
        began = time.process_time()
        loss = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        self.monitor.observe(loss=loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        loops = {
            name: Loop(arguments, Path(folder, name), settings) for name, settings in LOOPS.items()
        }
        for loop in loops.values():
            stack.enter_context(loop.monitor.watch(loop.model, loop.optimizer))
        for number in range(arguments.steps + 2):  # the first two warm up
            for loop in loops.values():
                loop.step(number)
        stack.close()
        _print(arguments, loops)


def _print(arguments: argparse.Namespace, loops: dict[str, Loop]) -> None:
    first, *_, last = loops.values()
    base = statistics.median(first.seconds[2:])
    print(f"{arguments.size}, {arguments.rows} rows of {arguments.tokens} tokens, CPU\n")
    print("| a step | median | more | of the step |\n|---|---|---|---|")
    for name, loop in loops.items():
        pairs = zip(loop.seconds[2:], first.seconds[2:], strict=True)
        more = statistics.median(own - other for own, other in pairs)
        middle = statistics.median(loop.seconds[2:])
        print(f"| {name} | {middle * 1e3:.1f} ms | {more * 1e3:+.1f} ms | {more / base:+.1%} |")
    print("\n| a part alone | median | of a step |\n|---|---|---|")
    for name, call in _parts(first).items():
        seconds_alone = _median_of(call)
        print(f"| {name} | {seconds_alone * 1e3:.2f} ms | {seconds_alone / base:.2%} |")
    events = um.open_run(last.monitor.run_dir).event_list("rerun")
    kept = statistics.median(event["kept_bytes"] for event in events)
    took = statistics.median(event["seconds"] for event in events)
    print(f"\ncomputing a step again: {took * 1e3:.1f} ms; kept of a step: {kept / 1e6:.2f} MB,")
    parameters = sum(p.numel() * p.element_size() for p in last.model.parameters())
    print(f"and while it is computed a second set of gradients: {parameters / 1e6:.1f} MB")


def _parts(loop: Loop) -> dict[str, Callable[[], Any]]:
    ids = loop.batches[0]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        logits = loop.model(**batch).logits

    def losses() -> None:
        with torch.no_grad():
            row_losses(logits, ids)

    return {"hashes, lengths, labels": lambda: row_numbers(batch), "losses of rows": losses}


def _median_of(call: Callable[[], Any], times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
