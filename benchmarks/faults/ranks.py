"""Trainings of two processes, with places at which a fault can break them.

Legend: B rows, T tokens, H heads, D elements of a head, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ulysses_monitor as um
from benchmarks.faults.model import SmallModel, Texts
from benchmarks.faults.training import Recorded, Setting
from ulysses_monitor.sinks.memory import MemorySink

__all__ = ["RankTraining"]


@dataclass
class RankTraining:
    """A training on two ranks with DDP; a fault changes its attributes before `run`.

    Attributes:
        sample_every: steps from one measurement of weights to the next.
        passes: micro-batches of a step.
        splits_rows: whether ranks share rows and split their tokens: sequence parallelism.
        documents: documents packed in a row; attention does not cross them.
        options: further arguments of DDP.
        on_model: changes the model before DDP gets it.
        on_wrapped: changes anything once DDP has the model, before the optimizer is made.
        on_step: changes anything before a step.
        on_pass: changes anything before a micro-batch: step and number of the pass.
        on_gradients: changes gradients after they were reduced.
        clips: clips gradients; torch's function if None.
        seed_of_rows: seed of a rank's rows.
        positions: positions of a rank's tokens [T / ranks], of those that it should have.
        leaks: whether attention crosses documents all the same.
    """

    setting: Setting
    sample_every: int = 5
    passes: int = 1
    splits_rows: bool = False
    documents: int = 1
    options: dict[str, Any] | None = None
    on_model: Callable[[RankTraining], None] | None = None
    on_wrapped: Callable[[RankTraining], None] | None = None
    on_step: Callable[[RankTraining, int], None] | None = None
    on_pass: Callable[[RankTraining, int, int], None] | None = None
    on_gradients: Callable[[RankTraining, int], None] | None = None
    on_loss: Callable[[RankTraining, Tensor, Tensor], Tensor] | None = None
    clips: Callable[[RankTraining], None] | None = None
    seed_of_rows: Callable[[int, int], int] = lambda seed, rank: seed + 1000 * rank
    positions: Callable[[Tensor], Tensor] = lambda right: right
    leaks: bool = False

    def run(self) -> Recorded:
        """Trains, and returns what rank 0 recorded."""
        setting, self.rank = self.setting, dist.get_rank()
        torch.manual_seed(setting.seed)
        rows_seed = setting.seed if self.splits_rows else self.seed_of_rows(setting.seed, self.rank)
        self.draw = torch.Generator().manual_seed(rows_seed)
        self.texts = Texts(setting.seed)
        self.model = _Model(self, setting)
        if self.on_model is not None:
            self.on_model(self)
        self.ddp = DistributedDataParallel(self.model, **(self.options or {}))
        if self.on_wrapped is not None:
            self.on_wrapped(self)
        self.optimizer = self._make_optimizer()
        sink = MemorySink()
        with tempfile.TemporaryDirectory() as folder:
            monitor = um.Monitor(
                Path(folder) / "run",
                sinks=[sink],
                rules="off",
                tensorboard=False,
                sample_every=self.sample_every,
            )
            with monitor.watch(self.ddp, self.optimizer):
                for step in range(1, setting.steps + 1):
                    self._step(step, monitor)
            dist.barrier()
        return Recorded(sink.records)

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients of this rank, by the names of their parameters."""
        named = self.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        if self.setting.optimizer == "sgd":
            return torch.optim.SGD(self.model.parameters(), self.setting.rate, momentum=0.9)
        return torch.optim.AdamW(self.model.parameters(), self.setting.rate)

    def _step(self, step: int, monitor: um.Monitor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate * min(1.0, step / self.setting.warmup)
        if self.on_step is not None:
            self.on_step(self, step)
        for number in range(self.passes):
            if self.on_pass is not None:
                self.on_pass(self, step, number)
            is_last = number == self.passes - 1
            with nullcontext() if is_last else self.ddp.no_sync():
                loss, rows = self._forward()
                monitor.observe(loss=loss / self.passes, tokens=rows.numel())
                (loss / self.passes).backward()
        if self.on_gradients is not None:
            self.on_gradients(self, step)
        if self.clips is not None:
            self.clips(self)
        elif self.setting.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Returns a micro-batch's loss and this rank's tokens [B, T]."""
        setting = self.setting
        length = setting.length // self.documents
        parts = [self.texts.rows(setting.batch, length, self.draw) for _ in range(self.documents)]
        rows = torch.cat(parts, dim=1)
        wanted = F.pad(rows[:, 1:], (0, 1), value=-100)
        if self.splits_rows:
            half = rows.shape[1] // dist.get_world_size()
            own = slice(self.rank * half, (self.rank + 1) * half)
            rows, wanted = rows[:, own], wanted[:, own]
        logits = self.ddp(rows).flatten(0, 1)
        if self.on_loss is not None:
            return self.on_loss(self, logits, wanted.flatten()), rows
        if not self.splits_rows:
            return F.cross_entropy(logits, wanted.flatten()), rows
        count = setting.batch * (setting.length - 1) / dist.get_world_size()
        return F.cross_entropy(logits, wanted.flatten(), reduction="sum") / count, rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends as the training's rows need it [B, H, T, D]."""
        if not self.splits_rows and self.documents == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        first = 0
        if self.splits_rows:
            first = self.rank * q.shape[2]
            k, v = _Gather.apply(k), _Gather.apply(v)
        mine = torch.arange(first, first + q.shape[2])[:, None]
        every = torch.arange(k.shape[2])[None]
        mask = every <= mine
        if not self.leaks:
            length = self.setting.length // self.documents
            mask &= every // length == mine // length
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Model(SmallModel):
    """A `SmallModel` that attends as its training says."""

    def __init__(self, training: RankTraining, setting: Setting) -> None:
        super().__init__(setting.width, setting.layers, setting.length)
        self.training_of = (training,)  # not a module
        for block in self.layers:
            block.attend = training.attend

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [B, T, V] of tokens [B, T]."""
        (training,) = self.training_of
        first = training.rank * tokens.shape[1] if training.splits_rows else 0
        right = torch.arange(first, first + tokens.shape[1])
        right = right % (training.setting.length // training.documents)
        x = self.embed(tokens) + self.positions(training.positions(right))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """Puts the parts of all ranks behind one another [B, H, T / ranks, D] -> [B, H, T, D]."""

    @staticmethod
    def forward(_: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(_: Any, *grads: Any) -> Any:
        (grad,) = grads
        whole = grad.contiguous()
        dist.all_reduce(whole)
        return whole.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]
