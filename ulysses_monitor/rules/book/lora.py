"""LoRA adapters."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Level
from ulysses_monitor.rules.kinds.lora import (
    AdapterWithoutGradient,
    IdleAdapter,
    LoraImbalance,
    RankCollapse,
)

__all__ = ["ENTRIES"]

_FAMILY = "lora"

ENTRIES = (
    entry(
        "lora_imbalance",
        LoraImbalance,
        clear=20,
        family=_FAMILY,
        sees="Adapters of which one side gets almost all of the gradient, for 20 steps after the "
        "first 100. At step 1 the ratio is infinite on a healthy run, because B is zero.",
        formula="median of ||grad B|| / ||grad A|| < 0.02 or > 50, for 20 steps",
        source="measured: infinite at step 1, then 117, 27 (step 5), 8 (20), 2.4 (100)",
        causes=(
            "A is so small that B's gradient, which contains A, is too",
            "B stays near zero: the rate is too low",
            "an initialisation that makes the sides unequal",
        ),
        advice="Try LoRA+ (a higher rate for B), another initialisation, or a higher rate.",
    ),
    entry(
        "lora_idle",
        IdleAdapter,
        severity="critical",
        patience=2,
        family=_FAMILY,
        sees="Adapters that add nothing to the weights after ten steps.",
        formula="`lora/delta_ratio/total` = 0 at 2 measured steps after step 10",
        source="definition",
        causes=(
            "A and B are both zero, so neither gets a gradient",
            "the adapters are not in the optimizer, or frozen",
            "the learning rate is 0",
        ),
        advice="Initialise one of the two sides; build the optimizer after adding the adapters.",
    ),
    entry(
        "adapter_without_gradient",
        AdapterWithoutGradient,
        patience=2,
        clear=20,
        family=_FAMILY,
        sees="Adapters of which neither side gets a gradient while other adapters do.",
        formula="`grad/norm/param/...` of A and of B = 0 for 2 steps, and not of all adapters",
        source="definition: one side is not zero at the start, so the other gets a gradient",
        causes=(
            "reentrant checkpointing of layers whose inputs need no gradient",
            "the adapter sits on a module that is not called: a fused loss reads the head's weight",
            "a detach or a no_grad behind the adapter",
        ),
        advice="Use use_reentrant=False or enable_input_require_grads(); leave such modules out of "
        "target_modules.",
    ),
    entry(
        "lora_rank_collapse",
        RankCollapse,
        patience=3,
        family=_FAMILY,
        sees="Adapters whose product has become a matrix of rank one.",
        formula="`lora/stable_rank/total` < 1.02 at 3 measured steps, and was above 1.5",
        causes=(
            "one direction has grown beyond all others: the rate is too high",
            "the data teaches one thing only",
            "the scale alpha / r is too large",
        ),
        advice="Lower the rate or alpha; a rank of 1 would do as well.",
    ),
    entry(
        "lora_outgrows_base",
        Level,
        metrics=("lora/delta_ratio/total",),
        above=2.0,
        patience=2,
        family=_FAMILY,
        sees="Adapters that change the weights by twice the weights themselves.",
        formula="scale x ||BA|| / ||W|| > 2 at 2 measured steps",
        causes=(
            "the rate is too high for LoRA",
            "alpha is too large for the rank",
            "training for very long on very little data",
        ),
        advice="Lower alpha or the rate: the base model's knowledge is being overwritten.",
    ),
)
