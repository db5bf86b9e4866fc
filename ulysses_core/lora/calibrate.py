"""EVA, CorDA and LoRA-GA: initialisations that run the model on rows, with PEFT's own code.

Rank 0 alone runs the model. The other ranks get what it found, so that all start alike whatever
their devices round. The model must be whole on rank 0: no engine has cut its parameters yet.

Legend: r rank, in and out features of a layer, A [r, in], B [out, r].
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_core.lora.calibration_rows import TokenRows, group_rows, prepare_rows, single_rows
from ulysses_core.lora.layers import adapter_layers
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import agree_or_raise, broadcast_bytes, rank, world_size

__all__ = ["calibrate"]

_EVA_BATCHES = 1000
"""EVA stops when its directions have settled; this ends it if they never do."""

Found = dict[str, Sequence[Tensor]]
"""What a method found, by the name of an adapted layer."""


def calibrate(
    model: Any, init: str, rows: TokenRows, *, adapter: str, seed: int, device: torch.device | None
) -> None:
    """Initialises the adapters of `model` by what its layers see in `rows`.

    Torch's random state neither matters nor changes. In a distributed run every rank must call it.

    Args:
        model: a PEFT model whose adapters are linear and not trained yet.
        init: `eva`, `corda` or `lora_ga`.
        rows: see `prepare_rows`.
        adapter: the adapter's name.
        seed: of the approximations.
        device: where the model runs on the rows, and what ranks exchange is; None for the model's.

    Raises:
        InputError: the rows have too few tokens, or no token reaches a layer.
    """
    home = next(model.parameters()).device
    device = device or home
    first = next(layer for _, layer in adapter_layers(model, adapter))
    dtype = first.lora_A[adapter].weight.dtype
    with _seeded(seed, device):
        found = _find_on_rank_0(model, init, rows, adapter, device, home)
        with _explained(init):
            _APPLY[init](model, adapter, lambda name: _share(found.pop(name, ()), device), seed)
    for _, layer in adapter_layers(model, adapter):
        for side in (layer.lora_A, layer.lora_B):  # PEFT makes them of the base's type
            side[adapter].weight.data = side[adapter].weight.data.to(dtype)


def _find_on_rank_0(
    model: Any, init: str, rows: TokenRows, adapter: str, device: Any, home: Any
) -> Found:
    found: Found = {}
    error: Exception | None = None
    modes = {module: module.training for module in model.modules()}
    try:
        if rank() == 0:
            if device != home:
                model.to(device)
            with _explained(init):
                found = _FIND[init](model, adapter, prepare_rows(rows, init))
    except Exception as problem:  # noqa: BLE001 - raised below, where no rank waits for another
        error = problem
    finally:
        if device != home:
            model.to(home)
        for module, mode in modes.items():
            module.training = mode
    otherwise = InputError(f"lora_init is {init}: rank 0 could not compute it; see its message")
    agree_or_raise(error, otherwise, device)
    return found


def _find_eva(model: Any, adapter: str, rows: TokenRows) -> Found:
    """Finds the main directions of each layer's inputs [up to 2 r, in]."""
    from peft.tuners.lora.eva import get_eva_state_dict

    layers = dict(adapter_layers(model, adapter))
    batches = group_rows(rows, max(layer.r[adapter] for layer in layers.values()))
    device, runs = next(model.parameters()).device, 0

    def run(_: Any, batch: Mapping[str, Tensor]) -> None:
        nonlocal runs
        runs += 1
        if runs > _EVA_BATCHES:
            raise InputError(
                f"lora_init is eva: its directions have not settled after {_EVA_BATCHES} batches; "
                "raise lora_init_rows"
            )
        _run(model, batch)

    with _config_for_eva(model.peft_config[adapter]):
        with model.disable_adapter(), torch.no_grad(), _reaching(layers, "eva"):
            _run(model, {key: value.to(device) for key, value in batches[0].items()})
        directions = get_eva_state_dict(
            model,
            batches,
            forward_fn=run,
            adapter_name=adapter,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    return {name: (value,) for name, value in directions.items()}


def _apply_eva(model: Any, adapter: str, take: Callable[[str], list[Tensor]], _: int) -> None:
    """Makes the directions A. A layer may get another rank than r, or lose its adapter."""
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    state = {name: take(name)[0] for name, _ in adapter_layers(model, adapter)}
    with _config_for_eva(model.peft_config[adapter]):
        initialize_lora_eva_weights(model, eva_state_dict=state, adapter_name=adapter)


@contextmanager
def _config_for_eva(config: Any) -> Iterator[None]:
    from peft import EvaConfig

    config.init_lora_weights, config.eva_config = "eva", EvaConfig()
    try:
        yield
    finally:
        config.init_lora_weights, config.eva_config = True, None


def _find_corda(model: Any, adapter: str, rows: TokenRows) -> Found:
    """Finds S [r], U [out, r] and V [in, r] of each weight, weighted by its layer's inputs."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    layers = dict(adapter_layers(model, adapter))
    settings = _config_for_bases(model, adapter, corda_config=CordaConfig())

    def run() -> None:
        with _reaching(layers, "corda"):
            for row in single_rows(rows, next(model.parameters()).device):
                _run(model, row)

    with model.disable_adapter():
        preprocess_corda(model, settings, run_model=run)
    found: Found = {}
    for name, layer in layers.items():
        eigens = layer.get_base_layer().eigens
        found[name] = (eigens.S_WC, eigens.U_WC, eigens.V_WC)
        del layer.get_base_layer().eigens
    return found


def _apply_corda(model: Any, adapter: str, take: Callable[[str], list[Tensor]], _: int) -> None:
    from peft.tuners.lora.corda import CordaEigens

    for name, layer in adapter_layers(model, adapter):
        base = layer.get_base_layer()
        s, u, v = (tensor.to(base.weight.device) for tensor in take(name))
        base.eigens = CordaEigens(S_WC=s, U_WC=u, V_WC=v)
        layer.corda_init(adapter, "corda")


def _find_lora_ga(model: Any, adapter: str, rows: TokenRows) -> Found:
    """Finds the mean gradient of each weight, of its shape."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    layers = dict(adapter_layers(model, adapter))
    settings = _config_for_bases(model, adapter, lora_ga_config=LoraGAConfig())

    def train() -> None:
        with _reaching(layers, "lora_ga"), model.disable_adapter():
            for row in single_rows(rows, next(model.parameters()).device):
                model(**row, use_cache=False).loss.backward()

    preprocess_loraga(model, settings, train)
    found: Found = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        found[name] = (base._peft_loraga_grad,)
        del base._peft_loraga_grad
    return found


def _apply_lora_ga(
    model: Any, adapter: str, take: Callable[[str], list[Tensor]], seed: int
) -> None:
    from peft.tuners.lora.config import LoraGAConfig

    for name, layer in adapter_layers(model, adapter):
        base = layer.get_base_layer()
        base._peft_loraga_grad = take(name)[0].to(base.weight.device)
        torch.manual_seed(seed ^ zlib.crc32(name.encode()))  # of its approximate SVD
        with torch.no_grad():
            layer.lora_ga_init(adapter, LoraGAConfig())


_FIND = {"eva": _find_eva, "corda": _find_corda, "lora_ga": _find_lora_ga}
_APPLY = {"eva": _apply_eva, "corda": _apply_corda, "lora_ga": _apply_lora_ga}


def _config_for_bases(model: Any, adapter: str, **settings: Any) -> Any:
    """Returns a config whose targets are the base layers below the adapters."""
    from peft import LoraConfig

    rank_of = {
        f"{name}.base_layer": layer.r[adapter] for name, layer in adapter_layers(model, adapter)
    }
    r = model.peft_config[adapter].r
    others = {name: own for name, own in rank_of.items() if own != r}
    init = "corda" if "corda_config" in settings else "lora_ga"
    return LoraConfig(
        r=r, target_modules=list(rank_of), rank_pattern=others, init_lora_weights=init, **settings
    )


def _run(model: Any, batch: Mapping[str, Tensor]) -> None:
    model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)


@contextmanager
def _reaching(layers: Mapping[str, Any], init: str) -> Iterator[None]:
    """Refuses, at its end, a layer that no token reached, such as an expert that none chose."""
    missed = {layer.get_base_layer(): name for name, layer in layers.items()}

    def note(base: Any, *_: Any) -> None:
        missed.pop(base, None)

    hooks = [base.register_forward_hook(note) for base in missed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if missed:
        raise InputError(
            f"lora_init is {init}, and no token of its rows reaches {next(iter(missed.values()))}; "
            "leave it out of lora_target, or use lora_init: default"
        )


@contextmanager
def _explained(init: str) -> Iterator[None]:
    """Makes what PEFT says of weights and numbers one line that names the initialisation."""
    try:
        yield
    except (ValueError, TypeError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise InputError(f"lora_init is {init}: {line}") from error


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _share(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns rank 0's tensors in float32 on every rank; every rank must call it."""
    held = [tensor.to(device, torch.float32) for tensor in tensors]
    if world_size() == 1:
        return held
    shapes = json.dumps([list(tensor.shape) for tensor in held]).encode()
    for index, shape in enumerate(json.loads(broadcast_bytes(shapes, device))):
        if rank() != 0:
            held.append(torch.empty(shape, device=device))
        if held[index].numel():
            held[index] = held[index].contiguous()
            dist.broadcast(held[index], src=0)
    return held
