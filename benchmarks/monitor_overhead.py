"""What watching costs: the same training steps with and without the monitor, in turns.

    python benchmarks/monitor_overhead.py [--rounds 12] [--steps 20] [--size small]

One process, one thread, AdamW on a Llama made from a config. Rounds alternate between the two, so
that a drift of the machine's speed falls on both; each pair of neighbouring rounds gives one ratio.
Prints the median and the range of the ratios, and what the monitor says of itself. The rounds with
the monitor write a real run directory, TensorBoard included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ulysses_monitor as um

# hidden size, layers, vocabulary, rows, tokens a row
SIZES = {"small": (192, 4, 2048, 4, 256), "100m": (768, 12, 16_000, 4, 512)}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, layers, vocabulary, rows, length = SIZES[arguments.size]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            vocab_size=vocabulary,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.randint(0, vocabulary, (rows, length))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {ids.numel()} tokens a step, 1 thread")
    _round(model, optimizer, ids, 2, None)  # warm-up: allocations, optimizer state
    ratios, plain, own = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.rounds):
            monitor = um.Monitor(Path(folder) / f"run{i}")
            without = _round(model, optimizer, ids, arguments.steps, None)
            watched = _round(model, optimizer, ids, arguments.steps, monitor)
            plain.append(without)
            ratios.append(watched / without)
            own.append(um.open_run(monitor.run_dir).summary()["monitor_share"])
    print(f"step without the monitor  {1e3 * statistics.median(plain):8.1f} ms (median of rounds)")
    print(
        f"with / without            {statistics.median(ratios):8.4f}"
        f"    [{min(ratios):.4f}, {max(ratios):.4f}] over {len(ratios)} pairs of rounds"
    )
    print(f"the monitor of itself     {statistics.median(own):8.2%} of the step")


def _round(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    steps: int,
    monitor: um.Monitor | None,
) -> float:
    """Seconds a step, without the opening and closing of the run."""
    with monitor.watch(model, optimizer) if monitor else nullcontext():
        start = time.perf_counter()
        for _ in range(steps):
            loss = model(ids, labels=ids).loss
            if monitor is not None:
                monitor.observe(loss=loss, tokens=ids.numel())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / steps


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", choices=SIZES, default="small")
    return parser.parse_args()


if __name__ == "__main__":
    main()
