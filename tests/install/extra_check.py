"""Uses the installed package with whatever else is installed; a script without pytest.

`python extra_check.py` watches a plain loop in the working directory and reads the run, attaches to
a Trainer if transformers is there, and tries what each optional package is for. It prints a word
for each part that it used.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import ulysses_core as uc
import ulysses_monitor as um
from ulysses_monitor.probes.compiled import KERNELS

STEPS = 3
SINKS = {
    "tensorboard": ("tensorboard", {}),
    "wandb": ("wandb", {"mode": "offline"}),
    "mlflow": ("mlflow", {"tracking_uri": "http://127.0.0.1:9"}),
    "prometheus": ("prometheus_client", {"port": 0}),
    "trackio": ("trackio", {}),
    "opentelemetry": ("opentelemetry.exporter.otlp.proto.http", {"endpoint": "http://127.0.0.1:9"}),
}
"""The package that each sink needs, and settings of it; making a sink opens nothing."""


def has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def watch() -> None:
    """Watches a loop with the sinks that are there and need no server, and reads its run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    local = [{name: SINKS[name][1]} for name in ("prometheus", "wandb") if has(SINKS[name][0])]
    monitor = um.Monitor("run", sample_every=1, sinks=["csv", *local])
    with monitor.watch(model, optimizer):
        for _ in range(STEPS):
            loss = model(torch.ones(4, 8)).square().mean()
            monitor.observe(loss=loss, tokens=4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    run = um.open_run("run")
    assert run.summary()["steps"] == STEPS
    assert (run.metrics("grad/norm/total") > 0).all(axis=None)
    assert Path("run/tensorboard").exists() == has("tensorboard")


def refusal(call: Callable[[], object]) -> str:
    """Returns what is said about a part whose package is not installed."""
    try:
        call()
    except um.InputError as error:
        return str(error)
    return "it was not refused"


def try_optional_parts() -> None:
    """Uses each optional package that is there; each other one must be named."""
    run, runs = um.open_run("run"), um.open_runs(".")
    parts: dict[str, tuple[str, Callable[[], object]]] = {
        "plots": ("matplotlib", lambda: run.plot("grad/norm/total")),
        "duckdb": ("duckdb", lambda: runs.sql("select count(*) from runs")),
        "core": ("peft", lambda: uc.sequence_parallel),
        "text-metrics": ("sacrebleu", score),
    }
    for sink, (package, settings) in SINKS.items():
        parts[sink] = (package, partial(um.Monitor, "other", sinks=[{sink: settings}]))
    for extra, (package, call) in parts.items():
        if has(package):
            call()
            sys.stdout.write(f"{extra}\n")
        elif extra not in ("core", "text-metrics"):  # which is part of the core
            said = refusal(call)
            assert f"pip install 'ulysses-toolkit[{extra}]'" in said, said


def score() -> None:
    """Compares answers with what they should be."""
    from ulysses_core.answers import compare_texts

    assert compare_texts(["four eggs"], ["four eggs"])["rouge_l"] == 100


def attach() -> None:
    """Trains with transformers, watched and not; the two must be the same."""
    sys.path.insert(0, str(Path(__file__).parent))
    from trainer_check import main

    assert main() == 0
    sys.stdout.write("trainers\n")


def main() -> None:
    for name in set(um.__all__) - {"MonitorCallback"}:
        getattr(um, name)
    watch()
    try_optional_parts()
    assert (KERNELS is not None) == has("numba")
    if KERNELS is not None:
        sys.stdout.write("kernels\n")
    if has("transformers"):
        attach()


if __name__ == "__main__":
    main()
