"""Signs that come before the loss shows anything."""

from typing import Any

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.early import Cusum

__all__ = ["ENTRIES"]

_FAMILY = "early warning"
_CAUSES = (
    "the learning rate is too high for where the weights are now",
    "weights or activations that grow: no weight decay, logits that grow",
    "the data has changed",
)
_SAMPLED: dict[str, Any] = {
    "reference": 16,
    "window": 5,
    "least": 10,
    "gain": 0.05,
    "warmup": 50,
    "clear": 4,
    "cooldown": 50,
    "family": _FAMILY,
}
"""Of what the module probe reads at sampled steps."""
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
        limit=15.0,
        reference=16,
        window=5,
        least=10,
        warmup=50,
        clear=4,
        cooldown=100,
        family=_FAMILY,
        sees="Updates that become larger than they used to be, relative to the weights.",
        formula="as early_gradient, of the measured update ratios: 5 values against the 16 before, "
        "score > 15, 2 x median",
        source="Page 1954 (CUSUM)",
        causes=_CAUSES,
        advice=_ADVICE,
    ),
    entry(
        "early_activation",
        Cusum,
        metric="activation/rms/total",
        times=1.5,
        limit=8.0,
        **_SAMPLED,
        sees="What blocks give becomes larger than it used to be, before the loss shows it.",
        formula="as early_gradient, of the module probe's values: 5 against the 16 before, score > "
        "8, 1.5 x median, and the loss does not fall by a twentieth over 24 steps",
        source="Page 1954 (CUSUM)",
        causes=(
            "the learning rate is too high for where the weights are now",
            "weights or gains that grow: weight decay that is missing or has the wrong sign",
            "a block that adds too much to the residual stream",
        ),
        advice=_ADVICE,
    ),
    entry(
        "early_kurtosis",
        Cusum,
        metric="activation/kurtosis/total",
        times=1.5,
        limit=8.0,
        **_SAMPLED,
        sees="Activations of which a few become far larger than the others.",
        formula="as early_activation, of the largest kurtosis of a block",
        source="Page 1954 (CUSUM); trainscope claims 14 to 18 steps before a divergence",
        causes=(
            "outlier channels that grow: one channel that every block reads",
            "weights of values or of an MLP that grow",
            "the learning rate is too high",
        ),
        advice="Look at which block it is; save a checkpoint; lower the learning rate.",
    ),
    entry(
        "early_attention",
        Cusum,
        metric="attention/logit_max/total",
        times=3.0,
        limit=10.0,
        **_SAMPLED,
        sees="Attention logits that grow until attention looks at one token alone.",
        formula="as early_activation, of the largest attention logit; score > 10, 3 x median",
        source="Page 1954 (CUSUM); Dehghani et al. 2023 on growing attention logits",
        causes=(
            "queries and keys that grow, without a norm on them",
            "the learning rate is too high",
            "the gains of the norms before attention grow",
        ),
        advice="Normalise queries and keys, or clip them (QK-clip); lower the learning rate.",
    ),
)
