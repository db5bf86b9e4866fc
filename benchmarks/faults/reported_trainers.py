"""Reported bugs of what is in the optimizer and what gets a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.faults.hf import MOVES, NOT_MONITORED, HFTraining, adamw
from benchmarks.faults.reported import reported
from benchmarks.faults.training import Setting

LATER = 20
"""Step at which bugs that show later begin."""


# -- an optimizer of other parameters --------------------------------------------------------------


@reported(
    "huggingface/accelerate/issues/2665",
    "huggingface/accelerate/issues/3256",
    what="the optimizer is made before the parameters are replaced, as FSDP flattens them",
    names=("nothing_moves", "does_not_move"),
    onset=MOVES,
)
def optimizer_of_replaced_parameters(setting: Setting) -> HFTraining:
    def make_optimizer(model: Any) -> torch.optim.Optimizer:
        made = adamw(model)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        return made

    return HFTraining(setting, optimizer=make_optimizer)


class _CompiledStep(torch.optim.AdamW):
    """Replays the step that it traced last, if its guards hold."""

    traced: list[Any] | None = None
    traced_without: bool = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        if not self.traced_without:  # guards hold for gradients that are there
            found = [p for p in held if p.grad is not None]
            # Nothing guards on gradients that are None, so this trace fits always.
            self.traced_without = not found
            self.traced = found
        if self.traced:
            super().step(closure)


@reported(
    "pytorch/pytorch/issues/115607",
    "pytorch/pytorch/pull/121291",
    what="a compiled optimizer step, traced once without gradients, is replayed from then on",
    names=("nothing_moves", "state_not_updated", "does_not_move"),
    onset=LATER,
)
def compiled_step_without_guards(setting: Setting) -> HFTraining:
    def without_gradients(kind: type[Any]) -> type[Any]:
        class Skips(kind):  # type: ignore[misc]
            def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
                loss = super().training_step(model, *args, **kwargs)
                if self.state.global_step == LATER - 1:
                    model.zero_grad(set_to_none=True)
                return loss

        return Skips

    return HFTraining(
        setting,
        optimizer=lambda model: _CompiledStep(model.parameters(), setting.rate),
        trainer_class=without_gradients,
    )


@reported(
    "huggingface/trl/issues/3926",
    what="SFTTrainer prepares a model that has adapters already, and freezes them",
    names=(NOT_MONITORED, "no_gradient", "lora_idle"),
)
def adapter_frozen_by_preparation(setting: Setting) -> HFTraining:
    def freeze(model: Any) -> None:
        for parameter in model.parameters():  # prepare_model_for_kbit_training
            parameter.requires_grad_(False)
        model.enable_input_require_grads()

    return HFTraining(setting, lora=4, on_model=freeze)


@reported(
    "huggingface/trl/issues/6700",
    "huggingface/trl/pull/6701",
    what="adapters are frozen when the optimizer is made, and made trainable in each forward pass",
    names=(NOT_MONITORED, "nothing_moves", "lora_idle"),
    onset=MOVES,
)
def optimizer_made_while_frozen(setting: Setting) -> HFTraining:
    def flip(kind: type[Any]) -> type[Any]:
        class Flips(kind):  # type: ignore[misc]
            def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
                _set_adapters(self.model, trainable=False)
                made = super().create_optimizer(*args, **kwargs)
                _set_adapters(self.model, trainable=True)
                return made

        return Flips

    return HFTraining(setting, lora=4, trainer_class=flip)


def _set_adapters(model: Any, *, trainable: bool) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)


# -- what gets no gradient -------------------------------------------------------------------------


@reported(
    "huggingface/transformers/issues/26221",
    "locuslab/open-unlearning/issues/178",
    what="reentrant checkpointing of layers whose inputs need no gradient gives none to adapters",
    names=("adapter_without_gradient", "no_gradient", "lora_idle"),
)
def checkpointing_cuts_adapters_off(setting: Setting) -> HFTraining:
    def checkpoint(model: Any) -> None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model.base_model.model.disable_input_require_grads()

    return HFTraining(setting, lora=4, targets=("q_proj", "v_proj", "lm_head"), on_model=checkpoint)


@reported(
    "unslothai/unsloth/pull/9331",
    what="a fused loss reads the head's weight itself, so the head's adapter is never called",
    names=("adapter_without_gradient", "no_gradient", "lora_idle"),
)
def adapter_of_the_head_not_called(setting: Setting) -> HFTraining:
    def fuse(model: Any) -> None:
        head = model.base_model.model.lm_head
        weight = head.base_layer.weight
        head.forward = lambda x: nn.functional.linear(x, weight)

    return HFTraining(setting, lora=4, targets=("q_proj", "lm_head"), on_model=fuse)


@reported(
    "verl-project/verl/issues/7834",
    "verl-project/verl/pull/7835",
    what="tied embeddings get storage of their own on loading: each half gets half its gradient",
    names=("tie_lost",),
)
def tie_lost_on_loading(setting: Setting) -> HFTraining:
    def untie(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    return HFTraining(setting, config={"tie_word_embeddings": True}, on_model=untie)
