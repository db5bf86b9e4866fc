"""What goes into a step: labels beside tokens, kept gradients, the optimizer's settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import ulysses_monitor as um

ROWS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 6 + [0, 0]])
LABELS = torch.where(MASK == 1, ROWS, -100)


def build(**settings: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, **settings)  # type: ignore[arg-type]


def train(
    run: Path,
    batches: list[dict[str, Tensor]],
    clear: Callable[[nn.Module], None] = nn.Module.zero_grad,
    micro_batches: int = 1,
    tokenizer: object = None,
    **settings: object,
) -> pd.DataFrame:
    model, optimizer = build(**settings)
    monitor = um.Monitor(run, tensorboard=False, rules="off")
    with monitor.watch(model, optimizer, tokenizer=tokenizer):
        for batch in batches:
            for _ in range(micro_batches):
                loss = model(torch.randn(4, 4)).square().mean()
                monitor.observe(loss=loss, batch=batch)
                loss.backward()
            optimizer.step()
            clear(model)
    frame: pd.DataFrame = um.open_run(run).metrics()
    return frame


def batch(labels: Tensor = LABELS, **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ROWS, "labels": labels, "attention_mask": MASK, **more}


def test_labels_that_are_their_own_tokens_are_all_that_and_none_is_copied(tmp_path: Path) -> None:
    row = train(tmp_path / "run", [batch()], micro_batches=2).iloc[0]
    assert row["data/label_own/total"] == 1.0
    assert row["data/label_copied/total"] == row["data/label_ahead/total"] == 0.0
    assert row["data/label_padded/total"] == 0.0
    # 12 labels are predicted; 5 and 6 of row 2 beside 6 of row 1 are the only ones twice.
    assert row["data/dominant_token/total"] == pytest.approx(2 / 12)


def test_labels_a_place_off_in_either_direction_are_counted(tmp_path: Path) -> None:
    rows = torch.arange(1, 17).view(2, 8)
    behind = torch.cat([rows[:, :1], rows[:, :-1]], dim=1)
    ahead = torch.cat([rows[:, 1:], torch.full((2, 1), -100)], dim=1)
    frame = train(
        tmp_path / "run",
        [{"input_ids": rows, "labels": labels} for labels in (behind, ahead)],
    )
    assert frame["data/label_copied/total"].tolist() == [1.0, 0.0]
    assert frame["data/label_ahead/total"].tolist() == [0.0, 1.0]
    assert frame["data/label_own/total"].tolist() == [0.0, 0.0]


def test_ready_shifted_labels_are_compared_with_the_next_token(tmp_path: Path) -> None:
    ready = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], dim=1)
    row = train(tmp_path / "run", [batch(shift_labels=ready)]).iloc[0]
    assert row["data/label_own/total"] == 1.0


def test_labels_on_padding_count_but_not_the_end_token_behind_a_text(tmp_path: Path) -> None:
    ends = LABELS.clone()
    ends[1, 6] = 0
    padded = torch.where(MASK == 1, ROWS, 0)
    frame = train(tmp_path / "run", [batch(ends), batch(padded)])
    np.testing.assert_allclose(frame["data/label_padded/total"], [0.0, 1 / 14])


def test_tokens_that_become_others_overlap_less(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)

    def rows(low: int) -> dict[str, Tensor]:
        ids = torch.randint(low, low + 4, (8, 32), generator=draw)
        return {"input_ids": ids, "labels": ids}

    frame = train(tmp_path / "run", [rows(0)] * 6 + [rows(9)])
    overlap = frame["data/token_overlap/total"]
    assert np.isnan(overlap.iloc[0])
    assert overlap.iloc[1:6].min() > 0.99
    assert overlap.iloc[6] < 0.05


class Words:
    """What is asked of a tokenizer."""

    all_special_ids: ClassVar = [6, 7]


def test_special_tokens_of_the_loops_tokenizer_are_counted(tmp_path: Path) -> None:
    frame = train(tmp_path / "run", [batch()], tokenizer=Words())
    assert frame["data/special_tokens/total"].tolist() == [3 / 12]
    frame = train(tmp_path / "other", [batch()])
    assert "data/special_tokens/total" not in frame


def test_a_tokenizer_of_another_kind_is_refused_before_the_run_opens(tmp_path: Path) -> None:
    with pytest.raises(um.InputError, match=r"tokenizer is a dict; expected a tokenizer of"):
        train(tmp_path / "run", [batch()], tokenizer={"a": 1})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"labels": LABELS},
        {"input_ids": ROWS, "labels": LABELS[:, :4]},
        {"input_ids": ROWS, "labels": torch.full_like(LABELS, -100)},
        {"input_ids": ROWS[0], "labels": LABELS[0]},
        {"input_ids": ROWS.float().sqrt(), "labels": "none"},
    ],
)
def test_a_batch_without_labels_beside_tokens_has_no_such_metrics(
    tmp_path: Path, given: dict[str, Tensor]
) -> None:
    frame = train(tmp_path / "run", [given])
    assert not [name for name in frame.columns if name.startswith("data/")]
    assert not np.isnan(frame["grad/norm/total"]).any()


def test_a_batch_that_cannot_be_read_costs_its_metrics_alone(tmp_path: Path) -> None:
    broken = batch()
    broken["attention_mask"] = MASK.to("meta")
    frame = train(tmp_path / "run", [broken])
    assert not [name for name in frame.columns if name.startswith("data/")]
    assert not np.isnan(frame["grad/norm/total"]).any()
    assert um.open_run(tmp_path / "run").events(kind="monitor").to_dict("records")


def set_to_zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def forget(_: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("clear", "carried"),
    [(nn.Module.zero_grad, 0.0), (set_to_zero, 0.0), (forget, 1.0)],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_that_nobody_cleared_are_seen_at_the_next_step(
    tmp_path: Path, clear: Callable[[nn.Module], None], carried: float, micro_batches: int
) -> None:
    frame = train(tmp_path / "run", [batch()] * 4, clear, micro_batches)
    found = frame["grad/carried/total"]
    assert np.isnan(found.iloc[0])
    assert found.iloc[1:].tolist() == [carried] * 3


def test_the_hook_on_a_parameter_comes_off(tmp_path: Path) -> None:
    model, optimizer = build()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    with monitor.watch(model, optimizer):
        for _ in range(2):
            model(torch.randn(4, 4)).sum().backward()
            optimizer.step()
        assert any(p._backward_hooks for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_optimizers_settings_are_recorded_at_sampled_steps(tmp_path: Path) -> None:
    frame = train(tmp_path / "run", [batch()] * 2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    names = ["optim/beta1/0", "optim/beta2/0", "optim/eps/0", "optim/weight_decay/0"]
    np.testing.assert_allclose(frame[names].iloc[0], [0.8, 0.9, 1e-3, 0.5], rtol=1e-6)
    assert frame[names].iloc[1].isna().all()
