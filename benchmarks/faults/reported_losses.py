"""Reported bugs of the loss, of the size of steps, of labels, schedules and evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.faults.hf import MOVES, HFTraining
from benchmarks.faults.reported import reported
from benchmarks.faults.training import Setting
from benchmarks.faults.trl_trainers import make_dpo, make_sft

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
    names=("loss_above_chance", "loss_beside_evaluation", "always_clipping"),
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
    names=("loss_above_chance", "loss_beside_evaluation", "always_clipping"),
)
def preference_losses_added_over_accumulation(setting: Setting) -> HFTraining:
    def accept(trainer: Any) -> None:
        trainer.loss_is_scaled_for_ga = True

    return HFTraining(
        replace(setting, batch=2, rate=setting.rate / 10),
        arguments={
            "gradient_accumulation_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 5,
        },
        make=make_dpo,
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
    names=("gradients_not_cleared", "gradients_accumulate", "second_moment_small"),
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

    return HFTraining(setting, make=make_sft, on_trainer=cut)


@reported(
    "huggingface/trl/issues/976",
    "huggingface/transformers/issues/23530",
    what="padding is the end token, so the collator masks the end of every answer",
    names=("ends_not_trained",),
)
def end_masked_as_padding(setting: Setting) -> HFTraining:
    end = 0

    def collate(trainer: Any) -> None:
        original = trainer.data_collator

        def masked(rows: Any) -> Any:
            batch = original(rows)
            batch["input_ids"][:, -1] = end
            batch["labels"][batch["input_ids"] == end] = -100  # DataCollatorForLanguageModeling
            return batch

        trainer.data_collator = masked

    return HFTraining(setting, config={"eos_token_id": end}, on_trainer=collate)


# -- schedule, resume, evaluation ------------------------------------------------------------------


@reported(
    "huggingface/transformers/issues/26827",
    "huggingface/transformers/pull/24088",
    what="the scheduler is stepped once for each of two processes: the rate is 0 at half the steps",
    names=("rate_off_schedule", "rate_zero"),
    onset=2,
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
    names=("random_in_evaluation",),
    onset=5,
)
def dropout_in_evaluation(setting: Setting) -> HFTraining:
    def drop(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(
                lambda _, __, out: nn.functional.dropout(out, 0.1, training=True)
            )

    return HFTraining(setting, arguments={"eval_strategy": "steps", "eval_steps": 5}, on_model=drop)
