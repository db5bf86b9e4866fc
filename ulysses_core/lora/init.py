"""Initialises the LoRA adapters of a PEFT model by name.

Legend: r rank, in and out features of a layer, s its scale (alpha / r, or alpha / sqrt(r)).
W [out, in], A [r, in], B [out, r]; the layer computes (W + s B A) x.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from ulysses_core.lora.calibrate import calibrate
from ulysses_core.lora.calibration_rows import TokenRows
from ulysses_core.lora.inits import check_init_name, needs_rows
from ulysses_core.lora.layers import adapter_layers, check_rank, require_linear
from ulysses_monitor.common.errors import InputError

__all__ = ["init_from_rows", "init_lora", "init_orthogonal_small"]

_STD_A = 0.005
_GAIN_B = 0.01


def init_lora(
    model: Any,
    name: str,
    *,
    correct_base: bool = True,
    seed: int = 0,
    adapter: str = "default",
    rows: TokenRows = (),
    device: torch.device | None = None,
) -> Any:
    """Initialises the adapters of `model` anew, before training starts.

    Initialisations that take B A from the base change its weights, so that the model's output stays
    that of the base. Call it once.

    Args:
        model: a PEFT model with LoRA adapters that are not trained yet.
        name: see `ulysses_core.lora.inits`.
        correct_base: with `orthogonal_small`, whether to take B A from the base.
        seed: of `orthogonal_small`, `eva`, `corda` and `lora_ga`, whose numbers do not depend on
            torch's random state.
        adapter: the adapter's name.
        rows: for `eva`, `corda` and `lora_ga`: rows to train on, each with `input_ids`, and
            `labels` and `position_ids` if it has them. Rank 0 runs the whole model on all of them.
        device: where it runs; None for the model's.

    Returns:
        The model.

    Raises:
        InputError: the name is unknown or not served, or a layer, the rank or the rows do not suit
            it.
    """
    check_init_name(name)
    if needs_rows(name):
        init_from_rows(model, name, rows, adapter=adapter, seed=seed, device=device)
        return model
    if name == "orthogonal_small":
        init_orthogonal_small(model, adapter=adapter, correct_base=correct_base, seed=seed)
        return model
    for where, layer in adapter_layers(model, adapter):
        require_linear(where, layer, name)
        with _gathered(layer.get_base_layer().weight):
            _init_layer(layer, adapter, name)
    model.peft_config[adapter].init_lora_weights = True
    return model


def init_from_rows(
    model: Any,
    name: str,
    rows: TokenRows,
    *,
    adapter: str,
    seed: int,
    device: torch.device | None,
) -> None:
    """Initialises A and B by what layers see in rows; see `init_lora`.

    Raises:
        InputError: a layer, the rank or the rows do not suit it; or ZeRO-3 has cut the model.
    """
    from peft.utils.integrations import check_deepspeed_zero3_enabled

    if check_deepspeed_zero3_enabled():
        raise InputError(
            f"lora_init is {name}, which runs the whole model, and ZeRO-3 cuts it as it is loaded; "
            "use ZeRO-2, or lora_init: default"
        )
    for where, layer in adapter_layers(model, adapter):
        require_linear(where, layer, name)
    check_rank(model, name, adapter)
    calibrate(model, name, rows, adapter=adapter, seed=seed, device=device)


def init_orthogonal_small(model: Any, *, adapter: str, correct_base: bool, seed: int) -> None:
    """Draws A and B; see `init_lora`. Each layer has random numbers of its own.

    Raises:
        InputError: an adapted layer is not linear.
    """
    for name, layer in adapter_layers(model, adapter):
        require_linear(name, layer, "orthogonal_small")
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        # The name, not torch's random state: alike on every rank, engine and order of layers.
        generator = torch.Generator().manual_seed(seed * 0x9E3779B1 + zlib.crc32(name.encode()))
        with torch.no_grad():
            a.copy_(torch.empty(a.shape).normal_(0, _STD_A, generator=generator))
            b.copy_(nn.init.orthogonal_(torch.empty(b.shape), _GAIN_B, generator=generator))
        if correct_base:
            _take_from_base(layer, adapter)


def _take_from_base(layer: Any, adapter: str) -> None:
    weight = layer.get_base_layer().weight
    with _gathered(weight), torch.no_grad():
        delta = layer.get_delta_weight(adapter)  # s B A, as the base stores it
        weight.copy_((weight.to(delta.dtype) - delta).to(weight.dtype))


def _init_layer(layer: Any, adapter: str, name: str) -> None:
    if name.startswith("pissa"):
        layer.pissa_init(adapter, name)
    elif name in ("olora", "orthogonal", "mica"):
        getattr(layer, f"{name}_init")(adapter)
    else:
        layer.reset_lora_parameters(adapter, True if name == "default" else name)


def _gathered(weight: nn.Parameter) -> Any:
    """Holds a weight whole under ZeRO-3; what rank 0 writes to it is kept."""
    from peft.utils.integrations import gather_params_ctx

    return gather_params_ctx(weight)
