"""What reading the gradients costs: this project and others, side by side in the same steps.

    python -m benchmarks.capture [--engine plain|ddp|zero2|zero3|fsdp2] [--size 2m|30m|100m|1b]
                                 [--lora] [--steps 6] [--processes 2] [--threads N]

One training runs; at the moment before clipping, every way of reading takes its turn on the same
gradients, the order changing from step to step. What stands for this project is the whole monitor,
as a user has it: every gradient and LoRA metric each step, optimizer state, parameters, updates,
adapters and replicas each tenth, rules, run store and TensorBoard; ten steps of it are timed and
divided by ten. Its sinks write on threads of their own while a training computes, so they get the
time to do so between those steps, and their CPU time is told apart. Its reading is timed once more
by itself: gradients each step, optimizer state each tenth, nothing recorded. The others compute one
norm per parameter (OLMo's style four statistics, wandb.watch a histogram) and record nothing; hooks
that fire in the backward pass have steps of their own, and only what the hooks do is timed.

Prints, for each, the median and range over steps, its share of the step without any of them and of
the optimizer step, and how many times dearer than this project it is.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import ulysses_monitor as um
from benchmarks import peers
from ulysses_monitor.engines import PlainEngine, find_engine
from ulysses_monitor.probes import AdamStateProbe, Capture, GradientProbe, Layout

# hidden size, layers, vocabulary, rows, tokens a row
SIZES = {
    "2m": (192, 4, 2048, 4, 256),
    "30m": (512, 8, 8192, 4, 256),
    "100m": (768, 12, 16_000, 4, 512),
    "1b": (2048, 20, 32_000, 4, 512),
}
OURS = "this project, all metrics"
READING = "its reading alone, gradients and optimizer state"
SINKS = "its sinks, CPU time of their threads"
SINK_SECONDS = 0.1
"""Between two steps of this project: a training computes far longer."""
ROUND = 10
"""Steps of this project that are timed together: one of them is sampled."""


@dataclass
class Clock:
    """Seconds of everything, by name."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def sync(self) -> None:
        """Waits for the device, so that a time is what the work took."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, name: str, call: Callable[[], Any]) -> None:
        """Times a call that all ranks make; they begin together."""
        if dist.is_initialized():
            dist.barrier()
        self.sync()
        began = time.perf_counter()
        call()
        self.sync()
        self.seconds[name].append(time.perf_counter() - began)


def main() -> None:
    arguments = _arguments()
    cuda = torch.cuda.is_available()
    processes = 1 if arguments.engine == "plain" else arguments.processes
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // processes)
    if processes == 1 and arguments.engine == "plain":
        _rank(0, 1, "", arguments, threads, cuda)
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    args = (processes, port, arguments, threads, cuda)
    mp.start_processes(_rank, args, nprocs=processes, start_method="spawn")


def _rank(
    rank: int, world: int, port: str, arguments: argparse.Namespace, threads: int, cuda: bool
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if port:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if not cuda:
            os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world)
    training = Training(arguments, device)
    for step in range(arguments.steps + 1):  # the first warms up
        training.step(step)
    if rank == 0:
        _print(training, arguments, world, threads)
    if dist.is_initialized():
        dist.destroy_process_group()


class Training:
    """The model, its engine, the monitor and the clock."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.clock = Clock(device)
        self.zero = arguments.engine.startswith("zero")
        hidden, layers, vocabulary, rows, length = SIZES[arguments.size]
        self.ids = torch.randint(0, vocabulary, (rows, length), device=device)
        self.model = _model(hidden, layers, vocabulary, arguments.lora).to(device)
        if device.type == "cuda":
            self.model.bfloat16()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained, self.all = (
            sum(p.numel() for p in params) for params in (trained, self.model.parameters())
        )
        self.wrapped, self.optimizer = _wrapped(self.model, arguments.engine, device)
        self.view = find_engine(self.wrapped, self.optimizer)
        self.monitor = um.Monitor(peers.free_folder() / "run")
        self.monitor.start(self.view)
        layout = Layout(*zip(*self.view.parameters(), strict=True))
        probes = [GradientProbe(layout), AdamStateProbe(layout)]
        self.capture = Capture(self.view, probes, sample_every=ROUND)

    def step(self, number: int) -> None:
        """Trains one step in which everything is read and timed; the first warms all up."""
        began = time.perf_counter()
        loss = self.wrapped(input_ids=self.ids, labels=self.ids).loss
        if self.zero:
            self.wrapped.backward(loss)
        else:
            loss.backward()
        self.clock.sync()
        self.clock.seconds["forward and backward"].append(time.perf_counter() - began)
        self._read(number)
        self.clock.time("optimizer step", self.wrapped.step if self.zero else self.optimizer.step)
        if not self.zero:
            self.optimizer.zero_grad()
        if isinstance(self.view, PlainEngine) and not dist.is_initialized():
            self._hooks(peers.BackwardHooks, "hook per parameter, .item()")
            if find_spec("wandb") is not None:
                self._hooks(peers.WandbWatch, "wandb.watch, log_freq=1")
        if not number:
            self.clock.seconds.clear()

    def _read(self, number: int) -> None:
        ways = list(self._ways().items())
        turn = number % len(ways)
        for name, call in ways[turn:] + ways[:turn]:
            call() if name in (OURS, READING) else self.clock.time(name, call)

    def _ways(self) -> dict[str, Callable[[], Any]]:
        grads = [s.grad for s in self.view.shards() if s.is_counted and s.grad is not None]
        every: list[Tensor] = [s.grad for s in self.view.shards() if s.grad is not None]
        ways: dict[str, Callable[[], Any]] = {
            "limit: each gradient read once": lambda: peers.read_once(grads),
            OURS: self._ours,
            READING: self._reading,
            "loop over parameters, .item()": lambda: peers.item_loop(every),
            "OLMo style, three collectives": lambda: peers.olmo_style(every),
        }
        if len(every) == len(self.view.parameters()):
            # An all-reduce per parameter needs every rank to hold a part of each.
            ways["Composer style, per parameter"] = lambda: peers.composer_style(every)
        if self.zero:
            full = peers.safe_get_full_grad_loop
            ways["safe_get_full_grad loop"] = lambda: full(self.model)
        return ways

    def _ours(self) -> None:
        """As ten steps of a training call it."""
        seconds, cpu = [], time.process_time()
        inside = 0.0
        for _ in range(ROUND):
            if dist.is_initialized():
                dist.barrier()
            self.clock.sync()
            began, cpu_began = time.perf_counter(), time.process_time()
            self.monitor.observe(loss=1.0, tokens=1)
            self.monitor.gradients_ready()
            self.monitor.stepped()
            self.monitor.step_ends()
            self.clock.sync()
            seconds.append(time.perf_counter() - began)
            inside += time.process_time() - cpu_began
            time.sleep(SINK_SECONDS)
        self.clock.seconds[OURS].append(sum(seconds) / ROUND)
        self.clock.seconds[SINKS].append((time.process_time() - cpu - inside) / ROUND)

    def _reading(self) -> None:
        """Ten steps of it: gradients and adapters' ratios in each, Adam's moments in one."""
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        for step in range(1, ROUND + 1):
            self.capture.read(step, {})
            self.clock.sync()
        self.clock.seconds[READING].append((time.perf_counter() - began) / ROUND)

    def _hooks(self, make: Callable[[nn.Module, Callable[[], None]], Any], name: str) -> None:
        hooks = make(self.model, self.clock.sync)
        self.wrapped(input_ids=self.ids, labels=self.ids).loss.backward()
        if isinstance(hooks, peers.WandbWatch):
            hooks.log()
        self.optimizer.zero_grad()
        hooks.close()
        self.clock.seconds[name].append(hooks.seconds)


def _model(hidden: int, layers: int, vocabulary: int, lora: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        vocab_size=vocabulary,
    )
    model: nn.Module = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return model


def _wrapped(model: nn.Module, engine: str, device: torch.device) -> tuple[Any, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(layer)
        fully_shard(model)
        trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    if engine == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids), optimizer
    if not engine.startswith("zero"):
        return model, optimizer
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(engine[4])},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    if device.type == "cuda":
        config["bf16"] = {"enabled": True}
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return wrapped, None


def _print(training: Training, arguments: argparse.Namespace, world: int, threads: int) -> None:
    seconds = training.clock.seconds
    step = statistics.median(
        a + b
        for a, b in zip(seconds["forward and backward"], seconds["optimizer step"], strict=True)
    )
    optimizer = statistics.median(seconds["optimizer step"])
    device = training.clock.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where += f", {world} x {threads} threads" if world > 1 else f", {threads} threads"
    what = f"{training.all / 1e6:.1f} M parameters, {training.trained / 1e6:.2f} M trained"
    print(f"## {training.view.name}{', LoRA' if arguments.lora else ''}: {what}\n")
    tokens = training.ids.numel()
    print(f"{where}; {tokens:,} tokens a step on each; torch {torch.__version__}; ", end="")
    print(f"step {1e3 * step:,.0f} ms, of it optimizer {1e3 * optimizer:,.1f} ms; ", end="")
    print(f"{len(seconds[OURS])} steps: median [range]\n")
    print("| reading | ms | of the step | of the optimizer step | times this project |")
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        if name in ("forward and backward", "optimizer step"):
            continue
        middle = statistics.median(taken)
        ratios = [t / o for t, o in zip(taken, seconds[OURS], strict=True)]
        spread = f"{1e3 * middle:,.2f} [{1e3 * min(taken):,.2f}, {1e3 * max(taken):,.2f}]"
        times = f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]"
        print(f"| {name} | {spread} | {middle / step:.2%} | {middle / optimizer:.1%} | {times} |")
    print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    engines = ("plain", "ddp", "zero2", "zero3", "fsdp2")
    parser.add_argument("--engine", choices=engines, default="plain")
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, help="a process; all cores shared out if not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
