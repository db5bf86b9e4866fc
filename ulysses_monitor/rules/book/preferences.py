"""Training on preferences: DPO, KTO and their kin, and reward models."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Constant, Level

__all__ = ["ENTRIES"]

_FAMILY = "preferences"

ENTRIES = (
    entry(
        "chosen_falls",
        Level,
        metrics=("train/rewards/chosen/total",),
        below=-5.0,
        patience=4,
        clear=5,
        family=_FAMILY,
        sees="Chosen answers that become much less likely than under the reference.",
        formula="`train/rewards/chosen/total` < -5 at 4 logs",
        source="known of DPO: the margin grows while both sides fall (Smaug, arXiv 2402.13228)",
        causes=(
            "the learning rate is too high or beta too small",
            "chosen and rejected answers that are nearly equal",
            "too many epochs",
        ),
        advice="Lower the rate; add pref_ftx, which trains on the chosen answers too.",
    ),
    entry(
        "preference_margin_runaway",
        Level,
        metrics=("train/rewards/margins/total",),
        above=30.0,
        patience=4,
        clear=5,
        family=_FAMILY,
        sees="A margin between chosen and rejected answers far beyond what the loss rewards.",
        formula="`train/rewards/margins/total` > 30 at 4 logs; the loss is flat above 10",
        causes=(
            "the learning rate is too high",
            "a feature that gives the answer away, such as length or a marker",
            "too many epochs",
        ),
        advice="Stop earlier; compare the lengths of chosen and rejected answers.",
    ),
    entry(
        "preference_sides_equal",
        Constant,
        metrics=("train/rewards/margins/total",),
        steps=4,
        clear=3,
        severity="critical",
        family=_FAMILY,
        sees="A margin that is the same, bit for bit, at four logs in a row.",
        formula="`train/rewards/margins/total` equal at 4 logs",
        source="definition",
        causes=(
            "chosen and rejected are the same text",
            "the policy and its reference are the same model object",
            "nothing is trained: the margin stays at 0",
        ),
        advice="Print one pair; check that the reference is a copy, or that the adapter is off "
        "for it.",
    ),
    entry(
        "preferences_inverted",
        Level,
        metrics=("train/rewards/accuracies/total", "train/accuracy/total"),
        below=0.25,
        patience=5,
        warmup=30,
        clear=5,
        family=_FAMILY,
        sees="A model that prefers the rejected answers, long after the start.",
        formula="accuracy < 0.25 at 5 logs after step 30",
        causes=(
            "chosen and rejected are swapped",
            "the sign of the loss or of beta",
            "labels of kto_tag that are inverted",
        ),
        advice="Print one pair with its labels.",
    ),
)
