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
from ulysses_core.lora.init import adapter_layers
from ulysses_core.lora.inits import check_init_name
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
        ("eva", "lora_init is 'eva'; it runs the model on data before training starts"),
        ("corda", "lora_init is 'corda'; it runs the model on data"),
        ("loftq", "lora_init is 'loftq'; it approximates a quantised base"),
        ("lora_ga", "lora_init is 'lora_ga'; it needs gradients before training"),
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
            assert f"lora_init is {name!r}; it " in str(error)  # noqa: PT017 - one of the two


def test_a_layer_that_is_not_linear_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"])
    model = get_peft_model(make_base(), config)
    with pytest.raises(InputError, match="embed_tokens is a Embedding; expected linear layers"):
        uc.init_lora(model, "orthogonal_small")
