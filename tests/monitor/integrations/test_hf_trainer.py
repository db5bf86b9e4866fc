"""The monitor on Hugging Face's Trainer: plain, DDP and DeepSpeed.

A check runs within the children, on every rank, and says there what is wrong; each is a test here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ulysses_monitor as um
from tests.support.forget import forget_last_trainer
from tests.support.hf_cases import (
    build_trainer,
    rank,
    run_checks,
    weights,
    world,
    zero_optimizer,
)
from tests.support.spawn import spawn


def monitored(engine: str, folder: Path, **more: Any) -> tuple[Any, um.Monitor, um.MemorySink]:
    sink = um.MemorySink()
    names = ("sinks", "sample_every", "if_exists", "probes")
    settings = {k: more.pop(k) for k in names if k in more}
    settings.setdefault("sinks", []).append(sink)
    monitor = um.Monitor(folder / "run", tensorboard=False, **settings)
    trainer = build_trainer(engine, folder, **more)
    monitor.attach(trainer)
    return trainer, monitor, sink


# -- checks -----------------------------------------------------------------------------------


def check_a_monitor_is_detached_and_attached_again(engine: str, folder: Path) -> None:
    from ulysses_monitor.integrations.callback import TrainerWatcher

    trainer, monitor, sink = monitored(engine, folder)
    trainer.train()
    monitor.detach()
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, TrainerWatcher)]
    recorded = len(sink.records)
    trainer.train()
    assert len(sink.records) == recorded
    monitor.attach(trainer)
    trainer.train()
    if rank() == 0:
        assert len(sink.records) > recorded
        assert monitor.run_dir == folder / "run-2"
        assert um.open_run(folder / "run-2").info["status"] == "finished"


def check_an_attached_callback_uses_the_trainer_it_was_given(engine: str, folder: Path) -> None:
    from ulysses_monitor.integrations import callback

    def must_not_search(_: Any) -> Any:
        raise AssertionError("searched the stack for a Trainer that was given")

    trainer, _, sink = monitored(engine, folder)
    search, callback.calling_trainer = callback.calling_trainer, must_not_search
    try:
        trainer.train()
    finally:
        callback.calling_trainer = search
    if rank() == 0:
        assert len([r for r in sink.records if "train/loss/total" in r]) == 4


def check_weights_are_bit_equal_and_no_patch_remains(engine: str, folder: Path) -> None:
    bare = build_trainer(engine, folder)
    bare.train()
    forget_last_trainer()
    trainer, _, sink = monitored(engine, folder, sample_every=1)
    before = {name: set(vars(getattr(trainer, name))) for name in ("accelerator",)}
    trainer.train()
    for name, weight in weights(bare).items():
        assert torch.equal(weight, weights(trainer)[name]), name
    assert vars(trainer).keys() == vars(bare).keys()
    assert vars(trainer.accelerator).keys() == vars(bare.accelerator).keys()
    assert not {"backward", "clip_grad_norm_"} & vars(trainer.accelerator).keys()
    assert before["accelerator"] <= vars(trainer.accelerator).keys()
    if engine == "zero2":
        zero, other = zero_optimizer(trainer), zero_optimizer(bare)
        assert vars(zero).keys() == vars(other).keys()
        assert "step" not in vars(zero)
    if rank() == 0:
        records = [r for r in sink.records if "train/loss/total" in r]
        assert [r.step for r in records] == [1, 2, 3, 4]
        for record, entry in zip(records, trainer.state.log_history, strict=False):
            assert record["grad/norm/total"] == pytest.approx(float(entry["grad_norm"]), rel=1e-3)
            coefficient = 0.1 / (record["grad/norm/total"] + 1e-6)
            assert coefficient < 0.5  # the norm is from before clipping
            assert record["grad/clip_coef/total"] == pytest.approx(coefficient, rel=1e-5)
            assert record["train/loss/total"] == pytest.approx(entry["loss"], abs=1e-3)
            assert record["optim/lr_off_schedule/0"] == pytest.approx(0.0, abs=1e-12)
            # 2 micro-batches of 2 rows, 9 tokens of which 8 are predicted
            assert record["train/loss_tokens/total"] == 2 * 2 * 8 * world()


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
    "gather",
    "barrier",
    "all_to_all_single",
)


@contextmanager
def counted(counts: Counter[str]) -> Iterator[None]:
    """Counts the calls of torch.distributed's collectives."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def collectives_per_step(engine: str, folder: Path, watched: bool) -> list[Counter[str]]:
    from transformers import TrainerCallback

    counts: Counter[str] = Counter()
    steps: list[Counter[str]] = []

    class Each(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            counts.clear()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(Counter(counts))

    if watched:
        trainer, *_ = monitored(engine, folder, sample_every=3)
    else:
        trainer = build_trainer(engine, folder)
    trainer.add_callback(Each())
    with counted(counts):
        trainer.train()
    forget_last_trainer()
    return steps


def check_the_monitor_adds_one_all_reduce_to_a_step_sampled_or_not(
    engine: str, folder: Path
) -> None:
    bare = collectives_per_step(engine, folder, watched=False)
    watched = collectives_per_step(engine, folder, watched=True)
    assert len(bare) == len(watched) == 4
    for without, with_monitor in zip(bare, watched, strict=True):
        with_monitor.subtract(without)
        added = {name: count for name, count in with_monitor.items() if count}
        assert added == {"all_reduce": 1}, added


def check_a_probe_that_raises_on_one_rank_is_dropped_on_all(engine: str, folder: Path) -> None:
    from ulysses_monitor.probes import GradientProbe

    original, calls = GradientProbe.read, []

    def sums(self: GradientProbe, *args: Any) -> Tensor:
        calls.append(1)
        if rank() == world() - 1:
            raise RuntimeError("broken on one rank")
        return original(self, *args)

    GradientProbe.read = sums  # type: ignore[method-assign]
    try:
        trainer, _, sink = monitored(engine, folder, sample_every=1, max_steps=6)
        trainer.train()
    finally:
        GradientProbe.read = original  # type: ignore[method-assign]
    assert trainer.state.global_step == 6
    assert len(calls) == 3
    assert not any("grad/norm/total" in record for record in sink.records)
    for record in (r for r in sink.records if "train/loss/total" in r):
        assert record["param/norm/total"] > 0


class RaisingSink:
    """Always fails."""

    def write(self, item: Any) -> None:
        raise OSError("disk full")

    def flush(self) -> None:
        raise OSError("disk full")

    def close(self) -> None:
        raise OSError("disk full")


def check_a_sink_that_always_raises_does_not_stop_the_training(engine: str, folder: Path) -> None:
    trainer, *_ = monitored(engine, folder, sinks=[RaisingSink()])
    trainer.train()
    assert trainer.state.global_step == 4
    if rank() == 0:
        assert um.open_run(folder / "run").metrics().index.tolist() == [1, 2, 3, 4]
        assert um.open_run(folder / "run").info["status"] == "finished"


def check_a_taken_directory_gives_the_run_a_number_on_every_rank(engine: str, folder: Path) -> None:
    if rank() == 0:
        (folder / "run").mkdir()
        (folder / "run/run.json").write_text("{}")
    if dist.is_initialized():
        dist.barrier()
    trainer, monitor, _ = monitored(engine, folder)
    trainer.train()
    assert monitor.run_dir == folder / "run-2"
    assert (folder / "run/run.json").read_text() == "{}"
    if rank() == 0:
        assert um.open_run(folder / "run-2").info["status"] == "finished"


def check_a_directory_that_cannot_be_made_is_refused_on_every_rank(
    engine: str, folder: Path
) -> None:
    trainer = build_trainer(engine, folder)
    monitor = um.Monitor(folder / "file" / "run")
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        (folder / "file").touch()
    if dist.is_initialized():
        dist.barrier()
    with pytest.raises(um.InputError):
        um.Monitor(folder / "file" / "run")
    monitor.attach(trainer)
    with pytest.raises(um.InputError):
        trainer.train()
    assert "get_batch_samples" not in vars(trainer)


def check_resuming_from_a_checkpoint_continues_the_run(engine: str, folder: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer, *_ = monitored(engine, folder, **saving)
    trainer.train()
    forget_last_trainer()
    trainer, _, sink = monitored(engine, folder, **(saving | {"max_steps": 5}))
    trainer.train(resume_from_checkpoint=str(folder / "output/checkpoint-2"))
    if rank() != 0:
        return
    run = um.open_run(folder / "run")
    assert [r.step for r in sink.records if "train/loss/total" in r] == [3, 4, 5]
    assert run.metrics().index.tolist() == [1, 2, 3, 4, 5]
    assert run.metrics().loc[3, "grad/norm/total"] == pytest.approx(
        sink.records[0]["grad/norm/total"], rel=1e-6
    )
    assert len(run.info["starts"]) == 2
    assert run.info["resumed_at_step"] == 2
    checkpoints = run.events("checkpoint")
    assert {"checkpoint-2", "checkpoint-4"} <= set(checkpoints["path"])


def check_a_training_that_raised_can_be_repeated_without_counting_twice(
    engine: str, folder: Path
) -> None:
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise ValueError("out of order")

    trainer, _, sink = monitored(engine, folder, if_exists="overwrite")
    failing = Fails()
    trainer.add_callback(failing)
    with pytest.raises(ValueError, match="out of order"):
        trainer.train()
    if rank() == 0:
        assert um.open_run(folder / "run").info["status"] == "failed"
    trainer.remove_callback(failing)
    trainer.train()
    assert not {"backward", "clip_grad_norm_"} & vars(trainer.accelerator).keys()
    assert "get_batch_samples" not in vars(trainer)
    if rank() == 0:
        entries = [e for e in trainer.state.log_history if "loss" in e]
        records = [r for r in sink.records if "train/loss/total" in r]
        assert [r.step for r in records] == [1, 2, 1, 2, 3, 4]
        for record, entry in zip(records[2:], entries, strict=True):
            assert record["train/loss/total"] == pytest.approx(entry["loss"], abs=1e-3)
            assert record["optim/lr_off_schedule/0"] == pytest.approx(0.0, abs=1e-12)
        # The second training does not touch the first one's run.
        assert um.open_run(folder / "run").info["status"] == "failed"
        assert um.open_run(folder / "run-2").info["status"] == "finished"


def check_a_callback_finds_its_trainer_and_evaluations_are_recorded(
    engine: str, folder: Path
) -> None:
    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": 0.5, "f1-macro of all": 0.25, "rewards/chosen": 1.5}

    sink = um.MemorySink()
    monitor = um.Monitor(folder / "run", tensorboard=False, sinks=[sink])
    trainer = build_trainer(
        engine,
        folder,
        eval_strategy="steps",
        eval_steps=2,
        compute_metrics=compute_metrics,
        callbacks=[um.MonitorCallback(monitor)],
    )
    trainer.train()
    if rank() != 0:
        return
    frame = um.open_run(folder / "run").metrics()
    assert frame.index.tolist() == [1, 2, 3, 4]
    logged = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert sorted(logged) == [2, 4]
    for step, loss in logged.items():
        assert frame.loc[step, "eval/loss/total"] == pytest.approx(loss, rel=1e-6)
        assert frame.loc[step, "eval/accuracy/total"] == 0.5
        assert frame.loc[step, "eval/f1_macro_of_all/total"] == 0.25
        assert frame.loc[step, "eval/rewards/chosen/total"] == 1.5
    info = um.open_run(folder / "run").info
    assert (info["trainer"], info["world_size"], info["max_steps"]) == ("Trainer", world(), 4)
    assert info["engine"] == {"plain": "plain", "ddp": "ddp", "zero2": "deepspeed-zero2"}[engine]


def check_what_the_trainer_logs_is_recorded_and_nothing_twice(engine: str, folder: Path) -> None:
    from transformers import Trainer

    class Logs(Trainer):
        def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            # As TRL does: more of an evaluation than the results that `on_evaluate` gets.
            more = {
                "rewards/chosen": 1.5,
                "entropy": float("nan"),
                "": 7.0,
                "/acc": 0.5,
                3: "three",
            }
            prefix = "eval_" if "eval_loss" in logs else ""
            named = {f"{prefix}{name}" if prefix else name: n for name, n in more.items()}
            super().log({**logs, **named}, *args, **kwargs)

    trainer, _, sink = monitored(
        engine, folder, trainer_class=Logs, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    if rank() != 0:
        return
    frame = um.open_run(folder / "run").metrics()
    for family, steps in (("train", [1, 2, 3, 4]), ("eval", [2, 4])):
        for stat, value in (("rewards/chosen", 1.5), ("acc", 0.5), ("unnamed", 7.0)):
            recorded = frame[f"{family}/{stat}/total"].dropna()
            assert recorded.index.tolist() == steps, (family, stat)
            assert set(recorded) == {value}
    assert any("train/entropy/total" in record for record in sink.records)
    for name in ("train/loss/total", "eval/loss/total", "eval/runtime/total"):
        seen = [record.step for record in sink.records if name in record]
        assert seen == ([2, 4] if name.startswith("eval") else [1, 2, 3, 4]), name
    assert not {"train/epoch/total", "train/train_runtime/total", "train/total_flos/total"} & set(
        frame.columns
    )


def check_batches_modules_and_noise_are_read(engine: str, folder: Path) -> None:
    trainer, _, _ = monitored(engine, folder, sample_every=1, probes=["modules"], max_steps=7)
    trainer.train()
    assert not any(module._forward_pre_hooks for module in trainer.model.model.layers)
    if rank() == 0:
        frame = um.open_run(folder / "run").metrics()
        assert frame["data/label_own/total"].tolist() == [1.0] * 7
        assert frame["activation/rms/layer/1"].notna().all()
        assert frame["attention/logit_max/total"].notna().all()
        has_noise = engine != "zero2"  # which keeps its gradients to itself
        assert ("grad/noise_scale/total" in frame) <= has_noise
        assert ("grad/noise/total" in frame) == has_noise
        if has_noise:
            assert frame["grad/carried/total"].iloc[1:].tolist() == [0.0] * 6


CHECKS = {name: f for name, f in sorted(globals().items()) if name.startswith("check_")}
ENGINES = {1: ["plain"], 2: ["ddp", "zero2"]}


def why_not(engine: str, name: str) -> str:
    if engine == "plain" and "all_reduce" in name:
        return "one process has no collective"
    if engine == "zero2" and ("can_be_repeated" in name or "attached_again" in name):
        return "transformers cannot train twice with DeepSpeed on one Trainer"
    return ""


def run_all(root: str, engines: list[str]) -> dict[str, str]:
    words = {}
    for engine in engines:
        checks = {name: check for name, check in CHECKS.items() if not why_not(engine, name)}
        words |= run_checks(checks, root, [engine])
    return words


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    root = str(tmp_path_factory.mktemp("hf"))
    return {n: spawn(run_all, n, args=[root, ENGINES[n]], timeout=200) for n in ENGINES}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("engine", ["plain", "ddp", "zero2"])
def test_with(words: dict[int, list[dict[str, str]]], engine: str, name: str) -> None:
    if reason := why_not(engine, name):
        pytest.skip(reason)
    for each in words[1 if engine == "plain" else 2]:
        assert each[f"{engine}-{name}"] == ""


def fail_in_training(root: str) -> None:
    from transformers import Trainer

    class Fails(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                time.sleep(1.0)  # this process then ends at once, which may cost the last second
                raise ValueError("out of order")
            return super().compute_loss(*args, **kwargs)

    trainer, *_ = monitored("plain", Path(root), trainer_class=Fails)
    trainer.train()


def test_a_training_that_raises_leaves_a_run_that_opens(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="out of order"):
        spawn(fail_in_training, 1, args=[str(tmp_path)], timeout=60)
    run = um.open_run(tmp_path / "run")
    assert run.info["status"] in ("failed", "crashed")
    assert run.metrics().index.tolist()[:2] == [1, 2]


def test_the_clip_factor_is_1_where_the_trainer_does_not_clip(tmp_path: Path) -> None:
    trainer, sink = build_trainer("plain", tmp_path, max_grad_norm=0.0), um.MemorySink()
    um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink]).attach(trainer)
    trainer.train()
    factors = [r["grad/clip_coef/total"] for r in sink.records if "grad/norm/total" in r]
    assert factors == [1.0] * 4


def test_special_tokens_of_the_trainers_tokenizer_are_counted(tmp_path: Path) -> None:
    trainer, sink = build_trainer("plain", tmp_path, max_steps=1), um.MemorySink()
    um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink]).attach(trainer)
    trainer.processing_class = SimpleNamespace(all_special_ids=list(range(31)))
    trainer.train()
    assert [r["data/special_tokens/total"] for r in sink.records if "train/loss/total" in r] == [
        1.0
    ]
