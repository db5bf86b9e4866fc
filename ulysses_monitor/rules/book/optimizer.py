"""The optimizer's settings."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.optimizer import BetasSwapped, LargeEpsilon, StrongDecay

__all__ = ["ENTRIES"]

_FAMILY = "optimizer"

ENTRIES = (
    entry(
        "betas_swapped",
        BetasSwapped,
        severity="critical",
        clear=100,
        family=_FAMILY,
        sees="An Adam whose first moment remembers for longer than the second.",
        formula="`optim/beta1/...` > `optim/beta2/...`",
        source="Kingma and Ba 2014: betas of (0.9, 0.999); language models use (0.9, 0.95)",
        causes=(
            "adam_beta1 and adam_beta2 were exchanged",
            "betas that were meant for another optimizer",
        ),
        advice="Set betas to (0.9, 0.999), or (0.9, 0.95) for a training from scratch.",
    ),
    entry(
        "epsilon_large",
        LargeEpsilon,
        family=_FAMILY,
        clear=100,
        sees="An epsilon of Adam that is larger than most gradients, so that it sets the size of "
        "updates.",
        formula="`optim/eps/...` > 2e-3, for an optimizer with betas",
        source="published recipes: 1e-8 to 1e-5, seldom 1e-3",
        causes=(
            "a typing error in the exponent",
            "an epsilon that was meant for another optimizer",
        ),
        advice="Set adam_epsilon to 1e-8.",
    ),
    entry(
        "decay_strong",
        StrongDecay,
        family=_FAMILY,
        clear=100,
        sees="A weight decay that takes so much at each step that the weights are gone within some "
        "hundred steps.",
        formula="`optim/weight_decay/...` x `optim/lr/...` > 2e-3",
        source="Loshchilov and Hutter 2019: a step multiplies weights by 1 - rate x weight_decay; "
        "published recipes are below 1e-4",
        causes=(
            "a weight_decay that is too large by a factor of 10 or 100",
            "a rate that is too high by such a factor",
        ),
        advice="Set weight_decay to 0.1 or less; look at the learning rate too.",
    ),
)
