"""Probes on the shards of one process: exact sums, nonfinite values, layouts, failures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines import PlainEngine, Shard
from ulysses_monitor.probes import (
    AdamStateProbe,
    Capture,
    GradientProbe,
    Layout,
    ParameterProbe,
    Reading,
    UpdateProbe,
)
from ulysses_monitor.probes.adapters import _squared_norms
from ulysses_monitor.probes.consistency import fingerprint


def gradient_metrics(grads: dict[str, torch.Tensor | None], scale: float = 1.0) -> dict[str, float]:
    sizes = tuple(1 if g is None else g.numel() for g in grads.values())
    probe = GradientProbe(Layout(tuple(grads), sizes))
    shards = [
        Shard(i, 0, torch.zeros(1) if g is None else torch.zeros_like(g), g, {})
        for i, g in enumerate(grads.values())
    ]
    totals = probe.read(Reading(shards, scale)).numpy()
    if not np.isfinite(totals).all():
        totals = probe.read(Reading(shards, scale, is_recheck=True)).numpy()
    return dict(zip(probe.names, probe.values(totals).tolist(), strict=True))


# -- gradients --------------------------------------------------------------------------------


def test_nonfinite_elements_are_counted_and_left_out_of_the_norms() -> None:
    bad = torch.tensor([3.0, math.nan, 4.0, math.inf])
    good = torch.tensor([12.0])
    metrics = gradient_metrics({"layers.0.a": bad, "layers.1.a": good, "layers.1.none": None})
    assert metrics["grad/nonfinite/param/layers.0.a"] == 2.0
    assert metrics["grad/nonfinite/param/layers.1.a"] == 0.0
    assert metrics["grad/nonfinite/layer/0"] == metrics["grad/nonfinite/total"] == 2.0
    assert metrics["grad/norm/param/layers.0.a"] == pytest.approx(5.0)
    assert metrics["grad/norm/layer/1"] == pytest.approx(12.0)
    assert metrics["grad/norm/total"] == pytest.approx(13.0)
    assert metrics["grad/norm/param/layers.1.none"] == 0.0
    assert metrics["grad/abs_mean/param/layers.0.a"] == pytest.approx(3.5)
    assert metrics["grad/abs_mean/total"] == pytest.approx(19 / 4)
    assert metrics["grad/abs_mean/tensor_mean"] == pytest.approx((3.5 + 12 + 0) / 3)
    assert metrics["grad/max/total"] == metrics["grad/max/layer/1"] == 12.0
    assert metrics["grad/max/param/layers.0.a"] == 4.0
    assert metrics["grad/zero_frac/param/layers.1.none"] == 1.0
    assert metrics["grad/zero_frac/layer/0"] == 0.0


def test_a_finite_gradient_whose_square_overflows_is_not_counted_as_nonfinite() -> None:
    metrics = gradient_metrics({"w": torch.full((4,), 1e30)})
    assert metrics["grad/nonfinite/total"] == 0.0
    assert metrics["grad/norm/total"] == pytest.approx(2e30)


def test_the_loss_scale_is_divided_out() -> None:
    metrics = gradient_metrics({"w": torch.tensor([3.0, 4.0]) * 65_536}, scale=65_536.0)
    assert metrics["grad/norm/total"] == pytest.approx(5.0)


def test_adapter_ratios_are_per_module_and_the_total_is_their_median() -> None:
    grads = {}
    for i, (a, b) in enumerate([(1.0, 2.0), (1.0, 8.0), (0.0, 1.0), (0.0, 0.0)]):
        grads[f"layers.{i}.q.lora_A.default.weight"] = torch.tensor([a])
        grads[f"layers.{i}.q.lora_B.default.weight"] = torch.tensor([b])
    metrics = gradient_metrics(grads)
    ratios = [metrics[f"lora/grad_ratio_B_A/module/layers.{i}.q"] for i in range(4)]
    np.testing.assert_array_equal(ratios, [2.0, 8.0, math.inf, math.nan])
    assert metrics["lora/grad_ratio_B_A/total"] == 8.0


def test_layers_and_adapters_of_common_models_are_found_by_name() -> None:
    names = (
        "base.layers.11.mlp.weight",
        "base.layers.2.attn.weight",
        "base.layers.0.weight",
        "base.layers.1.weight",
        "model.embed_tokens.weight",
        "base.layers.0.q.lora_A.one.weight",
        "base.layers.0.q.lora_B.one.weight",
        "base.layers.0.q.lora_A.two.weight",
        "base.layers.0.q.lora_B.two.weight",
        "base.layers.0.v.lora_B.two.weight",
        "base.embed.lora_embedding_A.one",
        "base.embed.lora_embedding_B.one",
    )
    layout = Layout(names, (1,) * len(names))
    assert layout.layers == (0, 1, 2, 11)
    modules = [pair.module for pair in layout.adapter_pairs]
    assert modules == ["base.layers.0.q.one", "base.layers.0.q.two", "base.embed.one"]
    spread = dict(zip(layout.scopes, layout.aggregate(np.ones(len(names))), strict=True))
    assert (spread["total"], spread["layer/0"], spread["layer/11"]) == (12.0, 6.0, 1.0)


@pytest.mark.parametrize(
    "path", ["model.layers", "transformer.h", "encoder.layer", "blocks", "base.model.model.layers"]
)
def test_the_layers_of_a_model_with_one_block_list_have_numbers(path: str) -> None:
    names = (f"{path}.10.mlp.weight", f"{path}.9.layer.0.weight", "model.embed_tokens.weight")
    layout = Layout(names, (1, 1, 1))
    assert layout.scopes[:3] == ("total", "layer/9", "layer/10")


def test_the_layers_of_an_encoder_and_a_decoder_are_told_apart() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=11, d_model=4, d_kv=2, d_ff=8, num_layers=2, num_heads=2)
    names, params = zip(*T5ForConditionalGeneration(config).named_parameters(), strict=True)
    layout = Layout(names, tuple(p.numel() for p in params))
    lists = ("encoder.block", "decoder.block")
    assert layout.scopes[1:5] == tuple(f"layer/{path}.{i}" for path in lists for i in (0, 1))
    numels = dict(zip(layout.scopes, layout.aggregate(np.array(layout.numels)), strict=True))
    for path in lists:
        truth = sum(p.numel() for n, p in zip(names, params, strict=True) if f"{path}.1." in n)
        assert numels[f"layer/{path}.1"] == truth


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_layers_of_a_vision_tower_and_its_language_model_are_told_apart(
    is_frozen: bool,
) -> None:
    """Also while the tower is frozen: a layer has one name, whatever else is trained."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=4, patch_size=2)
    text = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=11)
    every = dict(Llava(LlavaConfig(vision_config=vision, text_config=text)).named_parameters())
    trained = {n: p for n, p in every.items() if not (is_frozen and "vision" in n)}
    layout = Layout(tuple(trained), tuple(p.numel() for p in trained.values()), tuple(every))
    found = [scope for scope in layout.scopes if scope.startswith("layer/")]
    lists = ("model.language_model.layers",) if is_frozen else ("vision", "language_model.layers")
    assert len(found) == 2 * len(lists)
    numels = dict(zip(layout.scopes, layout.aggregate(np.array(layout.numels)), strict=True))
    for scope in found:
        path = scope.removeprefix("layer/")
        assert any(part in path for part in lists)
        truth = sum(p.numel() for n, p in trained.items() if n.startswith(f"{path}."))
        assert numels[scope] == truth > 0


# -- optimizer state and parameters -----------------------------------------------------------


def test_an_optimizer_without_moments_gives_no_metric() -> None:
    probe = AdamStateProbe(Layout(("w",), (3,)))
    momentum = {"momentum_buffer": torch.ones(3)}
    totals = probe.read(Reading([Shard(0, 0, torch.ones(3), None, momentum)], 1.0))
    assert probe.values(totals.numpy()) is None
    assert probe.values(probe.read(Reading([], 1.0)).numpy()) is None


def test_an_optimizer_with_one_moment_gives_only_that_metric() -> None:
    """Lion keeps the first moment; Adafactor keeps neither for a matrix."""
    probe = AdamStateProbe(Layout(("lion", "matrix"), (3, 4)))
    shards = [
        Shard(0, 0, torch.ones(3), None, {"exp_avg": torch.ones(3)}, steps=1.0),
        Shard(1, 0, torch.ones(4), None, {}, steps=1.0),
    ]
    found = probe.values(probe.read(Reading(shards, 1.0)).numpy())
    metrics = dict(zip(probe.names, found.tolist(), strict=True))
    assert metrics["optim/exp_avg_norm/param/lion"] == pytest.approx(math.sqrt(3))
    assert math.isnan(metrics["optim/exp_avg_norm/total"])  # not the sum of the rest
    assert math.isnan(metrics["optim/exp_avg_norm/param/matrix"])
    assert math.isnan(metrics["optim/exp_avg_sq_mean/total"])


def test_two_halves_of_a_parameter_give_the_metrics_of_the_full_one() -> None:
    layout = Layout(("w", "v"), (10, 4))
    whole = torch.arange(1.0, 11.0)
    state = {"exp_avg": whole, "exp_avg_sq": whole.square()}

    def part(a: int, b: int) -> Shard:
        return Shard(0, a, whole[a:b], whole[a:b], {k: v[a:b] for k, v in state.items()})

    for probe in (GradientProbe(layout), AdamStateProbe(layout), ParameterProbe(layout)):
        halves = [probe.read(Reading([s], 1.0)) for s in (part(0, 3), part(3, 10))]
        together = probe.read(Reading([part(0, 10)], 1.0))
        size = probe.size
        torch.testing.assert_close(
            halves[0][:size] + halves[1][:size], together[:size], rtol=1e-7, atol=0
        )
        assert torch.equal(torch.maximum(*halves)[size:], together[size:])
        assert together.shape == (size + probe.maxima * 2,)


# -- fingerprints ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("size", [1, 2, 7, 1001, (1 << 19) + 3])
def test_a_fingerprint_depends_only_on_the_bits_of_a_tensor(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size + 1, generator=torch.Generator().manual_seed(size)).to(dtype)
    inside, copy = x[1:], x[1:].clone()
    assert int(fingerprint(inside)) == int(fingerprint(copy))
    other = copy.clone()
    other[-1] = 3.0
    assert int(fingerprint(other)) != int(fingerprint(copy))


# -- updates and adapters ----------------------------------------------------------------------


def test_a_large_model_with_an_unknown_optimizer_has_no_update_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It must not copy its parameters for that."""
    monkeypatch.setattr("ulysses_monitor.probes.updates.COPY_LIMIT", 5)
    model = nn.Linear(3, 2)
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=1.0))
    probe = UpdateProbe(Layout(("w",), (6,)), engine)
    shards = [Shard(0, 0, model.weight.detach(), None, {}, {"lr": 1.0})]
    probe.before_step(shards)
    probe.after_step(shards)
    assert probe.values(probe.read(Reading([], 1.0)).numpy()) is None


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_the_norms_of_a_product_follow_from_its_small_matrix(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(s, generator=generator).double() for s in ((rank, 300), (200, rank)))
    found = _squared_norms((b.t() @ b) @ (a @ a.t()))
    product = b @ a
    truth = [float(product.square().sum()), float(torch.linalg.matrix_norm(product, 2) ** 2)]
    assert found.tolist() == pytest.approx(truth, rel=1e-6)


def test_the_stable_rank_of_equal_singular_values_is_their_number() -> None:
    squares = _squared_norms(torch.eye(16, dtype=torch.float64) * 9)
    assert float(squares[0] / squares[1]) == pytest.approx(16.0, rel=1e-5)
    assert _squared_norms(torch.zeros(4, 4, dtype=torch.float64)).tolist() == [0.0, 0.0]


# -- reading a step ---------------------------------------------------------------------------


class BrokenProbe(ParameterProbe):
    """Raises in one of its methods."""

    def __init__(self, layout: Layout, where: str) -> None:
        super().__init__(layout)
        self.name, self.cost, self.where, self.calls = "broken", "every", where, 0
        self.names = tuple(f"broken/x/{i}" for i in range(len(self.names)))

    def read(self, reading: Reading) -> torch.Tensor:
        self.calls += 1
        if self.where == "read":
            raise RuntimeError("broken")
        return super().read(reading)

    def values(self, totals: Any) -> Any:
        if self.where == "values":
            raise RuntimeError("broken")
        return super().values(totals)


def plain_engine() -> PlainEngine:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    return PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("where", ["read", "values"])
def test_a_probe_that_raises_is_off_after_three_failures_and_the_others_go_on(where: str) -> None:
    engine = plain_engine()
    layout = Layout(*map(tuple, zip(*engine.parameters(), strict=True)))
    broken = BrokenProbe(layout, where)
    capture = Capture(engine, [broken, GradientProbe(layout)], sample_every=1)
    for step in range(1, 6):
        captured = capture.read(step, {"loss": torch.tensor(2.0), "tokens": 3})
        names = [name for schema, _ in captured.parts for name in schema.names]
        assert "grad/norm/total" in names
        assert not any(name.startswith("broken/") for name in names)
        assert captured.extra == {"loss": 2.0, "tokens": 3.0}
    assert broken.calls == 3


def test_sampled_probes_are_read_at_the_first_step_and_every_nth_after_it() -> None:
    engine = plain_engine()
    layout = Layout(*map(tuple, zip(*engine.parameters(), strict=True)))
    capture = Capture(engine, [GradientProbe(layout), ParameterProbe(layout)], sample_every=4)
    sampled = [len(capture.read(step, {}).parts) == 2 for step in range(1, 11)]
    assert [i for i, yes in enumerate(sampled, 1) if yes] == [1, 5, 9]


def test_an_engine_that_cannot_be_read_costs_only_its_metrics() -> None:
    engine = plain_engine()
    layout = Layout(*map(tuple, zip(*engine.parameters(), strict=True)))
    engine.grad_scale = lambda: 1 / 0
    capture = Capture(engine, [GradientProbe(layout)], sample_every=1)
    captured = capture.read(1, {"loss": 1.0})
    assert (captured.parts, captured.extra) == ([], {"loss": 1.0})


class BrokenFollowUp(UpdateProbe):
    """Raises after the step."""

    def after_step(self, shards: Any) -> None:
        raise RuntimeError("broken")


def test_a_follow_up_that_raises_is_off_after_three_failures() -> None:
    engine = plain_engine()
    layout = Layout(*map(tuple, zip(*engine.parameters(), strict=True)))
    broken = BrokenFollowUp(layout, engine)
    capture = Capture(engine, [GradientProbe(layout)], 1, [broken])
    for step in range(1, 7):
        assert not capture.read(step, {}).previous_parts
        capture.finish_step(done=True)
    assert capture._guard.is_off("probe updates")


def test_a_model_without_trainable_parameters_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(InputError, match="no trainable parameter"):
        PlainEngine(frozen, optimizer)
