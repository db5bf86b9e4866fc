"""Learning rate and clipping."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.schedule import (
    AlwaysClipping,
    OffSchedule,
    RateJump,
    RateRange,
    RateReset,
    RateZero,
)
from ulysses_monitor.rules.kinds.state import LossAfterResume

__all__ = ["ENTRIES"]

_FAMILY = "schedule"

ENTRIES = (
    entry(
        "rate_zero",
        RateZero,
        patience=2,
        family=_FAMILY,
        severity="critical",
        sees="A learning rate of 0 in every group for two steps.",
        formula="all of `optim/lr/...` = 0 for 2 steps",
        source="definition",
        causes=(
            "the schedule is at its end, and training goes on",
            "the scheduler was made for fewer steps than are trained",
            "a warm-up from 0 whose scheduler is never stepped",
        ),
        advice="Give the scheduler the number of optimizer steps, not of batches.",
    ),
    entry(
        "rate_jump",
        RateJump,
        family=_FAMILY,
        sees="A learning rate that leaps upwards from one step to the next.",
        formula="rate > 3 x the rate of the step before, after 10 steps",
        causes=(
            "the scheduler was replaced or its state reset",
            "a schedule with restarts, which is meant",
            "somebody changed the rate by hand",
        ),
        advice="Compare with the schedule that was meant.",
    ),
    entry(
        "rate_reset",
        RateReset,
        family=_FAMILY,
        sees="A warm-up after a resume.",
        formula="the run begins behind step 1, and the rate rises at each of 6 steps, 1.5 x in all",
        causes=(
            "the scheduler's state was not restored",
            "the checkpoint was loaded as a model, not as a training",
            "the resume came within the warm-up, which is harmless",
        ),
        advice="Resume with resume_from_checkpoint, which restores the scheduler.",
    ),
    entry(
        "rate_off_schedule",
        OffSchedule,
        patience=2,
        clear=8,
        cooldown=64,
        family=_FAMILY,
        sees="A learning rate that does not follow the schedule, the warm-up and the number of "
        "steps that the Trainer's arguments name: it is constant although it should decay, rises "
        "after the warm-up, or is at its end half-way.",
        formula="distance from the schedule > 0.1 x its highest rate at 2 steps",
        source="definition; transformers#26827 and accelerate#963 stepped the scheduler too often",
        causes=(
            "the scheduler is stepped more than once for each optimizer step: for each micro-batch "
            "or rank",
            "the scheduler is never stepped, or was made for another number of steps",
            "a resume went on with the rate of another place of the schedule",
            "a callback sets the rate, which is meant",
        ),
        advice="Step the scheduler once after each optimizer step; compare optim/lr with the "
        "schedule in the report.",
    ),
    entry(
        "loss_after_resume",
        LossAfterResume,
        family=_FAMILY,
        sees="A loss that is far higher after a resume than before it.",
        formula="each of the first 4 losses > 1.3 x the largest of the last 8 that the Trainer had "
        "logged before",
        causes=(
            "the checkpoint's weights, or a part of them, were not loaded: adapters, a head",
            "the data, or what is made of it, is other than before the resume",
            "the optimizer's state is lost, so that the first steps are too large: see state_lost",
        ),
        advice="Evaluate the checkpoint before training on; look for messages about missing keys.",
    ),
    entry(
        "rate_out_of_range",
        RateRange,
        family=_FAMILY,
        sees="A learning rate far outside what Adam is used with.",
        formula="highest rate outside 1e-7 to 2e-2 with LoRA, 1e-9 to 2e-2 without",
        source="published recipes: 1e-6 to 1e-3 for all weights, 1e-5 to 2e-3 for LoRA; from "
        "scratch "
        "up to 1e-2",
        causes=(
            "a typing error in the exponent",
            "a rate that was meant for SGD",
            "a rate that was multiplied by the number of ranks",
        ),
        advice="Set learning_rate to 1e-5 for all weights or 2e-4 for LoRA and go from there.",
    ),
    entry(
        "always_clipping",
        AlwaysClipping,
        clear=64,
        family=_FAMILY,
        sees="Clipping that cuts each of the last 64 steps to a small part.",
        formula="median of `grad/clip_coef/total` < 0.05 over 64 steps, all below 1",
        causes=(
            "max_grad_norm is too low for this model",
            "gradients that are summed and not averaged",
            "the loss is a sum over tokens",
        ),
        advice="Compare max_grad_norm with the gradient norm in the report.",
    ),
)
