"""Noise is normal, and a function of seed, step, parameter and place alone."""

from __future__ import annotations

import math

import torch

from ulysses_monitor.steering.acting import gaussian, noise_key

CPU = torch.device("cpu")


def noise(key: int, count: int, offset: int = 0) -> torch.Tensor:
    return gaussian(key, offset, count, CPU)


def test_noise_is_standard_normal() -> None:
    count = 3_000_000
    values = noise(noise_key(1, 2, "a"), count).double()
    error = 5 / math.sqrt(count)
    assert abs(values.mean()) < error
    assert abs(values.var() - 1) < error * math.sqrt(2)
    assert abs((values**3).mean()) < error * math.sqrt(15)
    assert abs((values**4).mean() - 3) < error * math.sqrt(96)
    # Kolmogorov and Smirnov: the largest distance to the normal distribution.
    ordered = values.sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (expected - steps).abs().max() < 1.95 / math.sqrt(count)  # 0.1 % of samples exceed it


def test_neighbours_steps_parameters_and_seeds_are_independent() -> None:
    count = 1_000_000
    first = noise(noise_key(1, 2, "a"), count)
    others = [
        first.roll(1),
        noise(noise_key(1, 3, "a"), count),
        noise(noise_key(2, 2, "a"), count),
        noise(noise_key(1, 2, "b"), count),
        noise(noise_key(2, 1, "a"), count),
    ]
    for other in others:
        for one, two in ((first, other), (first.abs(), other.abs())):
            correlation = torch.corrcoef(torch.stack([one, two]))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(count)


def test_any_piece_of_a_parameter_has_the_numbers_of_its_place() -> None:
    key = noise_key(0, 1, "model.embed.weight")
    whole = noise(key, 2_500_000)
    for offset, count in ((0, 1), (1, 7), (1_048_575, 3), (1_200_000, 1_300_000)):
        assert torch.equal(noise(key, count, offset), whole[offset : offset + count])
    assert torch.isfinite(whole).all()
    assert noise(key, 0).shape == (0,)


def test_the_numbers_are_these_on_every_machine_and_version() -> None:
    """A resumed run must go on with the noise it would have had."""
    values = noise(noise_key(42, 7, "model.layers.0.weight"), 4)
    assert noise_key(42, 7, "model.layers.0.weight") == KEY
    torch.testing.assert_close(values, torch.tensor(FIRST), rtol=1e-5, atol=1e-6)


KEY = 7677675425898826991
FIRST = [-1.1727451, -0.6961102, -1.2202256, 1.4114302]
