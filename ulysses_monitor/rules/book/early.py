"""Signs that come before the loss shows anything."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.early import Cusum

__all__ = ["ENTRIES"]

_FAMILY = "early warning"
_CAUSES = (
    "the learning rate is too high for where the weights are now",
    "weights or activations that grow: no weight decay, logits that grow",
    "the data has changed",
)
_ADVICE = "Save a checkpoint; lower the learning rate if the loss follows."

ENTRIES = (
    entry(
        "early_gradient",
        Cusum,
        metric="grad/norm/total",
        times=3.0,
        limit=40.0,
        warmup=50,
        clear=32,
        cooldown=100,
        family=_FAMILY,
        sees="A gradient norm that leaves its usual course for good, before the loss does.",
        formula="cumulative sum of (log(norm / median) / s - 1) over 24 steps > 40, and the norm "
        "> 3 x median, and the loss does not fall; median and s of the 64 steps before",
        source="Page 1954 (CUSUM)",
        causes=_CAUSES,
        advice=_ADVICE,
    ),
    entry(
        "early_update",
        Cusum,
        metric="optim/update_ratio/total",
        times=2.0,
        limit=25.0,
        reference=24,
        window=8,
        warmup=50,
        clear=4,
        cooldown=100,
        family=_FAMILY,
        sees="Updates that become larger than they used to be, relative to the weights.",
        formula="as early_gradient, of the measured update ratios: 8 values against the 24 before",
        source="Page 1954 (CUSUM)",
        causes=_CAUSES,
        advice=_ADVICE,
    ),
)
