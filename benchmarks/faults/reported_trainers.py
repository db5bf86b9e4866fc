"""Reported bugs that one process shows, with transformers' and TRL's Trainers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.faults.hf import NOT_MONITORED, HFTraining, adamw
from benchmarks.faults.model import VOCABULARY
from benchmarks.faults.reported import reported
from benchmarks.faults.training import Setting

MOVES = 2
"""First step that should move weights: a warm-up begins at a rate of 0."""

LATER = 20
"""Step at which bugs that show later begin."""


# -- an optimizer of other parameters --------------------------------------------------------------


@reported(
    "huggingface/accelerate/issues/2665",
    "huggingface/accelerate/issues/3256",
    what="the optimizer is made before the parameters are replaced, as FSDP flattens them",
    names=("not_in_the_optimizer", "nothing_moves", "does_not_move"),
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
    names=(NOT_MONITORED, "not_in_the_optimizer", "nothing_moves", "lora_idle"),
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


# -- the size of the loss and of the step ----------------------------------------------------------


def _ignores_the_count(kind: type[Any]) -> type[Any]:
    """The model takes the number of labels and does not use it: each part is a mean of its own."""

    class Ignores(kind):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("num_items_in_batch", None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Ignores


@reported(
    "axolotl-ai-cloud/axolotl/issues/2262",
    "hiyouga/LlamaFactory/issues/7443",
    what="accumulated losses are added up and not averaged: loss and norm are 8 times too large",
    names=("loss_above_chance", "always_clipping"),
)
def losses_added_over_accumulation(setting: Setting) -> HFTraining:
    return HFTraining(
        replace(setting, batch=1),
        arguments={"gradient_accumulation_steps": 8},
        trainer_class=_ignores_the_count,
    )


@reported(
    "huggingface/transformers/issues/35856",
    "huggingface/trl/pull/2615",
    what="DPO's loss is not divided by the number of accumulated micro-batches",
    names=("loss_above_chance", "always_clipping"),
)
def preference_losses_added_over_accumulation(setting: Setting) -> HFTraining:
    def accept(trainer: Any) -> None:
        trainer.compute_loss_func = object()  # the condition that no longer held

    return HFTraining(
        replace(setting, batch=2, rate=setting.rate / 10),
        arguments={"gradient_accumulation_steps": 8},
        make=_make_dpo,
        on_trainer=accept,
    )


@reported(
    "Lightning-AI/pytorch-lightning/issues/9599",
    what="gradients are clipped while they carry the loss scale, so almost nothing is left of them",
    names=("update_ratio_small", "not_learning", "second_moment_small"),
    onset=MOVES,
)
def clipped_while_scaled(setting: Setting) -> HFTraining:
    def clip(trainer: Any) -> None:
        scale = 2.0**16
        backward = trainer.accelerator.backward

        def scaled(loss: Any, **kwargs: Any) -> None:
            backward(loss * scale, **kwargs)
            held = [p for p in trainer.model.parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_(held, 1.0)
            for parameter in held:
                parameter.grad.div_(scale)  # GradScaler.step()

        trainer.accelerator.backward = scaled

    return HFTraining(
        replace(setting, rate=0.1, clip=0.0),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        on_trainer=clip,
    )


@reported(
    "deepspeedai/DeepSpeed/pull/7839",
    what="bf16 without ZeRO divides gradients by a loss scale of 65,536 that nothing multiplied "
    "by, and never clears them",
    names=("gradients_accumulate", "second_moment_small", "update_ratio_small"),
)
def divided_by_a_scale_and_never_cleared(setting: Setting) -> HFTraining:
    class Keeps(torch.optim.AdamW):
        def zero_grad(self, set_to_none: bool = True) -> None:
            pass

    def keep(trainer: Any) -> None:
        backward = trainer.accelerator.backward

        def divided(loss: Any, **kwargs: Any) -> None:
            backward(loss / 2.0**16, **kwargs)

        trainer.accelerator.backward = divided
        trainer.model.zero_grad = lambda *_, **__: None

    return HFTraining(
        replace(setting, clip=0.0),
        optimizer=lambda model: Keeps(model.parameters(), setting.rate),
        on_trainer=keep,
    )


@reported(
    "meta-pytorch/torchtune/issues/2254",
    "pytorch/ao/pull/1124",
    what="weights are kept in bf16, whose rounding takes small updates away",
    names=("does_not_move", "nothing_moves", "update_ratio_small"),
    onset=MOVES,
)
def updates_rounded_away(setting: Setting) -> HFTraining:
    return HFTraining(replace(setting, rate=6e-7), on_model=lambda model: model.to(torch.bfloat16))


# -- labels ----------------------------------------------------------------------------------------


@reported(
    "huggingface/trl/issues/6668",
    "huggingface/trl/pull/6671",
    what="max_length cuts all answers off; every label is masked, and the loss is 0.0",
    names=("no_labels", "loss_zero"),
)
def answers_cut_off(setting: Setting) -> HFTraining:
    def cut(trainer: Any) -> None:
        collate = trainer.data_collator

        def cut_off(rows: Any) -> Any:
            return {k: v[:, : setting.length // 4] for k, v in collate(rows).items()}

        trainer.data_collator = cut_off

    return HFTraining(setting, make=_make_sft, on_trainer=cut)


@reported(
    "huggingface/trl/issues/976",
    "huggingface/transformers/issues/23530",
    what="padding is the end token, so the collator masks the end of every answer",
    names=(),
)
def end_masked_as_padding(setting: Setting) -> HFTraining:
    def collate(trainer: Any) -> None:
        original = trainer.data_collator

        def masked(rows: Any) -> Any:
            batch = original(rows)
            batch["input_ids"][:, -1] = 0
            batch["labels"][batch["input_ids"] == 0] = -100
            return batch

        trainer.data_collator = masked

    return HFTraining(setting, on_trainer=collate)


# -- schedule, resume, evaluation ------------------------------------------------------------------


@reported(
    "huggingface/transformers/issues/26827",
    "huggingface/transformers/pull/24088",
    what="the scheduler is stepped once for each of two processes: the rate is 0 at half the steps",
    names=("rate_zero",),
    onset=26,
)
def schedule_stepped_for_each_process(setting: Setting) -> HFTraining:
    def twice(kind: type[Any]) -> type[Any]:
        class Twice(kind):  # type: ignore[misc]
            def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
                made = super().create_scheduler(*args, **kwargs)
                step = made.step

                def both(*a: Any, **k: Any) -> None:
                    step(*a, **k)
                    step(*a, **k)

                made.step = both
                return made

        return Twice

    return HFTraining(replace(setting, steps=50), trainer_class=twice)


@reported(
    "NVIDIA-NeMo/Automodel/issues/763",
    "PolymathicAI/the_well/pull/63",
    what="a resumed training has neither the optimizer's state nor the schedule's",
    names=("state_lost", "rate_reset"),
)
def state_lost_at_resume(setting: Setting) -> HFTraining:
    def resume(training: HFTraining, trainer: Any, folder: Path) -> None:
        first = replace(
            training,
            arguments={"save_strategy": "steps", "save_steps": 20},
            trains=None,
            setting=replace(training.setting, steps=20),
        ).build(folder)
        first.train()
        checkpoint = folder / "output" / "checkpoint-20"
        for name in ("optimizer.pt", "scheduler.pt"):
            (checkpoint / name).unlink()
        trainer.train(resume_from_checkpoint=str(checkpoint))

    return HFTraining(setting, arguments={"warmup_steps": 10}, trains=resume)


@reported(
    "huggingface/transformers/pull/33844",
    what="attention drops out in evaluation mode too",
    names=(),
    onset=5,
)
def dropout_in_evaluation(setting: Setting) -> HFTraining:
    def drop(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(
                lambda _, __, out: nn.functional.dropout(out, 0.1, training=True)
            )

    return HFTraining(setting, arguments={"eval_strategy": "steps", "eval_steps": 5}, on_model=drop)


# -- TRL -------------------------------------------------------------------------------------------


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    names = [*special.values(), *(f"w{i}" for i in range(VOCABULARY - len(special)))]
    words = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _make_sft(training: HFTraining, model: Any, rows: Any, folder: Path) -> Any:
    import trl
    from datasets import Dataset

    prompt = training.setting.length // 4
    mask = [0] * prompt + [1] * (training.setting.length - prompt)
    data = [{"input_ids": row["input_ids"], "completion_mask": mask} for row in rows]
    arguments = {"bf16": False, "gradient_checkpointing": False, "completion_only_loss": True}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**training.trainer_arguments(folder) | arguments),
        train_dataset=Dataset.from_list(data),
        processing_class=_words(),
    )


def _make_dpo(training: HFTraining, model: Any, rows: Any, folder: Path) -> Any:
    import trl
    from datasets import Dataset

    half, draw = training.setting.length // 2, torch.Generator().manual_seed(1)

    def words(ids: list[int]) -> str:
        return " ".join(f"w{i % (VOCABULARY - 3)}" for i in ids)

    data = [
        {
            "prompt": words(row["input_ids"][:half]) + " ",
            "chosen": words(row["input_ids"][half:]),
            "rejected": words(torch.randint(VOCABULARY, (half,), generator=draw).tolist()),
        }
        for row in rows[:128]
    ]
    arguments = {"bf16": False, "gradient_checkpointing": False}
    return trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(**training.trainer_arguments(folder) | arguments),
        train_dataset=Dataset.from_list(data),
        processing_class=_words(),
    )
