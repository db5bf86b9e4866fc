"""The monitor on Lightning's Trainer: the same training with and without it."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ulysses_monitor as um
from tests.support.exact_engines import merged
from tests.support.spawn import spawn

CLIP = 0.05
VOCAB, LENGTH, ROWS = 17, 6, 2
BATCHES = 5  # of each epoch: a window of 2 micro-batches may end with 1


class Net(pl.LightningModule):
    """Keeps the losses it logs, and the norms it sees before clipping, by step."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.save_hyperparameters()
        self.automatic_optimization = not how.startswith("manual")
        self.how = how
        self.body = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, VOCAB)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        logits = self.head(self.body(batch["input_ids"]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_certainty", logits.softmax(-1).max())
        self.losses.append(loss.item())
        if self.how == "fails" and index == 3:
            raise RuntimeError("broken on purpose")
        if self.how.startswith("manual"):
            self.step_by_hand(loss)
        return loss

    def step_by_hand(self, loss: Tensor) -> None:
        optimizers = self.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.how == "manual-clip":
            self.norms.append(norm(self))
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        elif self.how == "manual-torch":
            self.norms.append(norm(self))
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.how not in ("manual-clip", "manual-torch"):
            self.norms.append(norm(self))

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", float(self.current_epoch + index), batch_size=1)
        self.log("val/sure", 0.5, batch_size=1)

    def configure_optimizers(self) -> Any:
        if self.how == "manual-two":
            return [torch.optim.SGD(p.parameters(), lr=0.1) for p in (self.body, self.head)]
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def norm(module: nn.Module) -> float:
    grads = [p.grad.double() for p in module.parameters() if p.grad is not None]
    return math.sqrt(sum(float(g.square().sum()) for g in grads))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, VOCAB, (BATCHES * ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < LENGTH - torch.arange(len(rows))[:, None] % 3).long()
    keys = ("input_ids", "labels", "attention_mask")
    data = [
        dict(zip(keys, (row, row.masked_fill(m == 0, -100), m), strict=True))
        for row, m in zip(rows, mask, strict=True)
    ]
    return DataLoader(data, batch_size=ROWS)  # type: ignore[arg-type]


def build_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**quiet, **defaults, **settings})


def fit(
    folder: Path,
    how: str = "",
    monitor: um.Monitor | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> tuple[pl.Trainer, Net]:
    module = Net(how)
    callbacks = settings.pop("callbacks", [])
    if monitor is not None:
        callbacks = [*callbacks, um.LightningCallback(monitor)]
    trainer = build_trainer(folder, callbacks=callbacks, **settings)
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return trainer, module


def watched(folder: Path, **settings: Any) -> tuple[um.Monitor, um.MemorySink]:
    sink = um.MemorySink()
    settings = {"tensorboard": False, "sample_every": 1, "sinks": [sink], **settings}
    return um.Monitor(folder / "run", **settings), sink


def half_precision() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


CASES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "automatic": ("", lambda: {"gradient_clip_val": CLIP}),
    "unclipped": ("", dict),
    "accumulated": ("", lambda: {"gradient_clip_val": CLIP, "accumulate_grad_batches": 2}),
    "by value": ("", lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16": ("", lambda: {"gradient_clip_val": CLIP, "precision": "bf16-mixed"}),
    "fp16": (
        "",
        lambda: {
            "gradient_clip_val": CLIP,
            "accumulate_grad_batches": 2,
            "plugins": [half_precision()],
        },
    ),
    "manual": ("manual", dict),
    "manual, clipped": ("manual-clip", dict),
    "manual, clipped by torch": ("manual-torch", dict),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_is_recorded_and_unchanged(case: str, tmp_path: Path) -> None:
    how, settings = CASES[case]
    _, bare = fit(tmp_path / "bare", how, **settings())
    monitor, sink = watched(tmp_path)
    trainer, module = fit(tmp_path / "fit", how, monitor, **settings())
    assert module.losses == bare.losses
    assert module.norms == bare.norms
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name]), name
    records = merged(sink)
    assert len(records) == len(module.norms) == trainer.global_step
    window = trainer.accumulate_grad_batches
    for number, record in enumerate(records):
        assert record["grad/norm/total"] == pytest.approx(module.norms[number], rel=1e-6)
        first = number // (len(records) // 2) * BATCHES + number % (len(records) // 2) * window
        losses = module.losses[first : first + min(window, BATCHES - first % BATCHES)]
        assert record["train/loss/total"] == pytest.approx(sum(losses) / window, rel=1e-5)
        assert record["train/loss_tokens/total"] > 0
        assert record["train/tokens_per_second/total"] > 0
        assert record["optim/lr/0"] == 1e-2
        assert 0 < record["train/certainty/total"] < 1
    assert um.open_run(tmp_path / "run").info["status"] == "finished"


def test_clipping_is_told_where_lightning_clips(tmp_path: Path) -> None:
    for case in ("automatic", "unclipped", "by value", "manual, clipped"):
        monitor, sink = watched(tmp_path / case)
        _, module = fit(tmp_path, CASES[case][0], monitor, **CASES[case][1]())
        found = [record.get("grad/clip_coef/total") for record in merged(sink)]
        clipped = pytest.approx([CLIP / n for n in module.norms], rel=1e-4)
        expected: dict[str, Any] = {
            "automatic": clipped,
            "unclipped": [1.0] * len(found),
            "manual, clipped": clipped,
        }
        assert found == expected.get(case, [None] * len(found))


def test_nothing_of_ours_remains_on_the_trainer(tmp_path: Path) -> None:
    bare, _ = fit(tmp_path)
    monitor, _ = watched(tmp_path)
    trainer, _ = fit(tmp_path, monitor=monitor)
    assert vars(trainer).keys() == vars(bare).keys()
    assert vars(trainer.precision_plugin).keys() == vars(bare.precision_plugin).keys()
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_evaluations_are_recorded(tmp_path: Path) -> None:
    monitor, _ = watched(tmp_path)
    fit(tmp_path, monitor=monitor)
    run = um.open_run(tmp_path / "run")
    found = run.metrics("eval/*").dropna()
    assert found.index.tolist() == [BATCHES, 2 * BATCHES]
    assert found["eval/loss/total"].tolist() == [2.0, 3.0]  # means of 0 to 4, and 1 to 5
    assert found["eval/sure/total"].tolist() == [0.5, 0.5]


def test_the_run_says_what_was_fitted(tmp_path: Path) -> None:
    monitor, _ = watched(tmp_path)
    fit(tmp_path, monitor=monitor, accumulate_grad_batches=2)
    info = um.open_run(tmp_path / "run").info
    assert info["trainer"] == "lightning.Trainer"
    assert info["engine"] == "plain"
    assert info["model"]["class"] == "Net"
    assert info["max_steps"] == 6
    assert info["hyperparameters"] == {"how": ""}
    assert info["training_arguments"]["accumulate_grad_batches"] == 2
    assert info["training_arguments"]["strategy"] == "SingleDeviceStrategy"


def test_a_fit_that_resumes_continues_the_run(tmp_path: Path) -> None:
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "kept", filename="last", save_top_k=-1)
    whole, _ = watched(tmp_path / "whole")
    expected = fit(tmp_path, monitor=whole)[1]
    first, _ = watched(tmp_path)
    fit(tmp_path, "", first, max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    second, _ = watched(tmp_path)
    module = fit(tmp_path, "", second, tmp_path / "kept" / "last.ckpt")[1]
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name]), name
    run, other = um.open_run(tmp_path / "run"), um.open_run(tmp_path / "whole" / "run")
    norms = run.metrics("grad/norm/total")
    assert norms.equals(other.metrics("grad/norm/total"))
    assert run.events(kind="checkpoint")["path"].tolist() == ["last.ckpt"]


def test_a_checkpoint_has_nothing_of_ours_without_policies(tmp_path: Path) -> None:
    def keep(name: str, monitor: um.Monitor | None) -> dict[str, Any]:
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / name, filename="kept")
        fit(tmp_path, "", monitor, callbacks=[checkpoint], enable_checkpointing=True)
        return torch.load(tmp_path / name / "kept.ckpt", weights_only=False)

    bare, ours = keep("bare", None), keep("watched", watched(tmp_path)[0])
    assert bare.keys() == ours.keys()
    assert len(bare["callbacks"]) == len(ours["callbacks"])


def test_policies_remember_across_checkpoints(tmp_path: Path) -> None:
    def settings() -> Any:
        return watched(tmp_path, policies=["zclip"])[0]

    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "kept", filename="last", save_top_k=-1)
    fit(tmp_path, "", settings(), max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    fit(tmp_path, "", settings(), tmp_path / "kept" / "last.ckpt")
    events = um.open_run(tmp_path / "run").events()
    assert "policies_anew" not in events.columns
    held = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=False)["callbacks"]
    assert "policies" in held["LightningCallback"]


def test_each_fit_of_one_monitor_is_a_run(tmp_path: Path) -> None:
    monitor, _ = watched(tmp_path)
    callback = um.LightningCallback(monitor)
    for _ in range(2):
        build_trainer(tmp_path, callbacks=[callback]).fit(Net(), loader(), loader())
    for name in ("run", "run-2"):
        run = um.open_run(tmp_path / name)
        assert run.metrics("grad/norm/total").index.tolist() == list(range(1, 2 * BATCHES + 1))
        assert run.info["status"] == "finished"


def test_a_fit_that_fails_says_why(tmp_path: Path) -> None:
    monitor, _ = watched(tmp_path)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(tmp_path, "fails", monitor)
    info = um.open_run(tmp_path / "run").info
    assert info["status"] == "failed"
    assert info["error"] == "RuntimeError: broken on purpose"
    assert info["last_step"] == 3
    fit(tmp_path, monitor=monitor)
    assert um.open_run(tmp_path / "run-2").info["status"] == "finished"


def test_a_fit_that_is_interrupted_was_stopped(tmp_path: Path) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyboardInterrupt

    monitor, _ = watched(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, monitor=monitor, callbacks=[Interrupt()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert um.open_run(tmp_path / "run").info["status"] == "stopped"


def test_a_policy_stops_a_fit_and_saves_it(tmp_path: Path) -> None:
    def stop_at_3(history: list[um.StepRecord]) -> list[um.Action]:
        kinds = ("save", "stop") if history[-1].step == 3 else ()
        return [um.Action(kind=kind) for kind in kinds]

    monitor, _ = watched(tmp_path, policies=[stop_at_3])
    trainer, _ = fit(tmp_path, monitor=monitor)
    assert trainer.global_step == 3
    assert (tmp_path / "step=3.ckpt").is_file()
    run = um.open_run(tmp_path / "run")
    assert run.info["status"] == "stopped"
    assert run.events(kind="checkpoint")["path"].tolist() == ["step=3.ckpt"]


def test_a_batch_that_cannot_be_read_costs_its_counts(tmp_path: Path) -> None:
    class Odd(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise ValueError("not like this")

    class Oddly(pl.Callback):
        def setup(self, trainer: Any, pl_module: Net, stage: str) -> None:
            pl_module.transfer_batch_to_device = lambda batch, *_: Odd(batch)  # type: ignore[method-assign]

    monitor, sink = watched(tmp_path)
    fit(tmp_path, monitor=monitor, callbacks=[Oddly()])
    records = merged(sink)
    assert len(records) == 2 * BATCHES
    assert "train/loss/total" in records[0]
    assert "train/loss_tokens/total" not in records[0]
    parts = um.open_run(tmp_path / "run").events(kind="monitor")["part"].tolist()
    assert parts == ["counting tokens"]


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    monitor, _ = watched(tmp_path)
    with pytest.raises(um.InputError, match="Net has 2 optimizers; expected 1"):
        fit(tmp_path, "manual-two", monitor)


def test_an_untried_strategy_is_refused_by_name() -> None:
    from ulysses_monitor.integrations.lightning_trainer import engine_of

    trainer = SimpleNamespace(strategy=pl.strategies.FSDPStrategy())
    allowed = "allowed: SingleDeviceStrategy, DDPStrategy"
    with pytest.raises(um.InputError, match=f"strategy is FSDPStrategy; {allowed}"):
        engine_of(trainer, Net())


def test_attach_names_the_callback(tmp_path: Path) -> None:
    with pytest.raises(um.InputError, match=r"callbacks=\[um.LightningCallback\(monitor\)\]"):
        watched(tmp_path)[0].attach(build_trainer(tmp_path))


def test_without_lightning_only_making_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulysses_monitor.integrations import lightning

    monkeypatch.setattr(lightning, "_NAMESPACES", {"no.such": "no_such"})
    with pytest.raises(um.InputError, match="which is not installed"):
        um.LightningCallback(watched(tmp_path)[0])


def test_both_namespaces_accept_it(tmp_path: Path) -> None:
    import pytorch_lightning

    callback = um.LightningCallback(watched(tmp_path)[0])
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, pytorch_lightning.Callback)
    assert isinstance(callback, um.LightningCallback)
    other = pytorch_lightning.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    assert callback in other.callbacks
    pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu")


def test_a_copy_works_as_well(tmp_path: Path) -> None:
    callback = copy.copy(um.LightningCallback(watched(tmp_path)[0]))
    assert isinstance(callback, um.LightningCallback | pl.Callback)
    trainer = build_trainer(tmp_path, callbacks=[callback])
    trainer.fit(Net(), loader())
    assert um.open_run(tmp_path / "run").info["last_step"] == 2 * BATCHES


def fit_on_two(root: str) -> list[Any]:
    """The child: bare and watched; returns norms, weights and what rank 0 recorded."""
    found: list[Any] = []
    for name in ("bare", "watched"):
        monitor, sink = watched(Path(root))
        _, module = fit(
            Path(root, name),
            "",
            monitor if name == "watched" else None,
            devices=2,
            strategy="ddp",
            gradient_clip_val=CLIP,
            accumulate_grad_batches=2,
        )
        weights = torch.cat([w.flatten() for w in module.state_dict().values()])
        numbers = [[r["grad/norm/total"], r["train/loss_tokens/total"]] for r in merged(sink)]
        found.append([weights, module.losses, module.norms, numbers])
    return found


def test_ddp_on_two_processes_is_exact(tmp_path: Path) -> None:
    ranks = spawn(fit_on_two, 2, args=[str(tmp_path)])
    for bare, ours in ranks:
        assert torch.equal(bare[0], ours[0])
        assert bare[1:3] == ours[1:3]
    (_, (_, _, norms, numbers)), (_, (_, _, _, nothing)) = ranks
    assert nothing == []
    assert [n for n, _ in numbers] == pytest.approx(norms, rel=1e-6)
    assert um.open_run(tmp_path / "run").info["engine"] == "ddp"


def test_an_alert_names_the_rows_that_the_loader_drew(tmp_path: Path) -> None:
    rules = [{"train/loss/total > 0": {"name": "first", "cooldown": 99, "clear": 99}}]
    monitor, sink = watched(tmp_path, rules=rules)
    fit(tmp_path, monitor=monitor, accumulate_grad_batches=2)
    (alert,) = [e for e in sink.events if e.kind == "alert"]
    (event,) = [e for e in sink.events if e.kind == "rows"]
    rows = sorted(event.data["rows"], key=lambda row: row["index"])
    assert [(r["index"], r["micro_batch"]) for r in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [r["length"] for r in rows] == [6, 5, 4, 6]  # without padding
    assert {r["hash"] for r in alert.data["rows"]} == {r["hash"] for r in rows}


def test_computing_a_step_again_is_refused_by_name(tmp_path: Path) -> None:
    monitor, _ = watched(tmp_path, rules=[{"loss_spike": {"on_alert": "rerun"}}])
    with pytest.raises(um.InputError, match=r"rule loss_spike: .*uses Lightning's Trainer"):
        fit(tmp_path, monitor=monitor)
