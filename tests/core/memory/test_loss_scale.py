"""Gradients of the chunked loss in half precision have the scale of the loss in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_core.memory.loss import _sum_loss
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

VOCABULARY, WIDTH = 301, 32


def inputs(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "hidden": torch.randn(1, tokens, WIDTH, generator=generator).to(dtype),
        "weight": (0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype),
        "bias": (0.1 * torch.randn(VOCABULARY, generator=generator)).to(dtype),
    }


def labels_of(tokens: int, *, ignored: int) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    labels[:, :ignored] = IGNORE_INDEX
    return labels


def gradients(tensors: dict[str, Tensor], loss_of: Any, scale: float) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    found = torch.autograd.grad(scale * loss_of(**leaves), list(leaves.values()))
    return {name: each.double() / scale for name, each in zip(leaves, found, strict=True)}


def errors_of_scale(
    dtype: torch.dtype, labelled: int, *, chunk: int, ignored: int = 0, scale: float = 1.0
) -> dict[str, float]:
    """The part of each gradient along the reference's, and its norm, over the reference's norm."""
    tensors = inputs(labelled + ignored, dtype)
    labels = labels_of(labelled + ignored, ignored=ignored)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias)[0], labels[0])

    def chunked(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _sum_loss(hidden, weight, bias, labels, chunk) / labelled

    truth = gradients({n: t.double() for n, t in tensors.items()}, plain, 1.0)
    got = gradients(tensors, chunked, scale)
    return {
        name: max(
            abs(float((got[name] * true).sum() / true.square().sum()) - 1),
            abs(float(got[name].norm() / true.norm()) - 1),
        )
        for name, true in truth.items()
    }


@pytest.mark.parametrize("ignored", [0, 37])
@pytest.mark.parametrize("chunk", [100, 5000])
@pytest.mark.parametrize("labelled", [511, 848, 1023])  # 1/N: near a power of two, and between two
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 65536.0)]
)
def test_half_precision_does_not_scale_gradients(
    dtype: torch.dtype, scale: float, labelled: int, chunk: int, ignored: int
) -> None:
    errors = errors_of_scale(dtype, labelled, chunk=chunk, ignored=ignored, scale=scale)
    # A bias has too few numbers: rounding alone changes its exact gradient as much as this bound.
    assert max(errors["hidden"], errors["weight"]) <= 1e-4, errors


def test_the_scale_of_single_precision_is_exact() -> None:
    errors = errors_of_scale(torch.float32, 848, chunk=100)
    assert max(errors.values()) <= 1e-6, errors
