"""Faults of the optimizer, its rate and its gradients."""

from __future__ import annotations

from benchmarks.faults.registry import ANY, BLOWN_UP, ONSET, fault
from benchmarks.faults.training import Training


@fault(*BLOWN_UP, fits=ANY)
def rate_times_100(training: Training) -> None:
    training.rate_factor = 100.0


@fault("not_learning", "update_ratio_small", fits=ANY)
def rate_over_1000(training: Training) -> None:
    training.rate_factor = 1e-3


@fault("rate_zero", "nothing_moves", "lora_idle", fits=ANY)
def scheduler_never_stepped(training: Training) -> None:
    training.schedules = False  # the warm-up begins at 0


@fault("rate_jump", onset=ONSET)
def rate_leaps(training: Training) -> None:
    def leap(step: int, t: Training) -> None:
        if step >= ONSET:
            for group in t.optimizer.param_groups:
                group["lr"] = 30 * t.setting.rate

    training.on_step = leap


@fault("rate_reset", "state_lost", onset=1)
def rate_reset_at_resume(training: Training) -> None:
    training.first_step = 500


@fault("always_clipping")
def clipped_to_almost_nothing(training: Training) -> None:
    training.clip_factor = 1e-3


@fault("epsilon_large", "not_learning", "update_ratio_small", fits=("adamw", "lora"))
def epsilon_too_large(training: Training) -> None:
    training.optimizer_settings = {"eps": 1e2}


@fault("betas_swapped", fits=("adamw", "lora"))
def betas_swapped(training: Training) -> None:
    training.optimizer_settings = {"betas": (0.999, 0.9)}


@fault("decay_strong", "weights_shrink", "divergence", fits=("adamw",))
def weight_decay_times_1000(training: Training) -> None:
    training.optimizer_settings = {"weight_decay": 10.0}


@fault("gradients_not_cleared", "gradients_accumulate", *BLOWN_UP)
def zero_grad_forgotten(training: Training) -> None:
    training.clears = False


@fault("loss_rises", "divergence", "loss_spike", onset=ONSET, fits=ANY)
def sign_of_the_loss_flipped(training: Training) -> None:
    training.on_loss = lambda step, loss: loss if step < ONSET else -loss + 2 * loss.detach()


@fault("always_clipping", "exploding_gradient", fits=("sgd", "adamw"))
def loss_summed_over_tokens(training: Training) -> None:
    training.on_loss = lambda _, loss: loss * 8 * 20
