"""What reading the gradients costs: this project and others, side by side in the same steps.

    python -m benchmarks.capture [--engine plain|ddp|zero2|zero3|fsdp2] [--size 2m|30m|100m|1b]
                                 [--lora] [--steps 6] [--processes 2] [--threads N]

One training runs. At the moment before clipping, every way of reading takes its turn on the same
gradients, in an order that changes from step to step. This project is represented by the whole
monitor as a user has it: every gradient and LoRA metric at each step; optimizer state, parameters,
updates, adapters and replicas at each tenth; rules, run store and TensorBoard. Ten of its steps are
timed and divided by ten. Its sinks write on threads of their own while a training computes, so they
get time between those steps, and their CPU time is listed apart. Its reading is also timed alone:
gradients at each step, optimizer state at each tenth, nothing recorded. The others compute one norm
per parameter (OLMo's style four statistics, wandb.watch a histogram) and record nothing. Hooks that
fire in the backward pass have steps of their own, in which only the hooks are timed.

For each way it prints the median and range over steps, its share of a step without any of them and
of the optimizer step, and how many times as long as this project it takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from benchmarks import measure, peers
from benchmarks.models import SIZES, Size, build_llama
from benchmarks.tables import spread
from ulysses_monitor.engines import PlainEngine, find_engine
from ulysses_monitor.probes import AdamStateProbe, Capture, GradientProbe, Layout
from ulysses_monitor.session.opening import Training

OURS = "this project, all metrics"
READING = "its reading alone, gradients and optimizer state"
SINKS = "its sinks, CPU time of their threads"
SINK_SECONDS = 0.1
"""Pause between two steps of this project; a training computes far longer."""
ROUND = 10
"""Steps of this project that are timed together; one of them is a sampled step."""


@dataclass
class Clock:
    """Collects seconds by name."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def sync(self) -> None:
        """Waits for the device, so that a time covers the work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, name: str, call: Callable[[], Any]) -> None:
        """Times a call that all ranks make together."""
        if dist.is_initialized():
            dist.barrier()
        self.sync()
        began = time.perf_counter()
        call()
        self.sync()
        self.seconds[name].append(time.perf_counter() - began)


def main() -> None:
    arguments = _arguments()
    processes = 1 if arguments.engine == "plain" else arguments.processes
    if arguments.engine != "plain":
        measure.start(_run_rank, processes, arguments, arguments.threads)
        return
    torch.set_num_threads(arguments.threads or measure.share_of_cores(1))
    _run_rank(arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _run_rank(arguments: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    training = Training(arguments, device)
    for step in range(arguments.steps + 1):  # the first warms up
        training.step(step)
    if not dist.is_initialized() or dist.get_rank() == 0:
        _print(training, arguments)


class Training:
    """The model, its engine, the monitor and the clock."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.clock = Clock(device)
        self.zero = arguments.engine.startswith("zero")
        size = SIZES[arguments.size]
        self.ids = torch.randint(0, size.vocabulary, (size.rows, size.tokens), device=device)
        self.model = _build_model(size, lora=arguments.lora).to(device)
        if device.type == "cuda":
            self.model.bfloat16()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained, self.all = (
            sum(p.numel() for p in params) for params in (trained, self.model.parameters())
        )
        self.wrapped, self.optimizer = _wrap(self.model, arguments.engine, device)
        self.view = find_engine(self.wrapped, self.optimizer)
        self.session = um.Monitor(peers.free_folder() / "run").open(self.view, Training())
        layout = Layout(*zip(*self.view.parameters(), strict=True))
        probes = [GradientProbe(layout), AdamStateProbe(layout)]
        self.capture = Capture(self.view, probes, sample_every=ROUND)

    def step(self, number: int) -> None:
        """Trains one step and times every way of reading; the first step warms up."""
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
        """Calls the monitor as ten steps of a training do."""
        seconds, cpu = [], time.process_time()
        inside = 0.0
        for _ in range(ROUND):
            if dist.is_initialized():
                dist.barrier()
            self.clock.sync()
            began, cpu_began = time.perf_counter(), time.process_time()
            self.session.observe(loss=1.0, tokens=1)
            self.session.gradients_ready()
            self.session.stepped()
            self.session.step_ends()
            self.clock.sync()
            seconds.append(time.perf_counter() - began)
            inside += time.process_time() - cpu_began
            time.sleep(SINK_SECONDS)
        self.clock.seconds[OURS].append(sum(seconds) / ROUND)
        self.clock.seconds[SINKS].append((time.process_time() - cpu - inside) / ROUND)

    def _reading(self) -> None:
        """Reads ten steps: gradients and adapter ratios in each, Adam's moments in one."""
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


def _build_model(size: Size, *, lora: bool) -> nn.Module:
    model = build_llama(size, head_size=32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return model


def _wrap(model: nn.Module, engine: str, device: torch.device) -> tuple[Any, Any]:
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


def _print(training: Training, arguments: argparse.Namespace) -> None:
    seconds = training.clock.seconds
    step = statistics.median(
        a + b
        for a, b in zip(seconds["forward and backward"], seconds["optimizer step"], strict=True)
    )
    optimizer = statistics.median(seconds["optimizer step"])
    what = f"{training.all / 1e6:.1f} M parameters, {training.trained / 1e6:.2f} M trained"
    print(f"## {training.view.name}{', LoRA' if arguments.lora else ''}: {what}\n")
    tokens = training.ids.numel()
    print(f"{_machine(training.clock.device)}; {tokens:,} tokens a step on each; ", end="")
    print(f"torch {torch.__version__}; ", end="")
    print(f"step {1e3 * step:,.0f} ms, of it optimizer {1e3 * optimizer:,.1f} ms; ", end="")
    print(f"{len(seconds[OURS])} steps: median [range]\n")
    print("| reading | ms | of the step | of the optimizer step | times this project |")
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        if name in ("forward and backward", "optimizer step"):
            continue
        middle = statistics.median(taken)
        times = spread((t / o for t, o in zip(taken, seconds[OURS], strict=True)), ".1f")
        milliseconds = spread((1e3 * t for t in taken), ",.2f")
        share = f"{middle / step:.2%} | {middle / optimizer:.1%}"
        print(f"| {name} | {milliseconds} | {share} | {times} |")
    print()


def _machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    world = f"{dist.get_world_size()} x " if dist.is_initialized() else ""
    return f"{where}, {world}{torch.get_num_threads()} threads"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    engines = ("plain", "ddp", "zero2", "zero3", "fsdp2")
    parser.add_argument("--engine", choices=engines, default="plain")
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, help="of each process; an equal share of the cores if not given"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
