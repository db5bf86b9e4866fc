"""The faults: one function each, which breaks one thing of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.faults.model import VOCABULARY
from benchmarks.faults.training import IGNORED, Training

__all__ = ["FAULTS", "Fault"]

ONSET = 60
"""Step at which faults that come later begin."""

_ANY = ("adamw", "sgd", "lora", "dpo")


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: its name.
        breaks: changes a training.
        onset: first step that it shows at.
        names: rules that name the cause.
        fits: kinds of trainings that it can be put into.
    """

    name: str
    breaks: Callable[[Training], None]
    onset: int
    names: tuple[str, ...]
    fits: tuple[str, ...]


FAULTS: dict[str, Fault] = {}

_BLOWN_UP = (
    *("divergence", "loss_spike", "gradient_spike", "exploding_gradient", "update_ratio_large"),
    *("nonfinite", "early_gradient", "early_update", "exploding_layer", "layer_shift"),
    *("chosen_falls", "preference_margin_runaway", "rate_out_of_range", "lora_outgrows_base"),
)


def fault(
    *names: str, onset: int = 1, fits: tuple[str, ...] = ("adamw", "sgd", "lora")
) -> Callable[[Callable[[Training], None]], Callable[[Training], None]]:
    """Declares a fault.

    Args:
        names: rules that name its cause.
        onset: first step that it shows at.
        fits: kinds of trainings that it can be put into.
    """

    def declare(breaks: Callable[[Training], None]) -> Callable[[Training], None]:
        name = breaks.__name__
        FAULTS[name] = Fault(name, breaks, onset, names, fits)
        return breaks

    return declare


# -- the optimizer and its rate -------------------------------------------------------------------


@fault(*_BLOWN_UP, fits=_ANY)
def rate_times_100(training: Training) -> None:
    training.rate_factor = 100.0


@fault("not_learning", "update_ratio_small", fits=_ANY)
def rate_over_1000(training: Training) -> None:
    training.rate_factor = 1e-3


@fault("rate_zero", "nothing_moves", "lora_idle", fits=_ANY)
def scheduler_never_stepped(training: Training) -> None:
    training.schedules = False  # the warm-up begins at 0


@fault("rate_jump", onset=ONSET)
def rate_leaps(training: Training) -> None:
    def leap(step: int, t: Training) -> None:
        if step >= ONSET:
            for group in t.optimizer.param_groups:
                group["lr"] = 30 * t.setting.rate

    training.on_step = leap


@fault("rate_reset", onset=1)
def rate_reset_at_resume(training: Training) -> None:
    training.first_step = 500


@fault("always_clipping")
def clipped_to_almost_nothing(training: Training) -> None:
    training.clip_factor = 1e-3


@fault("not_learning", "update_ratio_small", fits=("adamw", "lora"))
def epsilon_too_large(training: Training) -> None:
    training.optimizer_settings = {"eps": 1e2}


@fault("divergence", "gradient_spike", "loss_spike", "early_gradient", fits=("adamw", "lora"))
def betas_swapped(training: Training) -> None:
    training.optimizer_settings = {"betas": (0.999, 0.9)}


@fault("weights_shrink", "divergence", fits=("adamw",))
def weight_decay_times_1000(training: Training) -> None:
    training.optimizer_settings = {"weight_decay": 10.0}


@fault("gradients_accumulate", *_BLOWN_UP)
def zero_grad_forgotten(training: Training) -> None:
    training.clears = False


@fault("divergence", "loss_spike", onset=ONSET, fits=_ANY)
def sign_of_the_loss_flipped(training: Training) -> None:
    training.on_loss = lambda step, loss: loss if step < ONSET else -loss + 2 * loss.detach()


@fault("always_clipping", "exploding_gradient", fits=("sgd", "adamw"))
def loss_summed_over_tokens(training: Training) -> None:
    training.on_loss = lambda _, loss: loss * 8 * 20


# -- what is trained ------------------------------------------------------------------------------


def _layer(t: Training, index: int = 1) -> nn.Module:
    return t.model.layers[index]  # type: ignore[index, return-value, no-any-return, union-attr]


@fault("no_gradient", "vanishing_layer", fits=("adamw", "sgd"))
def layer_detached(training: Training) -> None:
    def cut(t: Training) -> None:
        _layer(t).is_cut = True  # type: ignore[assignment]

    training.built = cut


@fault("does_not_move")
def layer_not_in_the_optimizer(training: Training) -> None:
    def others(model: nn.Module) -> list[nn.Parameter]:
        named = model.named_parameters()
        return [p for n, p in named if p.requires_grad and "layers.1." not in n]

    training.trains = others


@fault("does_not_move")
def group_with_rate_zero(training: Training) -> None:
    def split(t: Training) -> None:
        group = t.optimizer.param_groups[0]
        still = group["params"][: len(group["params"]) // 2]
        group["params"] = group["params"][len(still) :]
        t.optimizer.add_param_group({"params": still, "lr": 0.0, "initial_lr": 0.0})

    training.built = split


@fault("lora_idle", fits=("lora",))
def adapters_both_zero(training: Training) -> None:
    def clear(t: Training) -> None:
        for name, parameter in t.model.named_parameters():
            if "lora_" in name:
                nn.init.zeros_(parameter)

    training.before_adapters = clear


@fault("lora_outgrows_base", *_BLOWN_UP, fits=("lora",))
def alpha_times_100(training: Training) -> None:
    def scale(t: Training) -> None:
        for module in t.model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] *= 100

    training.before_adapters = scale


@fault("no_gradient", "lora_idle", fits=("lora",))
def adapters_behind_a_detach(training: Training) -> None:
    def cut(t: Training) -> None:
        for index in range(2):
            _layer(t, index).is_cut = True  # type: ignore[assignment]

    training.built = cut


@fault("weights_jump", "layer_shift", *_BLOWN_UP, onset=ONSET)
def layer_reinitialised(training: Training) -> None:
    def damage(step: int, t: Training) -> None:
        if step == ONSET:
            with torch.no_grad():
                for parameter in _layer(t).parameters():
                    parameter.normal_(0, 0.5)

    training.on_step = damage


@fault("layer_shift", "no_gradient", "vanishing_layer", "loss_spike", onset=ONSET)
def layer_dead(training: Training) -> None:
    def kill(step: int, t: Training) -> None:
        if step == ONSET:
            _layer(t).scale = 0.0  # type: ignore[assignment]

    training.on_step = kill


@fault(*_BLOWN_UP, onset=ONSET)
def residual_explodes(training: Training) -> None:
    def grow(step: int, t: Training) -> None:
        if step >= ONSET:
            _layer(t).scale *= 1.15  # type: ignore[operator, assignment]

    training.on_step = grow


@fault(*_BLOWN_UP, onset=ONSET)
def logits_grow(training: Training) -> None:
    def grow(step: int, t: Training) -> None:
        if step >= ONSET:
            with torch.no_grad():
                t.model.head.weight *= 1.05  # type: ignore[operator, union-attr]

    training.on_step = grow


# -- numbers --------------------------------------------------------------------------------------


@fault("nonfinite", onset=ONSET, fits=_ANY)
def loss_not_finite(training: Training) -> None:
    training.on_loss = lambda step, loss: loss * float("nan") if step == ONSET else loss


@fault("nonfinite", "skipped_steps", onset=ONSET)
def overflow_in_one_tensor(training: Training) -> None:
    def overflow(step: int, model: nn.Module) -> None:
        if step >= ONSET:
            found = [p for p in model.parameters() if p.grad is not None]
            found[0].grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]

    training.on_gradients = overflow


@fault("loss_zero", "no_gradient", fits=_ANY)
def loss_times_zero(training: Training) -> None:
    training.on_loss = lambda _, loss: loss * 0.0


@fault("gradient_spike", "loss_spike", onset=ONSET, fits=_ANY)
def one_step_scaled(training: Training) -> None:
    training.on_loss = lambda step, loss: loss * 50 if step == ONSET else loss


@fault("vanishing_gradient", "loss_collapse", onset=ONSET)
def loss_no_longer_connected(training: Training) -> None:
    training.on_loss = lambda step, loss: loss if step < ONSET else loss * 1e-7


# -- data -----------------------------------------------------------------------------------------


@fault("no_labels", "loss_zero")
def all_labels_masked(training: Training) -> None:
    training.on_batch = lambda _, rows, labels: (rows, torch.full_like(labels, IGNORED))


@fault("no_labels", onset=ONSET)
def one_batch_masked(training: Training) -> None:
    training.on_batch = lambda step, rows, labels: (
        rows,
        torch.full_like(labels, IGNORED) if step == ONSET else labels,
    )


@fault("loss_collapse")
def labels_not_shifted(training: Training) -> None:
    def shift(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return rows, torch.cat([labels[:, :1], rows[:, :-1]], dim=1)  # the loss shifts them back

    training.on_batch = shift


@fault("loss_spike", "gradient_spike", onset=ONSET)
def poisoned_batch(training: Training) -> None:
    training.on_batch = lambda step, rows, labels: (
        rows,
        torch.randint_like(labels, VOCABULARY) if step == ONSET else labels,
    )


@fault("divergence", "loss_spike", "gradient_spike", "early_gradient", onset=ONSET)
def labels_shuffled(training: Training) -> None:
    training.on_batch = lambda step, rows, labels: (
        rows,
        labels if step < ONSET else labels[torch.randperm(len(labels))],
    )


@fault("loss_collapse")
def padding_trained_on(training: Training) -> None:
    def pad(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows, labels = rows.clone(), labels.clone()
        rows[:, 3:], labels[:, 3:] = 0, 0
        return rows, labels

    training.on_batch = pad


@fault("loss_without_noise", "loss_collapse")
def the_same_batch_again_and_again(training: Training) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def repeat(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kept.append((rows, labels))
        return kept[0]

    training.on_batch = repeat


@fault("overfitting", "evaluation_stuck", "loss_without_noise", "loss_collapse")
def eight_rows_of_data(training: Training) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def repeat(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kept.append((rows, labels))
        return kept[0]

    def evaluate(step: int, t: Training) -> dict[str, float]:
        if step % 10:
            return {}
        held_out = t.texts.rows(16, t.setting.length, torch.Generator().manual_seed(7))
        with torch.no_grad():
            logits = t.model(held_out)
        flat = logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()
        return {"eval/loss/total": float(nn.functional.cross_entropy(*flat))}

    training.on_batch, training.logs = repeat, evaluate


@fault("loss_spike", "divergence", "gradient_spike", "early_gradient", onset=ONSET)
def another_language(training: Training) -> None:
    def change(step: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if step < ONSET:
            return rows, labels
        turned = (rows * 37 + 11) % VOCABULARY
        return turned, torch.where(labels == IGNORED, labels, turned)

    training.on_batch = change


@fault("no_labels", "not_learning")
def one_token_in_the_answers(training: Training) -> None:
    def dominate(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.rand(rows.shape) < 0.4
        rows = rows.masked_fill(where, 5)
        return rows, torch.where(labels == IGNORED, labels, rows)

    training.on_batch = dominate


# -- preferences ----------------------------------------------------------------------------------


@fault("preference_sides_equal", "no_gradient", fits=("dpo",))
def sides_equal(training: Training) -> None:
    training.on_batch = lambda _, chosen, __: (chosen, chosen)
    training.logs = lambda _, t: t.numbers
