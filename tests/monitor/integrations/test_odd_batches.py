"""Whatever a Trainer's batches and losses are, it trains as it does without the monitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import ulysses_monitor as um
from tests.support.spawn import spawn
from ulysses_monitor.common.errors import InputError

STEPS = 3


@dataclass
class Rows:
    input_ids: Tensor
    labels: Tensor


class Hostile(Mapping[str, Any]):
    """A batch that lets nobody look into it."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("do not look")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Unlabelled:
    """Labels that are no tensor."""


def jagged() -> Tensor:
    rows = [torch.ones(2, 3).long(), torch.ones(1, 3).long()]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def strided() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 4)])


IDS = torch.ones(2, 4).long()
BATCHES: dict[str, Callable[[], Any]] = {
    "jagged labels": lambda: {"labels": jagged()},
    "jagged everything": lambda: {"input_ids": jagged(), "attention_mask": jagged()},
    "strided nested labels": lambda: {"labels": strided(), "input_ids": strided()},
    "sparse labels": lambda: {"labels": IDS.to_sparse()},
    "complex labels": lambda: {"labels": IDS.to(torch.complex64)},
    "meta labels": lambda: {"labels": torch.ones(2, 4, device="meta")},
    "empty labels": lambda: {"labels": torch.ones(0, 4), "input_ids": torch.ones(0, 4)},
    "labels of another kind": lambda: {"labels": Unlabelled(), "input_ids": "text"},
    "lists": lambda: {"labels": [[1, 2]], "input_ids": [[1, 2]], "attention_mask": [[1, 1]]},
    "strings": lambda: {"text": ["a", "b"]},
    "a tuple": lambda: (IDS, IDS),
    "a list of strings": lambda: ["a", "b"],
    "a dataclass": lambda: Rows(IDS, IDS),
    "a tensor": lambda: IDS,
    "a string": lambda: "ab",
    "a number": lambda: 3,
    "None": lambda: None,
    "a hostile mapping": Hostile,
    "huge": lambda: {"labels": torch.zeros(1).expand(1000, 1000).long()},
    "masks of other shapes": lambda: {
        "attention_mask": torch.ones(2, 3, 4),
        "position_ids": torch.ones(3, 2, 4),
        "completion_mask": torch.ones(5),
        "prompt_mask": torch.ones(2, 3),
    },
}


class OddTrainer(Trainer):
    """Hands out `batch` and trains a model that does not look at it."""

    batch: Callable[[], Any]
    returned: Callable[[list[Any]], Any] = staticmethod(lambda batches: batches)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return self.returned([self.batch() for _ in batches]), None

    def _get_num_items_in_batch(self, *_: Any) -> None:
        return None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        return self.make_loss(model(torch.ones(2, 4)).square().mean())

    def make_loss(self, loss: Tensor) -> Tensor:
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def train(trainer_class: type[Trainer], folder: Path, *sinks: um.Sink) -> list[Tensor]:
    torch.manual_seed(0)
    arguments = {"max_steps": STEPS, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings = {"logging_strategy": "no", "save_strategy": "no", "remove_unused_columns": False}
    trainer = trainer_class(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)),
        TrainingArguments(str(folder / "output"), **arguments, **settings),
        train_dataset=[{"x": 0}] * 64,
        data_collator=lambda rows: {"x": torch.zeros(len(rows))},
    )
    if sinks:
        um.Monitor(folder / "run", tensorboard=False, sinks=[*sinks]).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def compare(trainer_class: type[Trainer], folder: Path) -> um.MemorySink:
    """Trains bare and watched; the gradients of every step are recorded."""
    sink = um.MemorySink()
    bare, watched = train(trainer_class, folder), train(trainer_class, folder, sink)
    assert all(map(torch.equal, bare, watched))
    norms = [record["grad/norm/total"] for record in sink.records if "grad/norm/total" in record]
    assert len(norms) == STEPS
    assert all(norm > 0 for norm in norms)
    return sink


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_of_any_kind_costs_counts_only(kind: str, tmp_path: Path) -> None:
    odd = type("Odd", (OddTrainer,), {"batch": staticmethod(BATCHES[kind])})
    sink = compare(odd, tmp_path)
    assert len([r for r in sink.records if "train/loss/total" in r]) == STEPS
    known = [r["train/loss_tokens/total"] for r in sink.records if "train/loss_tokens/total" in r]
    assert all(count >= 0 for count in known)  # not NaN


def test_batches_that_come_once_are_left_to_the_training(tmp_path: Path) -> None:
    class Once(list[Any]):  # transformers asks for the number of batches
        def __iter__(self) -> Iterator[Any]:
            while self:
                yield self.pop(0)

    class Odd(OddTrainer):
        batch = staticmethod(lambda: {"labels": IDS})
        returned = staticmethod(Once)

    compare(Odd, tmp_path)


LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "half": lambda loss: loss.bfloat16(),
    "double": lambda loss: loss.double(),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_another_kind_is_recorded(kind: str, tmp_path: Path) -> None:
    odd = {
        "batch": staticmethod(lambda: {"labels": IDS}),
        "make_loss": lambda _, x: LOSSES[kind](x),
    }
    sink = compare(type("Odd", (OddTrainer,), odd), tmp_path)
    assert len([r for r in sink.records if "train/loss/total" in r]) == STEPS


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        torch.ones((), dtype=torch.complex64),
        torch.ones((), device="meta"),
        "much",
        {},
    ],
)
def test_what_is_not_a_number_is_refused_where_it_is_given(value: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    with (
        pytest.raises(InputError, match=r"monitor: observe\(loss=\.\.\.\) got .*; expected a real"),
        monitor.watch(model, optimizer),
    ):
        monitor.observe(loss=value)


def test_a_number_that_cannot_be_read_later_costs_itself_only(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink])
    with monitor.watch(model, optimizer):
        assert monitor.session is not None
        monitor.session._current._loss = torch.ones((), device="meta")
        monitor.session._current._has_loss = torch.ones((), device="meta")
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    (record,) = [r for r in sink.records if "grad/norm/total" in r]
    assert record["grad/norm/total"] > 0
    assert "train/loss/total" not in record


def train_with_a_bad_number_on_one_rank() -> list[float]:
    """The child: a loss that cannot be read on rank 1; the weights afterwards."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor("run", tensorboard=False)
    with monitor.watch(model, optimizer):
        assert monitor.session is not None
        for _ in range(2):
            monitor.observe(loss=1.0)
            if dist.get_rank() == 1:
                monitor.session._current._loss = torch.ones((), device="meta")
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    if dist.get_rank() == 0:
        assert list(um.open_run("run").metrics("grad/norm/total").index) == [1, 2]
    weights: list[float] = model.module.weight.detach().flatten().tolist()
    return weights


def test_on_one_rank_it_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = spawn(train_with_a_bad_number_on_one_rank, 2, timeout=60)
    assert first == second
