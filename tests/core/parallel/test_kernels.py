"""Every kernel against attention with an explicit mask, in float64 on one process."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from ulysses_core.parallel import kernels
from ulysses_core.parallel.batch import RowLayout
from ulysses_core.parallel.kernels import KERNELS, ScoreOptions, choose_kernel
from ulysses_monitor.common.errors import InputError

SIZE = 23
ONE = RowLayout(SIZE, None)
PACKED = RowLayout(SIZE, ((0, 5, 6, 17, SIZE), (0, SIZE)))
CPU = torch.device("cpu")


def tensors(heads: int = 4, key_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    return [
        torch.randn(2, n, SIZE, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]


def attend_with_mask(
    q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, options: ScoreOptions
) -> Tensor:
    at = torch.arange(SIZE)
    seen = at[None, :] <= at[:, None]
    if options.window is not None:
        seen &= at[None, :] > at[:, None] - options.window
    document = layout.document_ids(2, SIZE, CPU)
    seen = seen & (document[:, :, None] == document[:, None, :])
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    found = q @ k.transpose(-1, -2) * (options.scaling or 8**-0.5)
    if options.softcap is not None:
        found = options.softcap * torch.tanh(found / options.softcap)
    return found.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


def assert_close(got: Tensor, truth: Tensor, bound: float) -> None:
    assert got.shape == truth.shape
    assert float((got - truth).norm()) < bound * max(float(truth.norm()), 1e-2)


@pytest.mark.parametrize("layout", [ONE, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [None, 1, 4, 22, 23, 50])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
def test_a_kernel_is_causal_and_stays_within_documents_and_windows(
    kernel: str, window: int | None, layout: RowLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_WINDOW_BLOCK", 6)  # several blocks within a document
    inputs, options = tensors(), ScoreOptions(scaling=0.3, window=window)
    bound = 1e-6 if kernel == "eager" else 1e-12  # eager's softmax is in float32
    truth = attend_with_mask(*inputs, layout, options)
    if kernel == "flex_attention":  # no backward pass on a CPU
        with torch.no_grad():
            assert_close(
                KERNELS[kernel](*(t.detach() for t in inputs), layout, options), truth, bound
            )
        return
    weight = torch.linspace(0.5, 1.5, truth.numel(), dtype=torch.float64).view_as(truth)
    expected = torch.autograd.grad((truth * weight).sum(), inputs)
    out = KERNELS[kernel](*inputs, layout, options)
    assert_close(out, truth, bound)
    for got, gradient in zip(
        torch.autograd.grad((out * weight).sum(), inputs), expected, strict=True
    ):
        assert_close(got, gradient, bound)


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_scores_are_capped(kernel: str) -> None:
    inputs, options = [t.detach() for t in tensors(4, 4)], ScoreOptions(softcap=0.7)
    with torch.no_grad():
        found = KERNELS[kernel](*inputs, PACKED, options)
    assert_close(found, attend_with_mask(*inputs, PACKED, options), 1e-6)
    assert not torch.allclose(found, attend_with_mask(*inputs, PACKED, ScoreOptions()), rtol=1e-3)


@pytest.mark.parametrize("layout", [ONE, PACKED], ids=["one document", "packed"])
def test_attention_sinks_take_weight_from_every_key(layout: RowLayout) -> None:
    sinks = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64, requires_grad=True)
    inputs, options = tensors(), ScoreOptions(sinks=sinks)
    out = KERNELS["eager"](*inputs, layout, options)
    # A sink is a key without a value, so it only adds to the sum by which weights are divided.
    plain = attend_with_mask(*inputs, layout, ScoreOptions())
    total = sum_of_weights(*inputs[:2], layout)
    truth = plain * (total / (total + sinks.exp()[:, None]))[..., None]
    assert_close(out, truth, 1e-6)
    (found,) = torch.autograd.grad(out.sum(), [sinks])
    (expected,) = torch.autograd.grad(truth.sum(), [sinks])
    assert_close(found, expected, 1e-6)


def sum_of_weights(q: Tensor, k: Tensor, layout: RowLayout) -> Tensor:
    """Returns the sum over keys of exp(score), [B, H, S]."""
    document = layout.document_ids(2, SIZE, CPU)
    seen = torch.ones(SIZE, SIZE).tril().bool() & (document[:, :, None] == document[:, None, :])
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).exp().sum(-1)


def test_a_kernel_without_sinks_is_refused_for_a_model_with_them() -> None:
    settings: dict[str, Any] = {"has_softcap": False, "device": CPU, "is_half": False}
    assert choose_kernel("eager", has_sinks=True, **settings) == "eager"
    with pytest.raises(InputError, match="which has no attention sinks here"):
        choose_kernel("sdpa", has_sinks=True, **settings)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_dropout_changes_the_output(kernel: str) -> None:
    torch.manual_seed(0)
    out = KERNELS[kernel](*tensors(), ONE, ScoreOptions(dropout=0.5))
    assert not torch.allclose(out, KERNELS[kernel](*tensors(), ONE, ScoreOptions()))


# -- FlashAttention: its kernels need a GPU, so these tests check its arguments ----------------


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **more: Any
) -> Tensor:
    """Does what flash_attn_varlen_func documents, in float32."""
    assert cu_q is cu_k
    assert cu_q.dtype == torch.int32
    assert max_q == max_k == int((cu_q[1:] - cu_q[:-1]).max())
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    left, right = more["window_size"]
    assert more["causal"]
    out = []
    ratio = q.shape[1] // k.shape[1]
    for lo, hi in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        part = [t[lo:hi].transpose(0, 1).float() for t in (q, k, v)]
        part[1:] = [t.repeat_interleave(ratio, 0) for t in part[1:]]
        found = part[0] @ part[1].transpose(-1, -2) * (more["softmax_scale"] or 8**-0.5)
        if more["softcap"] > 0:
            found = more["softcap"] * torch.tanh(found / more["softcap"])
        back = torch.arange(hi - lo)[:, None] - torch.arange(hi - lo)[None, :]
        seen = (back >= 0) & ((back <= left) if left >= 0 else (back >= 0))
        assert right in (0, -1)
        out.append((found.masked_fill(~seen, -torch.inf).softmax(-1) @ part[2]).transpose(0, 1))
    return torch.cat(out).to(q.dtype)


@pytest.mark.parametrize(
    "options",
    [ScoreOptions(), ScoreOptions(window=4), ScoreOptions(scaling=0.2, softcap=0.9)],
    ids=str,
)
@pytest.mark.parametrize("layout", [ONE, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_documents_windows_and_soft_caps(
    name: str, layout: RowLayout, options: ScoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = types.ModuleType(kernels._FLASH[name])
    package.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, kernels._FLASH[name], package)
    inputs = [t.detach().float() for t in tensors()]
    found = KERNELS[name](*inputs, layout, options)
    assert found.dtype == torch.float32
    assert_close(
        found.double(), attend_with_mask(*(t.double() for t in inputs), layout, options), 1e-2
    )


# -- choosing ---------------------------------------------------------------------------------


def test_the_models_own_attention_is_kept() -> None:
    assert choose_kernel(None, has_softcap=False, device=CPU, is_half=False) == "sdpa"
    assert choose_kernel("eager", has_softcap=True, device=CPU, is_half=True) == "eager"


def test_flash_attention_replaces_sdpa_if_it_is_installed_and_supports_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(kernels, "find_spec", {"flash_attn": ""}.get)
    assert choose_kernel("sdpa", has_softcap=True, device=cuda, is_half=True) == "flash_attention_2"
    assert choose_kernel("sdpa", has_softcap=False, device=cuda, is_half=False) == "sdpa"
    assert choose_kernel("eager", has_softcap=False, device=cuda, is_half=True) == "eager"
    monkeypatch.setattr(kernels, "find_spec", lambda _: True)
    assert (
        choose_kernel("sdpa", has_softcap=False, device=cuda, is_half=True) == "flash_attention_3"
    )
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert choose_kernel("sdpa", has_softcap=False, device=cuda, is_half=True) == "sdpa"


@pytest.mark.parametrize(
    ("implementation", "softcap", "device", "word"),
    [
        ("paged", False, "cpu", "is 'paged'; allowed: eager, "),
        ("sdpa", True, "cpu", "has no soft cap, .*'eager', or on a GPU"),
        ("flash_attention_2", False, "cuda", "flash_attn is not installed; .* 'sdpa'"),
        ("flex_attention", False, "cpu", "needs CUDA, and the device is cpu; .*'sdpa'"),
    ],
)
def test_the_error_about_an_unsupported_implementation_says_what_to_change(
    implementation: str, softcap: bool, device: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=word):
        choose_kernel(
            implementation, has_softcap=softcap, device=torch.device(device), is_half=True
        )
