"""The memory estimate against a real forward pass, and the settings it suggests."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ulysses_core.memory.estimate import Footprint, suggest_settings

ROWS, TOKENS = 2, 256


def model(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1000,
            **more,
        )
    )


SETTINGS: dict[str, Any] = {
    "processes": 1,
    "zero_stage": 0,
    "has_master_weights": False,
    "element_size": 4,
    "tokens": ROWS * TOKENS,
}
NEED = Footprint.from_model(model(), **SETTINGS)


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Saved(TorchDispatchMode):
    """Bytes of the distinct storages that were made and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in given | set(self._storages):
                    self._storages[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._storages.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._storages.values()))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_logits_match_what_a_forward_pass_keeps(checkpointing: bool) -> None:
    made = model()
    if checkpointing:
        made.gradient_checkpointing_enable()
        made.enable_input_require_grads()
    ids = torch.randint(0, 1000, (ROWS, TOKENS))
    with Saved() as saved:
        made.train()(input_ids=ids, labels=ids, use_cache=False)
    need = replace(NEED, checkpointing=checkpointing)
    assert need.activation_bytes() + need.logit_bytes() == pytest.approx(saved.peak, rel=0.3)


def test_zero_shards_states_gradients_and_weights_by_stage() -> None:
    stages = [replace(NEED, processes=4, zero_stage=s).state_bytes() for s in range(4)]
    n = NEED.parameters
    assert stages[0] == 16 * n
    assert stages[1:] == pytest.approx([10 * n, 7 * n, 4 * n], rel=1e-3)
    assert replace(NEED, trained_parameters=0).state_bytes() == 4 * n


def test_every_switch_lowers_its_part_of_the_estimate() -> None:
    assert replace(NEED, loss_chunk=8).logit_bytes() < NEED.logit_bytes()
    assert replace(NEED, mlp_chunk=8).activation_bytes() < NEED.activation_bytes()
    checkpointed = replace(NEED, checkpointing=True)
    assert checkpointed.activation_bytes() < NEED.activation_bytes()
    assert replace(checkpointed, mlp_chunk=8).recomputed_bytes() < checkpointed.recomputed_bytes()
    offloaded = replace(checkpointed, offload_checkpoints=True)
    assert offloaded.activation_bytes() < checkpointed.activation_bytes()


def test_settings_are_suggested_until_the_estimate_fits() -> None:
    assert suggest_settings(NEED, NEED.peak_bytes(), on_gpu=True) == []
    long = replace(NEED, tokens=1 << 17)
    saved = suggest_settings(long, long.peak_bytes() - 1, on_gpu=False)
    assert saved == ["gradient_checkpointing=true"]
    all_of_it = replace(long, checkpointing=True, loss_chunk=1024, mlp_chunk=4096)
    tight = suggest_settings(long, all_of_it.peak_bytes(), on_gpu=False)
    assert tight[0] == "gradient_checkpointing=true"
    assert sorted(tight[1:]) == ["loss_chunk=1024", "mlp_chunk=4096"]
    never = suggest_settings(replace(NEED, processes=4), 1, on_gpu=True)
    assert "deepspeed=zero3" in never
    assert "deepspeed=zero2" not in never
    assert "a larger sequence_parallel_size" in never[-1]
