"""Layers whose gradient is unlike that of the others."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.layers import LayerRange, LayerShift

__all__ = ["ENTRIES"]

_FAMILY = "numbers"

ENTRIES = (
    entry(
        "vanishing_layer",
        LayerRange,
        below=1e-4,
        patience=10,
        warmup=10,
        clear=8,
        family=_FAMILY,
        sees="Layers that get a ten-thousandth of the gradient of the median layer.",
        formula="norm of the layer < 1e-4 x median over layers, for 10 steps",
        causes=(
            "the layer's output is scaled to almost nothing or dropped",
            "a residual path that goes around the layer",
            "saturated activations in front of it",
        ),
        advice="Look at the layer's weights and at what is between it and the loss.",
    ),
    entry(
        "exploding_layer",
        LayerRange,
        above=100.0,
        patience=3,
        warmup=10,
        clear=8,
        family=_FAMILY,
        sees="Layers that get a hundred times the gradient of the median layer.",
        formula="norm of the layer > 100 x median over layers, for 3 steps",
        causes=(
            "the layer's weights or activations have grown",
            "a layer that was initialised on another scale",
            "attention logits that have grown in this layer",
        ),
        advice="Lower the learning rate of the layer, or clip per tensor (policy adagc).",
    ),
    entry(
        "layer_shift",
        LayerShift,
        patience=2,
        warmup=40,
        cooldown=16,
        clear=8,
        family=_FAMILY,
        sees="One layer whose gradient left its usual size while the other layers kept theirs.",
        formula="norm / its median over 32 steps, over the median of that ratio over layers, > "
        "5 or < 1/5, for 2 steps",
        causes=(
            "the layer was frozen, replaced or reinitialised",
            "its weights were damaged: a bad load, faulty memory",
            "its activations have grown or died",
        ),
        advice="Compare this layer's weights with the last checkpoint.",
    ),
)
