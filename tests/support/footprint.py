"""What a training leaves behind in its process and on disk, to compare a watched one with a bare.

``python -m tests.support.footprint HOW``, in an empty folder, trains each of `TRAININGS`, unwatched
(``bare``) or with a monitor (``monitor``), and writes ``facts.json``. A new interpreter is needed,
because imports leave things behind too, so the monitor is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import locale
import logging
import multiprocessing.util
import os
import random
import re
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.hf_cases import build_trainer

__all__ = ["TRAININGS"]

Facts = dict[str, Any]
Watch = Callable[..., Any]

_TIMES = re.compile(r"runtime|per_second")
_STEPS = 4


# -- the trainings ----------------------------------------------------------------------------


def train_hf(watch: Watch, **more: Any) -> Facts:
    return train(build_trainer("plain", Path(), **SAVING, **more), watch)


def train_lora(watch: Watch) -> Facts:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    def build(model: Any, *args: Any, **keywords: Any) -> Trainer:
        lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
        return Trainer(get_peft_model(model, lora), *args, **keywords)

    return train_hf(watch, trainer_class=build)


def train_sft(watch: Watch) -> Facts:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
        max_position_embeddings=32,
    )
    settings = {"output_dir": "output", "use_cpu": True, "bf16": False, "max_steps": _STEPS}
    quiet = {"report_to": "none", "logging_steps": 1, "disable_tqdm": True}
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(**settings, **quiet, **SAVING),
        train_dataset=Dataset.from_list([{"input_ids": [3, 4, 5, 6 + i]} for i in range(16)]),
        eval_dataset=Dataset.from_list([{"input_ids": [3, 4, 5, 6]}] * 4),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
    )
    return train(trainer, watch)


def train_loop(watch: Watch) -> Facts:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    losses = []
    with watch(model, optimizer) as watched:
        for _ in range(_STEPS):
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            if watched is not None:
                watched.observe(loss=loss)
                watched.before_clip()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    owned = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    facts = {"losses": losses, **note_training(owned), **note_process()}
    return {**facts, "alive": refer_to(owned)}


TRAININGS: dict[str, Callable[[Watch], Facts]] = {
    "hf": train_hf,
    "lora": train_lora,
    "sft": train_sft,
    "loop": train_loop,
}
SAVING = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def train(trainer: Any, watch: Watch) -> Facts:
    with watch(trainer):
        trainer.train()
    owned = {
        "model": trainer.model,
        "optimizer": trainer.optimizer.optimizer,
        "scheduler": trainer.lr_scheduler,
        "trainer": trainer,
        "accelerator": trainer.accelerator,
        "wrapped_optimizer": trainer.optimizer,
        "args": trainer.args,
        "state": trainer.state,
        "control": trainer.control,
        "handler": trainer.callback_handler,
    }
    facts = {
        "log": [_without_times(entry) for entry in trainer.state.log_history],
        "files": dict(note_files(Path("output"))),
        **note_training(owned),
        **note_process(),
    }
    return {**facts, "alive": refer_to(owned)}


# -- what is noted ----------------------------------------------------------------------------


def note_training(owned: Mapping[str, Any]) -> Facts:
    """Numbers, hooks and attributes of what is trained and trains."""
    attributes, hooks = {}, {}
    modules = {f"model.{name}": module for name, module in owned["model"].named_modules()}
    for name, instance in {**owned, **modules}.items():
        for key, value in vars(instance).items():
            attributes[f"{name}.{key}"] = _describe(value)
            if "hooks" in key:
                hooks[f"{name}.{key}"] = len(value) if hasattr(value, "__len__") else str(value)
    for name, tensor in owned["model"].named_parameters():
        hooks[name] = [len(tensor._backward_hooks or ()), sorted(vars(tensor))]
        hooks[f"{name} after"] = len(tensor._post_accumulate_grad_hooks or ())
    return {
        "weights": {n: digest(t) for n, t in owned["model"].state_dict().items()},
        "optimizer": digest(owned["optimizer"].state_dict()),
        "scheduler": digest(owned["scheduler"].state_dict()),
        "attributes": attributes,
        "hooks": hooks | {f"global {n}": len(v) for n, v in _global_hooks()},
    }


def note_process() -> Facts:
    """What belongs to the whole process."""
    return {
        "random": digest(random.getstate()),
        "numpy random": digest(np.random.get_state()),  # noqa: NPY002 - scripts seed it
        "torch random": digest(torch.get_rng_state()),
        "threads": sorted(t.name for t in threading.enumerate()),
        "environment": dict(os.environ),
        "signals": {s.name: str(signal.getsignal(s)) for s in signal.valid_signals() if s in NAMED},
        "logging": {n: [lg.level, _names(lg.handlers), lg.disabled] for n, lg in _loggers()},
        "log records": [str(logging.getLogRecordFactory()), logging.raiseExceptions],
        "warnings": [str(f) for f in warnings.filters],
        "torch": note_torch(),
        "numpy": [np.geterr(), {k: str(v) for k, v in np.get_printoptions().items()}],
        "files open": sorted(_open_files()),
        "path": sys.path,
        "finders": [str(getattr(f, "__name__", type(f).__name__)) for f in sys.meta_path],
        "path hooks": len(sys.path_hooks),
        "hooks of the interpreter": [
            str(getattr(f, "__qualname__", f))
            for f in (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook)
        ],
        "traces": [str(sys.gettrace()), str(sys.getprofile())],
        "streams": [f"{type(s).__qualname__}" for s in (sys.stdin, sys.stdout, sys.stderr)],
        "exits": len(multiprocessing.util._finalizer_registry),
        "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled()],
        "collector": [gc.get_threshold(), len(gc.callbacks)],
        "place": [str(Path.cwd()), locale.setlocale(locale.LC_ALL)],
        "children": len(multiprocessing.active_children()),
    }


def note_torch() -> list[str]:
    return [
        str(value)
        for value in (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_autocast_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_deterministic_debug_mode(),
            torch.multiprocessing.get_sharing_strategy(),
            sorted(vars(torch._tensor_str.PRINT_OPTS).items()),
            torch.distributed.is_initialized(),
        )
    ]


def note_files(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix in (".pt", ".pth", ".bin"):
            yield name, digest(torch.load(path, weights_only=False))
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            state["log_history"] = [_without_times(entry) for entry in state["log_history"]]
            yield name, json.dumps(state)
        else:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def refer_to(owned: Mapping[str, Any]) -> dict[str, weakref.ref[Any]]:
    """Of what was trained, what must be gone once the script has let go of it."""
    held = ("model", "optimizer", "scheduler", "trainer", "accelerator", "state", "handler")
    refs: dict[str, weakref.ref[Any]] = {n: weakref.ref(owned[n]) for n in held if n in owned}
    return refs | {"parameter": weakref.ref(next(owned["model"].parameters()))}


def digest(value: Any) -> str:
    """A hash of tensors, arrays and containers of them, bit by bit."""
    seen = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            seen.update(f"{data.dtype}{tuple(data.shape)}".encode())
            seen.update(
                data.view(torch.uint8).numpy().tobytes()
                if data.dim()
                else repr(data.item()).encode()
            )
        elif isinstance(value, np.ndarray):
            seen.update(value.tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                seen.update(repr(key).encode())
                feed(item)
        elif isinstance(value, list | tuple):
            for item in value:
                feed(item)
        elif hasattr(value, "to_dict"):
            feed(value.to_dict())
        else:
            seen.update(re.sub(r" at 0x\w+", "", repr(value)).encode())

    feed(value)
    return seen.hexdigest()[:16]


def _describe(value: Any) -> str:
    """A value's type, and what it holds if that can be said."""
    if isinstance(value, FunctionType | MethodType):
        return value.__qualname__
    if isinstance(value, bool | int | str | None):
        return repr(value)
    if isinstance(value, list | tuple | set | dict):
        return f"{type(value).__qualname__} of {_names(value)}"
    return type(value).__qualname__


def _names(values: Any) -> list[str]:
    return [v if isinstance(v, str) else type(v).__qualname__ for v in values]


def _global_hooks() -> Iterator[tuple[str, Any]]:
    for module in (nn.modules.module, sys.modules["torch.optim.optimizer"]):
        for name, value in vars(module).items():
            if name.startswith("_global_") and hasattr(value, "__len__"):
                yield name, value


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    for name, logger in [("root", logging.getLogger()), *logging.root.manager.loggerDict.items()]:
        if isinstance(logger, logging.Logger) and (logger.handlers or logger.level):
            yield name, logger


def _open_files() -> Iterator[str]:
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if "/matplotlib/" not in target:  # which keeps the fonts of pictures for good
                yield re.sub(r"\[\d+\]", "", target)


def _without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "time" if _TIMES.search(key) else value for key, value in entry.items()}


NAMED = tuple(signal.Signals)


# -- how they are watched ---------------------------------------------------------------------


@contextlib.contextmanager
def leave_alone(*_: Any) -> Iterator[None]:
    yield None


def make_watch(folder: Path, monitors: list[Any]) -> Watch:
    import ulysses_monitor as um

    @contextlib.contextmanager
    def watch(subject: Any, optimizer: Any = None) -> Iterator[Any]:
        monitor = um.Monitor(folder / f"run{len(monitors)}", sample_every=2)
        monitors.append(monitor)
        if optimizer is not None:
            with monitor.watch(subject, optimizer):
                yield monitor
            return
        monitor.attach(subject)
        yield monitor

    return watch


def main(how: str) -> None:
    monitors: list[Any] = []
    watch = leave_alone if how != "monitor" else make_watch(Path("recorded").resolve(), monitors)
    facts, top = {}, Path.cwd()
    for name, run in TRAININGS.items():
        folder = top / name
        folder.mkdir()
        os.chdir(folder)
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002 - scripts seed it
        torch.manual_seed(3)
        held = facts[name] = run(watch)
        gc.collect()
        held["alive"] = sorted(n for n, ref in held["alive"].items() if ref() is not None)
    os.chdir(top)
    Path("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
