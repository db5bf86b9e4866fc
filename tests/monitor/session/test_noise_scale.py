"""The gradient noise scale, on a problem of which it is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import ulysses_monitor as um
from ulysses_monitor.probes import noise

SIZE, ROWS, SIGMA = 40, 4, 0.5
MEAN = torch.linspace(-0.2, 0.3, SIZE)
SIGNAL = float(MEAN.square().sum())
TRACE = SIZE * SIGMA**2
"""The gradient of a row is MEAN plus normal noise, whatever the weights."""


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(SIZE // 2)), nn.Parameter(torch.zeros(SIZE // 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ torch.cat([self.a, self.b])).mean()


def train(
    run: Path,
    steps: int,
    parts: int,
    *,
    after: bool = False,
    observed: bool = True,
    tokens: int = 1,
) -> pd.DataFrame:
    torch.manual_seed(0)
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = um.Monitor(run, tensorboard=False, sample_every=1, rules="off")
    with monitor.watch(model, optimizer):
        for _ in range(steps):
            for _ in range(parts):
                loss = model(MEAN + SIGMA * torch.randn(ROWS, SIZE)) / parts
                if after:
                    loss.backward()
                if observed:
                    monitor.observe(loss=loss, tokens=tokens * ROWS)
                if not after:
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    frame: pd.DataFrame = um.open_run(run).metrics()
    return frame


@pytest.mark.parametrize(("after", "parts"), [(False, 2), (False, 4), (True, 4)])
def test_signal_and_noise_are_unbiased(tmp_path: Path, after: bool, parts: int) -> None:
    frame = train(tmp_path / "run", 400, parts, after=after)
    for name, want in (("grad/signal/total", SIGNAL), ("grad/noise/total", TRACE)):
        found = frame[name].dropna()
        assert len(found) == 399  # how many passes the first step has is not known
        error = found.std() / np.sqrt(len(found))
        assert abs(found.mean() - want) < 4 * error, name
        assert error < 0.1 * want
    scale = frame["grad/noise_scale/total"].iloc[100:].median()
    assert scale == pytest.approx(TRACE / SIGNAL, rel=0.3)


def test_its_unit_is_a_token(tmp_path: Path) -> None:
    rows = train(tmp_path / "rows", 40, 2)["grad/noise_scale/total"].iloc[-1]
    tokens = train(tmp_path / "tokens", 40, 2, tokens=10)["grad/noise_scale/total"].iloc[-1]
    assert tokens == pytest.approx(10 * rows, rel=1e-5)


@pytest.mark.parametrize(
    "case", [{"parts": 1}, {"parts": 2, "observed": False}, {"parts": 2, "tokens": 0}]
)
def test_it_is_absent_where_micro_batches_do_not_allow_it(
    tmp_path: Path, case: dict[str, int]
) -> None:
    frame = train(tmp_path / "run", 8, **case)  # type: ignore[arg-type]
    assert not [name for name in frame.columns if "noise" in name or "signal" in name]


def test_the_first_four_measurements_give_no_ratio(tmp_path: Path) -> None:
    frame = train(tmp_path / "run", 8, 2)
    assert frame["grad/noise/total"].notna().tolist() == [False] + [True] * 7
    assert frame["grad/noise_scale/total"].iloc[:5].isna().all()


@pytest.mark.parametrize("is_reduced", [False, True])
def test_a_part_that_ranks_have_averaged_counts_as_a_larger_batch(
    monkeypatch: pytest.MonkeyPatch, is_reduced: bool
) -> None:
    monkeypatch.setattr(noise, "world_size", lambda: 2)
    # Two ranks with four micro-batches each, of ten tokens; the part is one of them on each rank.
    batch = 80
    part = 20 if is_reduced else 10
    small, large = SIGNAL + TRACE / part, SIGNAL + TRACE / batch
    ranks = [small, small] if is_reduced else [0.9 * small, 1.1 * small]
    sums = {
        "noise squares": sum(ranks),
        "noise fourth": sum(each**2 for each in ranks),
        "noise small": 2.0,
        "noise all": 8.0,
        "noise measured": 2.0,
    }
    found = noise.NoiseScale(None).metrics(sums, float(np.sqrt(large)), batch)  # type: ignore[arg-type]
    assert found["grad/signal/total"] == pytest.approx(SIGNAL)
    assert found["grad/noise/total"] == pytest.approx(TRACE)
