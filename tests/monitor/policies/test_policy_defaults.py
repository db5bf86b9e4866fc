"""Defaults are those of the papers and projects that the policies name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ulysses_monitor.policies import POLICIES

SMALL = {"metric": "grad/abs_mean/tensor_mean", "below": 1e-3, "relative": False}

PUBLISHED: dict[str, dict[str, Any]] = {
    "adagc": {"relative": 1.05, "beta": 0.98, "absolute": 1.0, "warmup": 100},
    "agc": {"ratio": 0.01, "targets": ("*",)},
    "annealed_noise": {"eta": 0.01, "gamma": 0.55, "targets": ("*",)},
    "autoclip": {"percentile": 10.0, "window": 10_000, "warmup": 10},
    "centralize": {**SMALL, "always": False},
    "clip_threshold": {"metric": "grad/abs_mean/tensor_mean", "above": 5.0, "max_norm": 1.0},
    "freeze": {"begin": 0.0, "end": 1.0},
    "gradient_noise": {**SMALL, "std": 1e-4},
    "lora_balance": {"low": 0.1, "high": 10.0, "share": 0.5, "floor": 1e-8, "warmup": 0},
    "lr_boost": {**SMALL, "factor": 1.2},
    "scale_small": {**SMALL, "factor": 1.5, "own_below": 1e-4},
    "skip_outliers": {
        "sigmas": 6.0,
        "window": 128,
        "warmup": 64,
        "metrics": ("train/loss/total", "grad/norm/total"),
    },
    "warmup_cosine": {"warmup": 0.03, "lowest": 0.0, "max_norm": 1.0},
    "zclip": {"alpha": 0.97, "z": 2.5, "warmup": 25},
}
"""Defaults of the policies that a paper, a project or the original design defines."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_defaults_are_the_published_ones(name: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(POLICIES[name])}
    assert {key: defaults[key] for key in PUBLISHED[name]} == PUBLISHED[name]
