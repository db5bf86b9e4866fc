"""LoRA initialisations by name: where training starts, and what A and B are."""

from __future__ import annotations

import copy
import typing
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ulysses_core as uc
from ulysses_core.lora.calibration_rows import group_rows
from ulysses_core.lora.inits import check_init_name
from ulysses_core.lora.layers import adapter_layers
from ulysses_monitor.common.errors import InputError

IDS = torch.arange(3, 15).view(1, -1)


def make_base(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":  # whose layers keep their weights transposed
        small = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=32)
        return GPT2LMHeadModel(small).double().eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 31}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config).double().eval()


def adapt(base: Any, **settings: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings)
    return get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["default", "gaussian", "orthogonal_small"])
def test_training_starts_at_the_output_of_the_base(name: str) -> None:
    base = make_base()
    model = uc.init_lora(adapt(base), name)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mica", "olora", "orthogonal", "pissa", "pissa_niter_3"])
def test_so_it_does_in_float32_which_peft_computes_in(name: str) -> None:
    base = make_base().float()
    model = uc.init_lora(adapt(base).float(), name)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-5)


ROWS = [
    {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    for ids in torch.randint(0, 31, (12, 14), generator=torch.Generator().manual_seed(0)).tolist()
]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_so_it_does_if_the_model_looked_at_rows(
    kind: str, name: str, settings: dict[str, Any]
) -> None:
    base = make_base(kind).float()
    model = adapt(base, **settings).float()
    state = torch.get_rng_state()
    assert uc.init_lora(model, name, rows=ROWS) is model
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-5)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    left = ("eigens", "_peft_loraga_grad", "covariance_matrix", "sample_count")
    assert not any(hasattr(module, name) for module in model.modules() for name in left)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def seen_by_last_layer(base: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the last MLP's output layer at tokens with labels, and its mean gradient."""
    layer = base.model.layers[-1].mlp.down_proj
    inputs, base = [], base.requires_grad_(True)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].detach()))
    for row in ROWS:
        base(**{key: torch.tensor([value]) for key, value in row.items()}).loss.backward()
    hook.remove()
    return torch.cat([each[2:] for each in inputs]), layer.weight.grad / len(ROWS)


def last_layer(model: Any) -> Any:
    return next(layer for name, layer in adapter_layers(model) if "1.mlp.down" in name)


def overlap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the rows of `expected`, orthonormal, that the rows of `found` span."""
    basis, _ = torch.linalg.qr(found.double().T)
    return float((expected.double() @ basis).square().sum() / len(expected))


def test_eva_takes_the_main_directions_of_the_inputs() -> None:
    base = make_base().float()
    model = uc.init_lora(adapt(base).float(), "eva", rows=ROWS)
    a = last_layer(model).lora_A["default"].weight.detach()
    inputs, _ = seen_by_last_layer(base)
    _, _, directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-5)
    assert overlap(directions[: len(a)], a) > 0.9
    ranks = [layer.r["default"] for _, layer in adapter_layers(model)]
    assert len(set(ranks)) > 1  # where inputs vary more, ranks are larger
    assert max(ranks) <= 8


def test_lora_ga_takes_the_singular_vectors_of_the_gradient() -> None:
    base = make_base().float()
    model = uc.init_lora(adapt(base).float(), "lora_ga", rows=ROWS)
    layer = last_layer(model)
    _, gradient = seen_by_last_layer(base)
    u, _, v = torch.linalg.svd(gradient)
    assert overlap(layer.lora_A["default"].weight.detach(), v[:4]) > 0.999
    assert overlap(layer.lora_B["default"].weight.detach().T, u[:, 4:8].T) > 0.999


def test_corda_keeps_what_the_rows_need_in_the_adapters() -> None:
    base = make_base().float()
    inputs, _ = seen_by_last_layer(base)
    errors = {}
    for name in ("corda", "pissa"):
        layer = last_layer(uc.init_lora(adapt(base).float(), name, rows=ROWS))
        left = layer.get_base_layer().weight.detach() @ inputs.T
        errors[name] = left.square().sum().item()
    assert errors["corda"] < 0.9 * errors["pissa"]


def test_rows_without_labels_are_labelled_and_long_ones_are_cut() -> None:
    long = [{"input_ids": [3, 5, 7, 11] * 1000, "labels": [-100] * 3000 + [7] * 1000}]
    with pytest.raises(InputError, match="none of 1 has a label in its first 2048 tokens"):
        uc.init_lora(adapt(make_base()), "eva", rows=long)
    plain = [{"input_ids": row["input_ids"]} for row in ROWS]
    base = make_base().float()
    model = uc.init_lora(adapt(base).float(), "corda", rows=plain)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-5)


def test_evas_batches_hold_every_row_and_enough_tokens() -> None:
    for count in (3, 4, 7, 12):
        batches = group_rows(ROWS[:count], 4)
        ids = torch.cat([batch["input_ids"] for batch in batches])
        assert ids.tolist() == [row["input_ids"] for row in ROWS[:count]]
        assert all((batch["labels"] != -100).sum() >= 32 for batch in batches)


def test_what_does_not_suit_an_initialisation_from_rows_is_refused() -> None:
    with pytest.raises(
        InputError, match="its rows have 12 tokens with labels; expected at least 16"
    ):
        uc.init_lora(adapt(make_base()), "eva", rows=ROWS[:1])
    wide = get_peft_model(make_base(), LoraConfig(r=9, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="expected at most 4, a quarter of the inputs"):
        uc.init_lora(wide, "eva", rows=ROWS)
    with pytest.raises(InputError, match="expected at most 8, half of the smaller side"):
        uc.init_lora(wide, "lora_ga", rows=ROWS)
    with pytest.raises(
        InputError, match="lora_init is corda: Please initialize CorDA under float32"
    ):
        uc.init_lora(adapt(make_base()), "corda", rows=ROWS)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_orthogonal_small_suits_scales_dora_and_transposed_weights(
    kind: str, settings: dict[str, Any]
) -> None:
    base = make_base(kind)
    model = uc.init_lora(adapt(base, **settings), "orthogonal_small", seed=3)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-10)


def test_orthogonal_small_draws_small_a_and_orthogonal_b() -> None:
    model = uc.init_lora(adapt(make_base()), "orthogonal_small")
    layers = [layer for _, layer in adapter_layers(model)]
    a = torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers])
    assert a.std().item() == pytest.approx(0.005, rel=0.1)
    for layer in layers:
        b = layer.lora_B["default"].weight
        torch.testing.assert_close(b.T @ b, 1e-4 * torch.eye(4).double(), rtol=0, atol=1e-9)
    assert not torch.equal(layers[0].lora_A["default"].weight, layers[1].lora_A["default"].weight)


def test_a_switch_leaves_the_base_as_it_is() -> None:
    base = make_base()
    model = uc.init_lora(adapt(base), "orthogonal_small", correct_base=False)
    assert (logits(model) - logits(base)).abs().max() > 1e-7
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)


def test_the_seed_decides_and_torchs_random_state_does_not() -> None:
    drawn = []
    for seed, state in ((1, 1), (1, 2), (2, 1)):
        model = adapt(make_base())
        torch.manual_seed(state)
        uc.init_lora(model, "orthogonal_small", seed=seed)
        drawn.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "orthogonal_smal",
            r"lora_init is 'orthogonal_smal' \(did you mean 'orthogonal_small'\?\)",
        ),
        ("pissa_niter_N", "lora_init is 'pissa_niter_N'; allowed: default, gaussian"),
        ("loftq", "lora_init is 'loftq'; PEFT computes it with bitsandbytes and only on CUDA"),
        ("eva", "lora_init is eva, which looks at rows to train on, and there are none"),
        ("lora_ga", "lora_init is lora_ga, which looks at rows to train on, and there are none"),
    ],
)
def test_other_names_are_refused_in_one_line(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        uc.init_lora(adapt(make_base()), name)
    assert "\n" not in str(caught.value)


def test_every_initialisation_of_peft_is_served_or_refused() -> None:
    hints = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    names = [n for hint in hints for n in typing.get_args(hint)]
    assert {"gaussian", "eva", "mica"} <= set(names)
    for name in names:
        try:
            check_init_name(name.replace("[number of iters]", "4"))
        except InputError as error:
            assert f"lora_init is {name!r}; PEFT " in str(error)  # noqa: PT017 - one of the two


def test_a_model_that_zero3_has_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(InputError, match="lora_init is corda, which runs the whole model, and ZeR"):
        uc.init_lora(adapt(make_base()), "corda", rows=ROWS)


def test_a_layer_that_no_token_reaches_is_refused() -> None:
    base = make_base().float()
    base.model.layers[0].mlp.spare = torch.nn.Linear(16, 16)
    with pytest.raises(InputError, match=r"no token of its rows reaches .*spare; leave it out"):
        uc.init_lora(adapt(base).float(), "lora_ga", rows=ROWS)


def test_a_layer_that_is_not_linear_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"])
    model = get_peft_model(make_base(), config)
    with pytest.raises(InputError, match="embed_tokens is a Embedding; expected linear layers"):
        uc.init_lora(model, "orthogonal_small")
