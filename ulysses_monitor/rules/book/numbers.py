"""Losses and gradients that are not finite, leap, vanish, explode or stand still."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Drift, Grown, Level, Vanishing
from ulysses_monitor.rules.kinds.loss import Collapse, Divergence, NotLearning, Plateau, Rise
from ulysses_monitor.rules.kinds.sanity import LossZero, NoLabels, NonFinite, SkippedSteps
from ulysses_monitor.rules.kinds.spikes import Spike

__all__ = ["ENTRIES"]

_FAMILY = "numbers"

ENTRIES = (
    entry(
        "nonfinite",
        NonFinite,
        family=_FAMILY,
        sees="A NaN or Inf in the loss or in a gradient, with the tensors that hold it. The "
        "monitor "
        "measures the loss itself, so `logging_nan_inf_filter` does not hide it.",
        formula="loss not finite, or `grad/nonfinite/total` > 0",
        source="definition",
        causes=(
            "the learning rate is too high",
            "a batch with a broken row",
            "fp16 overflows where bf16 would not",
            "a division by zero or a logarithm of zero in the loss",
        ),
        advice="Look at this step's batch; lower the learning rate; prefer bf16 to fp16.",
    ),
    entry(
        "skipped_steps",
        SkippedSteps,
        family=_FAMILY,
        severity="critical",
        patience=5,
        sees="Gradients that are not finite for several steps in a row. With a loss scale, each of "
        "these steps is skipped and nothing is learnt.",
        formula="`grad/nonfinite/total` > 0 for 5 steps",
        causes=(
            "the loss scale never becomes small enough: the forward pass itself overflows",
            "weights that hold NaN since an earlier step",
            "every batch holds the same broken row",
        ),
        advice="Prefer bf16; go back to a checkpoint from before the first of these steps.",
    ),
    entry(
        "no_labels",
        NoLabels,
        family=_FAMILY,
        sees="A step without a labelled token: its loss of 0 looks like success.",
        formula="`train/loss_tokens/total` = 0",
        source="definition",
        causes=(
            "the answers are cut off: prompts are as long as cutoff_len",
            "a template that the tokenizer does not know, so that no answer is found",
            "train_on_prompt and the mask contradict each other",
        ),
        advice="Check the template and cutoff_len: the answers may be cut off.",
    ),
    entry(
        "loss_zero",
        LossZero,
        family=_FAMILY,
        severity="critical",
        patience=2,
        sees="A loss of exactly 0.0, outside of RL, where advantages of zero give it.",
        formula="`train/loss/total` = 0 for 2 steps",
        source="definition",
        causes=(
            "every label is masked",
            "the loss is multiplied by zero, or of another tensor than the model's output",
            "both sides of each preference pair are equal",
        ),
        advice="Print the labels of one batch, and count those that are not -100.",
    ),
    entry(
        "loss_above_chance",
        Level,
        metrics=("train/loss_over_chance/total",),
        above=1.2,
        patience=2,
        clear=8,
        family=_FAMILY,
        sees="A loss above that of a model that guesses: ln of the vocabulary's size.",
        formula="`train/loss_over_chance/total` > 1.2 for 2 steps",
        source="definition; a new model begins at 1.0",
        causes=(
            "losses of accumulated micro-batches are added up and not averaged",
            "the loss is a sum over tokens or ranks",
            "a tokenizer of another model, or a head that was initialised anew on a large scale",
        ),
        advice="Compare the loss at gradient_accumulation_steps 1 and 2: it must be the same.",
    ),
    entry(
        "loss_spike",
        Spike,
        metric="train/loss/total",
        times=1.15,
        sigmas=8.0,
        margin=1.12,
        window=24,
        cooldown=8,
        clear=4,
        family=_FAMILY,
        sees="A loss far above all of the last 24 steps.",
        formula="loss > max(1.15 x median, median x exp(8 s), 1.12 x largest), s: scatter "
        "of the logarithm from one step to the next",
        source="after OLMo-core's SkipStep (6 standard deviations over 128 steps), made robust",
        causes=(
            "a batch unlike the others: broken rows, another language, random labels",
            "the learning rate is too high",
            "an update of the step before that was too large",
        ),
        advice="Look at this step's batch; clip at a lower norm, or warm up for longer.",
    ),
    entry(
        "gradient_spike",
        Spike,
        metric="grad/norm/total",
        times=4.0,
        sigmas=8.0,
        margin=2.0,
        cooldown=8,
        clear=4,
        family=_FAMILY,
        sees="A gradient norm far above all of the last 64 steps, with the layer that has most of "
        "it.",
        formula="norm > max(4 x median, median x exp(8 s), 2 x largest), s: scatter "
        "of the logarithm from one step to the next",
        source="after OLMo-core's SkipStep (6 standard deviations over 128 steps), made robust",
        causes=(
            "a batch unlike the others: broken rows, another language, random labels",
            "the learning rate is too high",
            "one layer's activations have grown: see which",
        ),
        advice="Look at this step's batch; clip at a lower norm, or warm up for longer.",
    ),
    entry(
        "divergence",
        Divergence,
        severity="critical",
        patience=4,
        warmup=30,
        clear=32,
        cooldown=64,
        family=_FAMILY,
        sees="A loss that stays well above the best level it had and has given back half of what "
        "it "
        "had gained.",
        formula="median of 12 steps > max(1.05 x best, best + 0.5 x (first - best), best + 4 s) "
        "for 4 steps; first and best: medians of 12 steps, s: scatter within 12 steps",
        causes=(
            "the learning rate is too high, or its warm-up too short",
            "a few broken batches that threw the weights off",
            "the optimizer's settings: epsilon, betas, weight decay",
        ),
        advice="Go back to a checkpoint from before the rise; halve the learning rate.",
    ),
    entry(
        "loss_rises",
        Rise,
        warmup=64,
        clear=32,
        cooldown=64,
        family=_FAMILY,
        sees="A loss that rises slowly and steadily, whatever level it has.",
        formula="slope of the straight line through 32 losses > 5.5 standard errors, and it rises "
        "by 2 % of their mean",
        source="least squares; healthy runs of benchmarks/faults stay below 3.4 standard errors",
        causes=(
            "the loss, or an advantage or reward in it, has the wrong sign",
            "the data becomes harder: another source, or rows sorted by length",
            "the learning rate is too high",
        ),
        advice="Check the sign of the loss and what is new in the data; lower the learning rate.",
    ),
    entry(
        "plateau",
        Plateau,
        severity="info",
        cooldown=200,
        family=_FAMILY,
        sees="A loss that has not improved for 200 steps.",
        formula="median of the last 50 steps >= (1 - 0.002) x median of the 50 steps 200 back",
        source="others' default is 0.1 % over 10 steps, which healthy runs reach too",
        causes=(
            "the model has learnt what there is to learn",
            "the learning rate is too low, or at its end",
            "what is trained is too little: a low rank, few layers",
        ),
        advice="Stop here, or raise the learning rate or the rank.",
    ),
    entry(
        "not_learning",
        NotLearning,
        family=_FAMILY,
        cooldown=200,
        sees="A loss that is where it began after 100 steps, while steps hardly change the "
        "weights.",
        formula="median of the last 20 losses > 0.99 x that of the first 20, and every update "
        "ratio "
        "< 1e-4",
        causes=(
            "the learning rate is far too low",
            "Adam's epsilon is larger than the gradients",
            "gradients are clipped to almost nothing",
        ),
        advice="Raise the learning rate tenfold and look again after 50 steps.",
    ),
    entry(
        "loss_collapse",
        Collapse,
        patience=8,
        family=_FAMILY,
        sees="A loss that fell to a fiftieth of its start within the last 256 steps.",
        formula="loss < 0.02 x median of the oldest 8 losses, for 8 steps",
        causes=(
            "labels are not shifted, or the model sees the answer in its input",
            "the same few rows over and over",
            "labels count padding or other tokens that are trivial",
        ),
        advice="Decode one row with its labels; generate an answer to a prompt that is not in the "
        "data.",
    ),
    entry(
        "loss_without_noise",
        Grown,
        metric="train/loss/total",
        window=48,
        rising=0.96,
        falls=True,
        times=1.2,
        clear=16,
        family=_FAMILY,
        sees="A loss that falls at almost every step, as it does if every step has the same rows.",
        formula="loss fell at 96 % of the last 48 steps, and its first eight values are 1.2 x it",
        causes=(
            "the sampler gives the same batch at each step",
            "the batch is the whole data set, which is then very small",
            "the loss that is logged is an average over many steps",
        ),
        advice="Print the rows of two steps.",
    ),
    entry(
        "vanishing_gradient",
        Vanishing,
        family=_FAMILY,
        sees="A gradient norm that stays at a ten-thousandth of what it was at the start.",
        formula="norm < 1e-4 x median of the oldest 32 norms, for 10 steps",
        source="relative, because an absolute threshold fires on healthy runs of large models",
        causes=(
            "the loss no longer depends on what is trained",
            "the loss is at its minimum: the data is learnt by heart",
            "saturated activations",
        ),
        advice="Check that the loss depends on the trained parameters and that they are not "
        "frozen; "
        "raise the learning rate.",
    ),
    entry(
        "exploding_gradient",
        Drift,
        metrics=("grad/norm/total",),
        rise=50.0,
        reference=32,
        patience=5,
        clear=16,
        family=_FAMILY,
        severity="critical",
        sees="A gradient norm that stays at fifty times what it was at the start.",
        formula="norm > 50 x median of the oldest 32 norms, for 5 steps",
        causes=(
            "the learning rate is too high",
            "a layer's activations grow: no normalisation, residual too large",
            "gradients that are summed and not averaged",
        ),
        advice="Clip the gradients; lower the learning rate; look at the layers in the report.",
    ),
)
