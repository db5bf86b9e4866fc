"""What evaluations say about the data."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Level
from ulysses_monitor.rules.kinds.loss import LossBesideEvaluation, Overfitting

__all__ = ["ENTRIES"]

_FAMILY = "data"

ENTRIES = (
    entry(
        "overfitting",
        Overfitting,
        patience=2,
        family=_FAMILY,
        sees="An evaluation's loss that rises while the training's falls.",
        formula="eval loss > 1.05 x its best at 2 evaluations, training loss at least 2 % lower "
        "than "
        "at the best evaluation",
        source="others' default: (val - train) / train > 0.1",
        causes=(
            "too many epochs for the amount of data",
            "duplicates in the training data",
            "evaluation rows of another kind than the training's",
        ),
        advice="Stop at the best evaluation; lower the rank or add dropout.",
    ),
    entry(
        "evaluation_stuck",
        Overfitting,
        rise=1.0,
        evaluations=5,
        gain=0.1,
        patience=3,
        family=_FAMILY,
        sees="An evaluation's loss that no longer improves while the training's falls by a tenth.",
        formula="eval loss > its best at 3 evaluations, training loss at least 10 % lower since",
        causes=(
            "the training data is learnt by heart",
            "the evaluation measures something else than the training teaches",
            "dropout or another training mode is active in the evaluation",
        ),
        advice="Look at evaluation rows and their answers; check model.eval().",
    ),
    entry(
        "loss_beside_evaluation",
        LossBesideEvaluation,
        clear=1,
        family=_FAMILY,
        sees="A training loss of almost twice the evaluation's or more.",
        formula="median of the last 3 losses > 1.8 x eval loss",
        source="definition: an evaluation's loss is a mean, and sums of two or more are not",
        causes=(
            "losses of accumulated micro-batches are added up and not averaged",
            "the loss is divided by another number of tokens than it was summed over",
            "the evaluation's rows are far easier than the training's, or dropout is very high",
        ),
        advice="Compare the loss at gradient_accumulation_steps 1 and 2: it must be the same.",
    ),
    entry(
        "token_accuracy_perfect",
        Level,
        metrics=("train/mean_token_accuracy/total",),
        above=0.995,
        patience=5,
        clear=5,
        family=_FAMILY,
        sees="A share of right next tokens of nearly one.",
        formula="`train/mean_token_accuracy/total` > 0.995 at 5 logs",
        causes=(
            "the answer is in the input, or labels are not shifted",
            "few rows, seen many times",
            "labels that count padding",
        ),
        advice="Decode one row with its labels; evaluate on rows that are not in the data.",
    ),
)
