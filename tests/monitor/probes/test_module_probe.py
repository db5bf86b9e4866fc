"""The module probe: exact numbers, and a training that it does not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ulysses_monitor as um
from tests.support.exact_cases import batches
from tests.support.module_cases import WORLD, run_engines, take_step
from tests.support.spawn import spawn
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.probes.modules.inside import largest_logit


class Block(nn.Module):
    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.eager = eager

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if self.eager:
            logits = q @ k.transpose(-1, -2) / 2.0
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            attended = F.softmax(logits.masked_fill(hidden, -math.inf), dim=-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + F.relu(self.out(attended.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    def __init__(self, eager: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Block(eager) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().mean()


def rows(step: int) -> Tensor:
    return torch.randint(16, (3, 5), generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module,
    run: Path,
    steps: int = 2,
    micro_batches: int = 1,
    between: Callable[[nn.Module], object] = lambda _: None,
    **settings: Any,
) -> tuple[list[float], pd.DataFrame]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = um.Monitor(
        run, **{"tensorboard": False, "sample_every": 1, "probes": ["modules"], **settings}
    )
    losses = []
    with monitor.watch(model, optimizer):
        for step in range(steps):
            for part in range(micro_batches):
                loss = model(rows(step * micro_batches + part))
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            between(model)
    frame: pd.DataFrame = um.open_run(run).metrics()
    return losses, frame


def make(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options).double()


def expected(model: Model, batches: list[Tensor]) -> list[dict[str, float]]:
    """Computes each layer's numbers from kept outputs, with numpy alone."""
    outs: list[list[np.ndarray]] = [[], []]
    grads: list[list[np.ndarray]] = [[], []]
    logits = [[-math.inf], [-math.inf]]
    for ids in batches:
        kept, x = [], model.embed(ids)
        for i, layer in enumerate(model.layers):
            q, k, _ = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in layer.qkv(x).chunk(3, -1))
            pairs = (q @ k.transpose(-1, -2) / 2.0).tril().detach().numpy()
            allowed = np.tril(np.ones(pairs.shape[-2:], bool))
            logits[i].append(float(pairs[..., allowed].max()))
            x = layer(x)
            x.retain_grad()
            kept.append(x)
        x.square().mean().backward()
        for i, out in enumerate(kept):
            outs[i].append(out.detach().numpy().ravel())
            grads[i].append(out.grad.numpy().ravel())
    model.zero_grad()
    found = []
    for i in range(2):
        numbers = {"attention/logit_max": max(logits[i])}
        for kind, parts in (("activation", outs[i]), ("output_grad", grads[i])):
            v = np.concatenate(parts)
            m = v - v.mean()
            numbers |= {
                f"{kind}/rms": math.sqrt((v**2).mean()),
                f"{kind}/max": abs(v).max(),
                f"{kind}/zero_frac": (v == 0).mean(),
                f"{kind}/kurtosis": (m**4).mean() / (m**2).mean() ** 2,
            }
        found.append(numbers)
    return found


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_numbers_are_those_of_the_tensors_also_with_checkpointing(
    tmp_path: Path, eager: bool, reentrant: bool | None
) -> None:
    if eager and reentrant:
        pytest.skip("the same hooks")
    want = expected(make(eager=eager), [rows(0), rows(1)])
    # A reentrant checkpoint needs an input that has a gradient, which the embedding gives.
    model = make(eager=eager, reentrant=reentrant)
    _, frame = train(model, tmp_path / "run", steps=1, micro_batches=2)
    for layer, numbers in enumerate(want):
        for name, value in numbers.items():
            got = frame[f"{name}/layer/{layer}"].iloc[0]
            assert got == pytest.approx(value, rel=1e-6), (name, layer)
    for name in ("activation/max", "activation/kurtosis", "attention/logit_max"):
        highest = max(numbers[name] for numbers in want)
        assert frame[f"{name}/total"].iloc[0] == pytest.approx(highest, rel=1e-6)


@pytest.mark.parametrize("sample_every", [1, 3])
def test_losses_are_bit_equal_with_and_without_the_probe(tmp_path: Path, sample_every: int) -> None:
    plain, _ = train(make(), tmp_path / "plain", steps=7, probes=[])
    probed, frame = train(make(), tmp_path / "run", steps=7, sample_every=sample_every)
    assert probed == plain
    read = frame["activation/rms/layer/0"].notna()
    assert read.tolist() == [(step - 1) % sample_every == 0 for step in range(1, 8)]


def test_no_hook_is_left_when_the_run_ends(tmp_path: Path) -> None:
    model = make()
    train(model, tmp_path / "run")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
        assert not module._backward_hooks
        assert "forward" not in vars(module)
    assert torch.overrides._get_current_function_mode() is None


def test_evaluations_and_sampling_between_steps_do_not_count(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> None:
        with torch.no_grad():  # sampling, in training mode
            model(torch.zeros(9, 9, dtype=torch.long))
        model.eval()
        model(torch.zeros(9, 9, dtype=torch.long))
        model.train()

    _, alone = train(make(), tmp_path / "alone")
    _, mixed = train(make(), tmp_path / "mixed", between=evaluate)
    names = [n for n in alone.columns if n.startswith(("activation", "output_grad", "attention"))]
    assert len(names) == 27
    pd.testing.assert_frame_equal(alone[names], mixed[names])


def test_a_block_that_raises_leaves_no_function_mode_behind(tmp_path: Path) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters())
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, probes=["modules"])
    with monitor.watch(model, optimizer), pytest.raises(IndexError):
        model(torch.full((1, 2), 99))
    layer, optimizer = model.layers[0], torch.optim.SGD(model.parameters())
    monitor = um.Monitor(tmp_path / "again", tensorboard=False, probes=["modules"])
    with monitor.watch(model, optimizer), pytest.raises(RuntimeError):
        layer(torch.ones(1, 2, 3, dtype=torch.float64))
    assert torch.overrides._get_current_function_mode() is None


def test_a_compiled_model_keeps_one_graph_and_an_event_says_that_nothing_is_seen(
    tmp_path: Path,
) -> None:
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a graph break would raise
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sample_every=1, probes=["modules"])
    losses = []
    torch._dynamo.utils.counters.clear()
    with monitor.watch(compiled, optimizer):
        for step in range(3):
            loss = compiled(rows(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert losses == train(make(), tmp_path / "plain", steps=3, probes=[])[0]
    run = um.open_run(tmp_path / "run")
    assert not [n for n in run.metrics().columns if n.startswith("activation")]
    told = [e for e in run.events(kind="monitor").to_dict("records") if e.get("probe") == "modules"]
    assert ["torch.compile" in event["reason"] for event in told] == [True]


def test_output_gradients_are_free_of_the_loss_scale(tmp_path: Path) -> None:
    model = make().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters())
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, probes=["modules"])
    with monitor.watch(model, optimizer, scaler=scaler):
        scaler.scale(model(rows(0))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    frame = um.open_run(tmp_path / "run").metrics()
    want = expected(make(), [rows(0)])[1]["output_grad/rms"]
    assert frame["output_grad/rms/layer/1"].iloc[0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_the_largest_logit_is_exact_in_chunks(
    monkeypatch: pytest.MonkeyPatch, chunked: bool, mask: str | None
) -> None:
    from ulysses_monitor.probes.modules import inside

    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 7, 4, generator=draw) for _ in range(2))
    given = None
    allowed = torch.rand(2, 1, 7, 7, generator=draw) < 0.5
    if mask is not None:
        given = allowed if mask == "bool" else torch.randn(2, 1, 7, 7, generator=draw)
    logits = q @ k.transpose(-1, -2) * 0.3
    if mask == "bool":
        logits = logits.masked_fill(~allowed, -math.inf)
    elif given is not None:
        logits = logits + given
    if chunked:
        monkeypatch.setitem(inside._CHUNK, "cpu", 100)
    assert largest_logit(q, k, given, False, 0.3).item() == pytest.approx(logits.max().item())


def test_grouped_heads_are_compared_with_their_own_keys(tmp_path: Path) -> None:
    from ulysses_monitor.probes.modules.inside import _logit_of_call

    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=draw), torch.randn(2, 2, 5, 8, generator=draw)
    mask = torch.rand(2, 4, 5, 5, generator=draw) < 0.7
    whole = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / math.sqrt(8)
    want = whole.masked_fill(~mask, -math.inf).max()
    torch.testing.assert_close(_logit_of_call(q, k, k, mask, enable_gqa=True), want)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_load_of_experts_is_counted(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    chosen: list[Tensor] = []
    original = torch.topk

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.inner(input_ids=ids, labels=ids, output_router_logits=True)
            chosen.extend(original(r, 2)[1] for r in found.router_logits)  # type: ignore[attr-defined]
            return found.loss  # type: ignore[attr-defined, no-any-return]

    _, frame = train(Wrapped(), tmp_path / "run", steps=1)
    for layer in range(2):
        counts = np.bincount(chosen[layer].flatten(), minlength=4)
        row = frame.iloc[0]
        assert row[f"moe/expert_load_max/layer/{layer}"] == pytest.approx(
            counts.max() / counts.mean()
        )
        assert row[f"moe/expert_load_min/layer/{layer}"] == pytest.approx(
            counts.min() / counts.mean()
        )
    assert np.isfinite(frame["attention/logit_max/total"].iloc[0])


def test_attention_that_does_not_show_its_logits_is_told(tmp_path: Path) -> None:
    model = make()
    model.config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()  # type: ignore[assignment]
    _, frame = train(model, tmp_path / "run")
    assert not [n for n in frame.columns if n.startswith("attention")]
    events = um.open_run(tmp_path / "run").events(kind="monitor").to_dict("records")
    assert ["flash_attention_2" in event["reason"] for event in events] == [True]


def test_a_hook_that_fails_costs_the_metrics_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulysses_monitor.probes.modules import watched

    def fail(_: Tensor) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(watched, "measure", fail)
    losses, frame = train(make(), tmp_path / "run", steps=5)
    assert losses == train(make(), tmp_path / "plain", steps=5, probes=[])[0]
    assert "activation/rms/total" not in frame or frame["activation/rms/total"].isna().all()
    assert frame["grad/norm/total"].notna().all()


def test_further_modules_are_chosen_by_patterns(tmp_path: Path) -> None:
    _, frame = train(make(), tmp_path / "run", probes=[{"modules": {"modules": ["*.out"]}}])
    assert frame["activation/rms/module/layers.1.out"].notna().all()


def test_a_model_without_blocks_is_read_by_its_children(tmp_path: Path) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(16, 4), nn.Linear(4, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.second(self.first(ids)).mean()

    _, frame = train(Loss(), tmp_path / "run")
    assert frame["output_grad/rms/module/first"].notna().all()


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        (["module"], "module"),
        (["modules", "modules"], "given twice"),
        ([{"modules": {"attention": 1}}], "attention is 1"),
        ([{"modules": {"modules": "*.mlp"}}], "modules"),
        ("modules", "expected a list"),
    ],
)
def test_wrong_probes_are_one_clear_line(tmp_path: Path, probes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        um.Monitor(tmp_path / "run", probes=probes)
    assert "\n" not in str(error.value)


def test_every_engine_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    engines = ["ddp", "fsdp2", "zero2", "zero3"]
    found = spawn(run_engines, WORLD, args=[engines, str(tmp_path)], timeout=120)[0]
    both = torch.cat(list(batches(0, WORLD, 1)))
    want = take_step("plain", str(tmp_path / "one"), both)
    names = [n for n in want if n.startswith(("activation/", "output_grad/", "attention/"))]
    assert len(names) == 27
    for engine in engines:
        numbers = found[engine]
        assert numbers["hooks left"] == 0.0
        for name in names:
            assert numbers[name] == pytest.approx(want[name], rel=2e-5), (engine, name)
