"""Faults of the loss and of the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.faults.model import VOCABULARY
from benchmarks.faults.registry import ANY, ONSET, fault
from benchmarks.faults.training import IGNORED, Training
from benchmarks.faults.trl_trainers import make_words


@fault("nonfinite", onset=ONSET, fits=ANY)
def loss_not_finite(training: Training) -> None:
    training.on_loss = lambda step, loss: loss * float("nan") if step == ONSET else loss


@fault("nonfinite", "skipped_steps", onset=ONSET)
def overflow_in_one_tensor(training: Training) -> None:
    def overflow(step: int, model: nn.Module) -> None:
        if step >= ONSET:
            found = [p for p in model.parameters() if p.grad is not None]
            found[0].grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]

    training.on_gradients = overflow


@fault("loss_zero", "no_gradient", fits=ANY)
def loss_times_zero(training: Training) -> None:
    training.on_loss = lambda _, loss: loss * 0.0


@fault("gradient_spike", "loss_spike", onset=ONSET, fits=ANY)
def one_step_scaled(training: Training) -> None:
    training.on_loss = lambda step, loss: loss * 50 if step == ONSET else loss


@fault("vanishing_gradient", "loss_collapse", onset=ONSET)
def loss_no_longer_connected(training: Training) -> None:
    training.on_loss = lambda step, loss: loss if step < ONSET else loss * 1e-7


@fault("no_labels", "loss_zero")
def all_labels_masked(training: Training) -> None:
    training.on_batch = lambda _, rows, labels: (rows, torch.full_like(labels, IGNORED))


@fault("no_labels", onset=ONSET)
def one_batch_masked(training: Training) -> None:
    training.on_batch = lambda step, rows, labels: (
        rows,
        torch.full_like(labels, IGNORED) if step == ONSET else labels,
    )


@fault("labels_misaligned", "loss_collapse")
def labels_not_shifted(training: Training) -> None:
    def shift(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return rows, torch.cat([labels[:, :1], rows[:, :-1]], dim=1)  # the loss shifts them back

    training.on_batch = shift


@fault("labels_changed", "loss_spike", "gradient_spike", onset=ONSET)
def poisoned_batch(training: Training) -> None:
    training.on_batch = lambda step, rows, labels: (
        rows,
        torch.randint_like(labels, VOCABULARY) if step == ONSET else labels,
    )


@fault(
    *("labels_changed", "divergence", "loss_spike", "gradient_spike", "early_gradient"),
    onset=ONSET,
)
def labels_shuffled(training: Training) -> None:
    training.on_batch = lambda step, rows, labels: (
        rows,
        labels if step < ONSET else labels[torch.randperm(len(labels))],
    )


@fault("padding_trained", "dominant_token", "loss_collapse")
def padding_trained_on(training: Training) -> None:
    def pad(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows, labels = rows.clone(), labels.clone()
        rows[:, 3:], labels[:, 3:] = 0, 0
        return rows, labels

    training.on_batch = pad
    training.attended = lambda rows: (torch.arange(rows.shape[1]) < 3).expand_as(rows)


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


@fault(
    *("data_changed", "loss_spike", "divergence", "gradient_spike", "early_gradient"),
    onset=ONSET,
)
def another_language(training: Training) -> None:
    def change(step: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if step < ONSET:
            return rows, labels
        turned = (rows * 37 + 11) % VOCABULARY
        return turned, torch.where(labels == IGNORED, labels, turned)

    training.on_batch = change


@fault("dominant_token")
def one_token_in_the_answers(training: Training) -> None:
    def dominate(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.rand(rows.shape) < 0.4
        rows = rows.masked_fill(where, 5)
        return rows, torch.where(labels == IGNORED, labels, rows)

    training.on_batch = dominate


@fault("preference_sides_equal", "no_gradient", fits=("dpo",))
def sides_equal(training: Training) -> None:
    training.on_batch = lambda _, chosen, __: (chosen, chosen)
    training.logs = lambda _, t: t.numbers


@fault("duplicate_rows", "loss_without_noise", "loss_collapse", onset=ONSET)
def each_batch_twice(training: Training) -> None:
    """Two workers of a loader that each read the whole stream."""
    drawn: list[tuple[Tensor, Tensor]] = []

    def repeat(step: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append((rows, labels))
        return drawn[-2] if step >= ONSET and len(drawn) % 2 == 0 else drawn[-1]

    training.on_batch = repeat


@fault("truncated_rows")
def rows_cut_at_a_third(training: Training) -> None:
    length = training.setting.length
    draw = torch.Generator().manual_seed(training.setting.seed)
    masks: list[Tensor] = []

    def cut(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.randint(length // 4, 3 * length, (len(rows), 1), generator=draw)
        masks[:] = [torch.arange(length) < whole]
        return rows * masks[0], torch.where(masks[0], labels, IGNORED)

    training.on_batch, training.attended = cut, lambda _: masks[0]


@fault("special_tokens")
def marks_between_all_tokens(training: Training) -> None:
    words = training.tokenizer = make_words()
    first, second = words.all_special_ids[:2]

    def mark(_: int, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.clone()
        rows[:, ::4], rows[:, 2::4] = first, second
        return rows, torch.where(labels == IGNORED, labels, rows)

    training.on_batch = mark
