"""Every core against attention with a written-out mask, in float64 on one process."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from ulysses_core.parallel import cores
from ulysses_core.parallel.batch import Rows
from ulysses_core.parallel.cores import CORES, Scores, choose_core
from ulysses_monitor.common.errors import InputError

SIZE = 23
ONE = Rows(SIZE, None)
PACKED = Rows(SIZE, ((0, 5, 6, 17, SIZE), (0, SIZE)))
CPU = torch.device("cpu")


def tensors(heads: int = 4, key_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    return [
        torch.randn(2, n, SIZE, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]


def written_out(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    at = torch.arange(SIZE)
    seen = at[None, :] <= at[:, None]
    if scores.window is not None:
        seen &= at[None, :] > at[:, None] - scores.window
    document = rows.documents(2, SIZE, CPU)
    seen = seen & (document[:, :, None] == document[:, None, :])
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    found = q @ k.transpose(-1, -2) * (scores.scaling or 8**-0.5)
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    return found.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


def close(got: Tensor, truth: Tensor, bound: float) -> None:
    assert got.shape == truth.shape
    assert float((got - truth).norm()) < bound * max(float(truth.norm()), 1e-2)


@pytest.mark.parametrize("rows", [ONE, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [None, 1, 4, 22, 23, 50])
@pytest.mark.parametrize("core", ["sdpa", "eager", "flex_attention"])
def test_a_core_is_causal_within_documents_and_windows(
    core: str, window: int | None, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_WINDOW_BLOCK", 6)  # several blocks within a document
    inputs, scores = tensors(), Scores(scaling=0.3, window=window)
    bound = 1e-6 if core == "eager" else 1e-12  # whose softmax is in float32
    truth = written_out(*inputs, rows, scores)
    if core == "flex_attention":  # on a CPU it only evaluates
        with torch.no_grad():
            close(CORES[core](*(t.detach() for t in inputs), rows, scores), truth, bound)
        return
    weight = torch.linspace(0.5, 1.5, truth.numel(), dtype=torch.float64).view_as(truth)
    expected = torch.autograd.grad((truth * weight).sum(), inputs)
    out = CORES[core](*inputs, rows, scores)
    close(out, truth, bound)
    for got, gradient in zip(
        torch.autograd.grad((out * weight).sum(), inputs), expected, strict=True
    ):
        close(got, gradient, bound)


@pytest.mark.parametrize("core", ["eager", "flex_attention"])
def test_scores_are_capped(core: str) -> None:
    inputs, scores = [t.detach() for t in tensors(4, 4)], Scores(softcap=0.7)
    with torch.no_grad():
        found = CORES[core](*inputs, PACKED, scores)
    close(found, written_out(*inputs, PACKED, scores), 1e-6)
    assert not torch.allclose(found, written_out(*inputs, PACKED, Scores()), rtol=1e-3)


@pytest.mark.parametrize("core", ["sdpa", "eager"])
def test_dropout_drops(core: str) -> None:
    torch.manual_seed(0)
    out = CORES[core](*tensors(), ONE, Scores(dropout=0.5))
    assert not torch.allclose(out, CORES[core](*tensors(), ONE, Scores()))


# -- FlashAttention: its kernels need a GPU; what it is called with is seen here ----------------


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **more: Any
) -> Tensor:
    """flash_attn_varlen_func's documented meaning, in float32."""
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
    "scores", [Scores(), Scores(window=4), Scores(scaling=0.2, softcap=0.9)], ids=str
)
@pytest.mark.parametrize("rows", [ONE, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_told_documents_windows_and_caps(
    name: str, rows: Rows, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = types.ModuleType(cores._FLASH[name])
    package.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, cores._FLASH[name], package)
    inputs = [t.detach().float() for t in tensors()]
    found = CORES[name](*inputs, rows, scores)
    assert found.dtype == torch.float32
    close(found.double(), written_out(*(t.double() for t in inputs), rows, scores), 1e-2)


# -- choosing ---------------------------------------------------------------------------------


def test_the_models_own_attention_is_kept() -> None:
    assert choose_core(None, softcap=False, device=CPU, half=False) == "sdpa"
    assert choose_core("eager", softcap=True, device=CPU, half=True) == "eager"


def test_flash_attention_is_chosen_by_itself_where_it_is_installed_and_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(cores, "find_spec", {"flash_attn": ""}.get)
    assert choose_core("sdpa", softcap=True, device=cuda, half=True) == "flash_attention_2"
    assert choose_core("sdpa", softcap=False, device=cuda, half=False) == "sdpa"
    assert choose_core("eager", softcap=False, device=cuda, half=True) == "eager"
    monkeypatch.setattr(cores, "find_spec", lambda _: True)
    assert choose_core("sdpa", softcap=False, device=cuda, half=True) == "flash_attention_3"
    monkeypatch.setattr(cores, "find_spec", lambda _: None)
    assert choose_core("sdpa", softcap=False, device=cuda, half=True) == "sdpa"


@pytest.mark.parametrize(
    ("wanted", "softcap", "device", "word"),
    [
        ("paged", False, "cpu", r"is 'paged'; allowed is one of \['eager'"),
        ("sdpa", True, "cpu", "needs a soft cap.*'eager', or on a GPU"),
        ("flash_attention_2", False, "cuda", "flash_attn is not installed; load .* 'sdpa'"),
        ("flex_attention", False, "cpu", "trains on CUDA only, and this is cpu; .*'sdpa'"),
    ],
)
def test_what_a_core_cannot_do_is_refused_with_what_to_change(
    wanted: str, softcap: bool, device: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=word):
        choose_core(wanted, softcap=softcap, device=torch.device(device), half=True)
