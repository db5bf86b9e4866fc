"""What gets no gradient, does not move, or moves too much."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Drift, Grown, Level
from ulysses_monitor.rules.kinds.movement import (
    NoGradient,
    NothingMoves,
    SmallUpdate,
    Still,
    WeightJump,
)
from ulysses_monitor.rules.kinds.state import SmallMoment, StaleState, StateLost

__all__ = ["ENTRIES"]

_FAMILY = "movement"

ENTRIES = (
    entry(
        "no_gradient",
        NoGradient,
        clear=20,
        family=_FAMILY,
        sees="Trainable tensors whose gradient has been exactly zero for 20 steps while others "
        "have "
        "one.",
        formula="`grad/norm/param/...` = 0 for 20 steps",
        source="definition; others test 100 % zeros at one step",
        causes=(
            "the layer is not on the way to the loss: a detach, a no_grad, an unused head",
            "the adapter sits on a module that the model does not call",
            "dead activations",
            "experts or embeddings that no row uses, which is harmless",
        ),
        advice="Freeze what is not meant to be trained; look for detach() and no_grad().",
    ),
    entry(
        "does_not_move",
        Still,
        clear=2,
        family=_FAMILY,
        sees="Tensors that have a gradient and are bit for bit the same after three measured "
        "steps, "
        "while others change.",
        formula="`optim/update_ratio/param/...` = 0 and `grad/norm/param/...` > 1e-3 x median, "
        "3 times",
        source="definition; others use allclose over 3 steps",
        causes=(
            "the tensor is not in the optimizer",
            "its group has a learning rate of 0",
            "its update is smaller than the rounding of bf16 weights",
        ),
        advice="Build the optimizer after the adapters and from model.parameters(); keep fp32 "
        "weights.",
    ),
    entry(
        "nothing_moves",
        NothingMoves,
        severity="critical",
        family=_FAMILY,
        sees="A step with a gradient and a learning rate that changed no weight at all, as with an "
        "optimizer of other parameters than the model's.",
        formula="`optim/update_ratio/total` = 0 while gradient norm and learning rate are above 0",
        source="definition",
        causes=(
            "the optimizer holds other parameters than the model: it was built before the model "
            "was "
            "wrapped, moved or loaded",
            "updates are smaller than the rounding of the weights' precision",
            "the step was skipped",
        ),
        advice="Build the optimizer after wrapping and loading the model.",
    ),
    entry(
        "update_ratio_large",
        Level,
        metrics=("optim/update_ratio/total",),
        above=0.3,
        patience=2,
        warmup=15,
        clear=3,
        family=_FAMILY,
        sees="Steps that change the weights by almost a third of their norm.",
        formula="`optim/update_ratio/total` > 0.3 at 2 measured steps",
        source="usual are 1e-4 to 1e-2 in fine-tuning and up to 0.1 early in training from scratch",
        causes=(
            "the learning rate is too high, often by a factor of 10 or 100",
            "weights that were initialised very small",
            "SGD without clipping",
        ),
        advice="Lower the learning rate tenfold.",
    ),
    entry(
        "update_ratio_small",
        SmallUpdate,
        patience=2,
        clear=3,
        family=_FAMILY,
        sees="Steps that change the weights by millionths of their norm while the learning rate is "
        "not at its end.",
        formula="0 < `optim/update_ratio/total` < 3e-6 at 2 measured steps, rate > 0.3 x highest",
        source="others' default is 1e-8",
        causes=(
            "the learning rate is far too low",
            "Adam's epsilon is larger than the gradients",
            "SGD with a rate that was meant for Adam",
        ),
        advice="Raise the learning rate; compare epsilon with the root of the second moment.",
    ),
    entry(
        "gradients_not_cleared",
        Level,
        metrics=("grad/carried/total",),
        above=0.0,
        severity="critical",
        patience=2,
        clear=8,
        family=_FAMILY,
        sees="Gradients of the step before that are still there when the next backward pass adds "
        "to them.",
        formula="`grad/carried/total` > 0 for 2 steps: nothing wrote to the gradient between the "
        "optimizer's step and the next backward pass",
        source="definition",
        causes=(
            "zero_grad() is missing",
            "zero_grad() of another optimizer or model than the one that is trained",
        ),
        advice="Call optimizer.zero_grad() after each step.",
    ),
    entry(
        "gradients_accumulate",
        Grown,
        clear=16,
        family=_FAMILY,
        sees="A gradient norm that rises at almost every step, as a sum does that nobody resets.",
        formula="norm rose at 80 % of the last 24 steps and is 3 x the median of the first 8",
        causes=(
            "zero_grad() is missing, so each step adds to the gradient of all steps before",
            "the run is diverging",
            "gradients of accumulated micro-batches are never cleared",
        ),
        advice="Call optimizer.zero_grad() after each step.",
    ),
    entry(
        "state_not_updated",
        StaleState,
        severity="critical",
        family=_FAMILY,
        sees="A first moment of Adam that is the same at two measured steps although there are "
        "gradients.",
        formula="`optim/exp_avg_norm/total` equal at two measurements, gradient norm > 0",
        source="definition",
        causes=(
            "every step in between was skipped",
            "another optimizer object is stepped than the one that is watched",
            "the state is restored at each step",
        ),
        advice="Check which optimizer the loop steps.",
    ),
    entry(
        "state_lost",
        StateLost,
        family=_FAMILY,
        sees="A resumed run whose optimizer has no moments at its first step.",
        formula="the run begins behind step 1; Adam's first moment is missing at the first "
        "measured step and there at the second",
        source="definition",
        causes=(
            "the checkpoint was loaded as a model, not as a training",
            "the checkpoint was saved without the optimizer: save_only_model",
            "the optimizer was made anew after its state was loaded",
        ),
        advice="Resume with resume_from_checkpoint from a checkpoint that has optimizer.pt.",
    ),
    entry(
        "tie_lost",
        Level,
        metrics=("param/untied/total",),
        above=0.0,
        clear=1,
        family=_FAMILY,
        sees="Weights that the model ties to others, as its head to its embedding, and that are "
        "now tensors of their own.",
        formula="`param/untied/total` > 0",
        source="definition",
        causes=(
            "the model was loaded or moved so that each got storage of its own: to_empty(), FSDP",
            "a weight was replaced by a new parameter after tie_weights()",
            "modules_to_save, which copies one of the two",
        ),
        advice="Call model.tie_weights() after loading, and before the optimizer is made.",
    ),
    entry(
        "second_moment_small",
        SmallMoment,
        patience=2,
        family=_FAMILY,
        sees="A second moment so small that Adam's epsilon decides the size of updates.",
        formula="0 < `optim/exp_avg_sq_mean/total` < 1e-17 at 2 measured steps",
        source="Kingma and Ba 2014: the update is divided by sqrt(v) + 1e-8",
        causes=(
            "the loss is divided too often: by the accumulation, the scale or the token count",
            "gradients that vanish",
            "an epsilon that is too large",
        ),
        advice="Check the loss's scale; lower epsilon.",
    ),
    entry(
        "weights_jump",
        WeightJump,
        severity="critical",
        warmup=20,
        family=_FAMILY,
        sees="A layer whose weights changed far more than the optimizer's steps can explain.",
        formula="relative change of `param/norm/layer/...` between 2 measurements > max(0.05, 4 x "
        "steps in between x update ratio)",
        source="triangle inequality: n steps of ratio r change a norm by n x r at most",
        causes=(
            "weights that were loaded, merged or reinitialised while training",
            "faulty memory, or an edit on one rank",
            "a policy or a callback that changes weights",
        ),
        advice="Go back to a checkpoint from before; look at what ran between the two steps.",
    ),
    entry(
        "weights_shrink",
        Drift,
        metrics=("param/norm/total",),
        fall=0.6,
        reference=1,
        patience=2,
        clear=3,
        family=_FAMILY,
        sees="Weights that have lost two fifths of their norm.",
        formula="`param/norm/total` < 0.6 x the first measured value, 2 times",
        causes=(
            "weight decay is far too strong for this learning rate",
            "an update with the wrong sign",
            "weights that are being averaged with small ones",
        ),
        advice="Lower weight_decay: a step multiplies weights by 1 - rate x weight_decay.",
    ),
)
