"""What attention looks at in a micro-batch, and what that makes of the model's utilisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ulysses_monitor.integrations.batches import attended_pairs
from ulysses_monitor.session.flops import TrainingFlops, peak_flops


@pytest.mark.parametrize(
    ("batch", "pairs"),
    [
        ({"attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]]}, 9 + 4),
        ({"input_ids": [[5] * 5], "position_ids": [[0, 1, 2, 0, 1]]}, 9 + 4),
        ({"prompt_mask": [[0, 1], [1, 1]], "completion_mask": [[1, 1], [1, 0]]}, 9 + 9),
        ({"chosen_attention_mask": [[1, 1]], "rejected_attention_mask": [[1, 0]]}, 4 + 1),
        ({"input_ids": [[5] * 5]}, 0),
        (None, 0),
    ],
)
def test_the_pairs_are_the_squared_lengths_of_rows_and_documents(batch, pairs) -> None:
    tensors = batch and {name: torch.tensor(rows) for name, rows in batch.items()}
    assert float(attended_pairs(tensors)) == pairs


def test_a_step_takes_six_operations_per_parameter_and_token_and_four_if_frozen() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].requires_grad_(False)
    model.config = type("Config", (), {"num_hidden_layers": 2, "hidden_size": 10})
    flops = TrainingFlops.of(model)
    assert flops.of_step(tokens=3, attended=0) == 3 * (6 * 100 + 4 * 100)
    assert flops.of_step(tokens=0, attended=5) == 5 * 12 * 2 * 10


def test_the_utilisation_is_achieved_over_peak_operations(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ulysses_monitor as um

    monkeypatch.setattr("ulysses_monitor.session.training_step.peak_flops", lambda _: 1e6)
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink])
    with monitor.watch(model, optimizer):
        model(torch.ones(1, 10)).sum().backward()
        monitor.observe(tokens=7, attended=49)
        optimizer.step()
    record = sink.records[0]
    possible = record["train/step_seconds/total"] * 1e6
    assert record["train/mfu/total"] == pytest.approx(7 * 6 * 100 / possible)


def test_an_unknown_device_has_no_utilisation() -> None:
    assert peak_flops(torch.device("cpu")) is None
