"""One training of a small model, with places at which a fault can break it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulysses_monitor as um
from benchmarks.faults.model import VOCABULARY, SmallModel, Texts
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.memory import MemorySink

__all__ = ["Recorded", "Setting", "Training"]

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The size and kind of a training.

    Attributes:
        name: its name in tables.
        stage: ``sft`` or ``dpo``.
        lora: rank of the adapters; 0 trains all weights.
        optimizer: ``adamw`` or ``sgd``.
    """

    name: str
    stage: str = "sft"
    lora: int = 0
    optimizer: str = "adamw"
    rate: float = 3e-3
    width: int = 32
    layers: int = 3
    batch: int = 8
    length: int = 20
    steps: int = 120
    warmup: int = 8
    clip: float = 1.0
    accumulate: int = 1
    weight_decay: float = 0.01
    seed: int = 0


@dataclass
class Recorded:
    """What a training recorded.

    Attributes:
        records: in the order in which rules saw them.
        refused: what the monitor says of a training that it cannot watch; empty if it can.
    """

    records: list[StepRecord]
    refused: str = ""


@dataclass
class Training:
    """A training; a fault changes its attributes before `run`.

    Attributes:
        rate_factor: multiplies the rate.
        clears: whether gradients are cleared after each step.
        schedules: whether the scheduler is stepped.
        first_step: steps that were done before: a resume.
        on_batch: changes tokens and labels of a step [B, T].
        attended: the attention mask of rows [B, T].
        on_loss: changes the loss of a step.
        on_gradients: changes the model's gradients before clipping.
        on_step: changes anything before a step.
        built: changes model and optimizer when they are made.
        trains: chooses the parameters of the optimizer.
        logs: further numbers of a step.
        tokenizer: what the loop says its tokenizer is.
        probes: probes on request.
        sample_every: see `um.Monitor`.
    """

    setting: Setting
    rate_factor: float = 1.0
    clears: bool = True
    schedules: bool = True
    first_step: int = 0
    clip_factor: float = 1.0
    optimizer_settings: dict[str, object] = field(default_factory=dict)
    adapter_targets: Sequence[str] = ("q_proj", "v_proj", "up_proj")
    on_batch: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    attended: Callable[[Tensor], Tensor] = torch.ones_like
    on_loss: Callable[[int, Tensor], Tensor] | None = None
    on_gradients: Callable[[int, nn.Module], None] | None = None
    on_step: Callable[[int, Training], None] | None = None
    built: Callable[[Training], None] | None = None
    before_adapters: Callable[[Training], None] | None = None
    trains: Callable[[nn.Module], list[nn.Parameter]] | None = None
    logs: Callable[[int, Training], dict[str, float]] | None = None
    tokenizer: object = None
    probes: Sequence[str] = ()
    sample_every: int = 5

    def run(self, run_dir: Path | None = None) -> Recorded:
        """Trains, and returns what was recorded.

        Args:
            run_dir: keeps the run there, recorded with the default rules.
        """
        setting = self.setting
        torch.manual_seed(setting.seed)
        self.draw = torch.Generator().manual_seed(setting.seed)
        self.texts = Texts(setting.seed)
        self.model: nn.Module = SmallModel(setting.width, setting.layers, setting.length)
        if setting.lora or setting.stage == "dpo":
            self._pretrain(60)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        if setting.lora:
            self._add_adapters(setting.lora)
        self.optimizer = self._make_optimizer()
        if self.built is not None:
            self.built(self)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.planned)
        sink = MemorySink()
        with tempfile.TemporaryDirectory() as folder:
            monitor = um.Monitor(
                run_dir or Path(folder) / "run",
                sinks=[sink],
                rules="default" if run_dir else "off",
                tensorboard=False,
                probes=list(self.probes),
                sample_every=self.sample_every,
            )
            start, words = self.first_step, self.tokenizer
            with monitor.watch(self.model, self.optimizer, step=start, tokenizer=words):
                for step in range(1, setting.steps + 1):
                    self._step(step, monitor)
        return Recorded(sink.records)

    # -- building --------------------------------------------------------------------------------

    def _pretrain(self, steps: int) -> None:
        """Teaches the base a language that is near the one of the training."""
        texts = Texts(self.setting.seed + 500)
        optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        for _ in range(steps):
            rows = texts.rows(self.setting.batch, self.setting.length, self.draw)
            _loss_of(self.model(rows), rows).backward()
            optimizer.step()
            optimizer.zero_grad()

    def _add_adapters(self, rank: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(self.adapter_targets)
        )
        self.model = inject_adapter_in_model(config, self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if self.before_adapters is not None:
            self.before_adapters(self)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        chosen = self.trains or (lambda model: [p for p in model.parameters() if p.requires_grad])
        rate = self.setting.rate * self.rate_factor
        if self.setting.optimizer == "sgd":
            return torch.optim.SGD(chosen(self.model), rate, momentum=0.9)
        settings: dict[str, object] = {"weight_decay": self.setting.weight_decay}
        return torch.optim.AdamW(chosen(self.model), rate, **(settings | self.optimizer_settings))  # type: ignore[arg-type]

    def planned(self, done: int) -> float:
        """Returns the share of the rate that the schedule has after `done` steps."""
        warmup, steps = self.setting.warmup, self.setting.steps
        if done < warmup:
            return done / warmup
        return max(0.02, 1 - (done - warmup) / (steps - warmup))

    # -- one step --------------------------------------------------------------------------------

    def _step(self, step: int, monitor: um.Monitor) -> None:
        if self.on_step is not None:
            self.on_step(step, self)
        for _ in range(self.setting.accumulate):
            loss, tokens, labelled, batch = self._forward(step)
            monitor.observe(loss=loss, tokens=tokens, loss_tokens=labelled, batch=batch)
            if loss.requires_grad:
                (loss / self.setting.accumulate).backward()
        if self.on_gradients is not None:
            self.on_gradients(step, self.model)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        if trained and self.setting.clip:
            nn.utils.clip_grad_norm_(trained, self.setting.clip * self.clip_factor)
        self.optimizer.step()
        if self.schedules:
            self.scheduler.step()
        if self.clears:
            self.model.zero_grad()
        if self.logs is not None:
            monitor.log(self.logs(step, self))

    def _forward(self, step: int) -> tuple[Tensor, int, int, dict[str, Tensor]]:
        """Returns the loss of a micro-batch, its tokens, its labels, and itself."""
        if self.setting.stage == "dpo":
            return self._forward_pairs(step)
        rows = self.texts.rows(self.setting.batch, self.setting.length, self.draw)
        labels = rows.clone()
        labels[:, : self.setting.length // 4] = IGNORED
        if self.on_batch is not None:
            rows, labels = self.on_batch(step, rows, labels)
        loss = _loss_of(self.model(rows), labels)
        loss = loss if self.on_loss is None else self.on_loss(step, loss)
        batch = {"input_ids": rows, "labels": labels, "attention_mask": self.attended(rows)}
        return loss, rows.numel(), int((labels != IGNORED).sum()), batch

    def _forward_pairs(self, step: int) -> tuple[Tensor, int, int, dict[str, Tensor]]:
        """The loss of DPO: chosen rows are of the language, rejected ones half random."""
        half, length = self.setting.batch // 2, self.setting.length
        chosen = self.texts.rows(half, length, self.draw)
        rejected = chosen.clone()
        noise = torch.randint(VOCABULARY, (half, length // 2), generator=self.draw)
        rejected[:, length // 2 :] = noise[:, : length - length // 2]
        if self.on_batch is not None:
            chosen, rejected = self.on_batch(step, chosen, rejected)
        rows = torch.cat([chosen, rejected])
        policy = _log_probabilities(self.model(rows), rows)
        with torch.no_grad():
            reference = _log_probabilities(self.reference(rows), rows)
        rewards = 0.1 * (policy - reference)
        margin = rewards[:half] - rewards[half:]
        self.numbers = {
            "train/rewards/chosen/total": float(rewards[:half].detach().mean()),
            "train/rewards/margins/total": float(margin.detach().mean()),
            "train/rewards/accuracies/total": float((margin.detach() > 0).float().mean()),
        }
        loss = -F.logsigmoid(margin).mean()
        loss = loss if self.on_loss is None else self.on_loss(step, loss)
        return loss, rows.numel(), rows.numel(), {"input_ids": rows}


def _loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean loss of the labels that are not ignored; 0 if all are, as trainers do."""
    wanted = labels[:, 1:].flatten()
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum"
    )
    return total / max(1, int((wanted != IGNORED).sum()))


def _log_probabilities(logits: Tensor, rows: Tensor) -> Tensor:
    """Returns the log-probability of each row [B]."""
    found = logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])
    return found.squeeze(-1).sum(-1)
