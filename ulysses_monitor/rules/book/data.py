"""What batches and evaluations say about the data."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.batches import (
    DataChanged,
    EndsNotTrained,
    LabelsChanged,
    LabelsMisaligned,
    LargeShare,
)
from ulysses_monitor.rules.kinds.evaluation import LossBesideEvaluation, Overfitting
from ulysses_monitor.rules.kinds.levels import Level

__all__ = ["ENTRIES"]

_FAMILY = "data"

ENTRIES = (
    entry(
        "labels_misaligned",
        LabelsMisaligned,
        severity="critical",
        patience=2,
        clear=8,
        family=_FAMILY,
        sees="Labels that are a place off: each is the token that it is predicted from, or the "
        "next but one.",
        formula="`data/label_copied/total` or `data/label_ahead/total` > 0.9 while "
        "`data/label_own/total` < 0.55, for 2 steps",
        source="definition: a causal language model's label is the token at its own place, and the "
        "loss shifts",
        causes=(
            "labels that are shifted in the data although the loss shifts too",
            "a loss of one's own that does not shift, or shifts the wrong way",
        ),
        advice="Give labels that equal input_ids, with -100 where nothing is learnt.",
    ),
    entry(
        "labels_changed",
        LabelsChanged,
        clear=8,
        cooldown=32,
        family=_FAMILY,
        sees="Labels that were the rows' own tokens at the start and no longer are.",
        formula="`data/label_own/total` < 0.9, and >= 0.98 at the first steps",
        source="definition",
        causes=(
            "labels and rows that were shuffled or sorted apart",
            "broken rows, or another data set with labels of another kind",
            "a collator or a callback that changes one of them",
        ),
        advice="Decode the labels and the tokens of one row of this step.",
    ),
    entry(
        "padding_trained",
        Level,
        metrics=("data/label_padded/total",),
        above=0.0,
        patience=2,
        clear=8,
        family=_FAMILY,
        sees="Labels on padding: the model learns to predict padding from padding.",
        formula="`data/label_padded/total` > 0 for 2 steps; the end token right behind a text does "
        "not count",
        source="definition",
        causes=(
            "the collator pads labels with the padding token and not with -100",
            "labels that are a copy of padded input_ids",
        ),
        advice="Set labels to -100 where attention_mask is 0.",
    ),
    entry(
        "dominant_token",
        Level,
        metrics=("data/dominant_token/total",),
        above=0.3,
        patience=5,
        clear=16,
        family=_FAMILY,
        sees="One token that is a third of all labels.",
        formula="`data/dominant_token/total` > 0.3 for 5 steps",
        source="the limit of `ulysses check-data`; ordinary text is below 0.1",
        causes=(
            "padding, or a special token, that is trained on",
            "rows that repeat one token: a broken tokenizer, spaces, a template's markers",
            "answers of one or two tokens, of which the end token is a large part: harmless",
        ),
        advice="Decode one row with its labels; run ulysses check-data.",
    ),
    entry(
        "data_changed",
        DataChanged,
        warmup=32,
        clear=16,
        cooldown=64,
        family=_FAMILY,
        sees="Trained tokens whose frequencies have suddenly become others: another language, "
        "another source, another template.",
        formula="`data/token_overlap/total`: median of 4 values < usual x min(0.98, 1 - 6 s); "
        "usual: median of 48, s: scatter of the logarithm from one step to the next",
        source="Bhattacharyya 1943",
        causes=(
            "the next part of data that is not shuffled",
            "rows of another language, tokenizer or template",
            "an intended change of the mixture",
        ),
        advice="Shuffle the data; decode a row from before and one from after.",
    ),
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
        "ends_not_trained",
        EndsNotTrained,
        clear=8,
        family=_FAMILY,
        sees="End tokens that rows have and that no label trains, so that the model never learns "
        "to stop.",
        formula="`data/end_trained/total` = 0 at all steps so far, with 8 end tokens or more",
        source="definition",
        causes=(
            "the padding token is the end token, and the collator masks both",
            "the template puts the end token behind what is trained",
            "answers that are cut off, while prompts hold end tokens",
        ),
        advice="Give the tokenizer a padding token of its own; decode one row with its labels.",
    ),
    entry(
        "special_tokens",
        LargeShare,
        metric="data/special_tokens/total",
        above=0.3,
        window=8,
        clear=16,
        family=_FAMILY,
        sees="Labels of which a third are special tokens: the model learns marks and not texts.",
        formula="`data/special_tokens/total` > 0.3 on the mean of 8 values",
        source="definition; `ulysses check-data` tells from 5 % on, which short chats reach",
        causes=(
            "padding, image placeholders or a template's marks that are trained on",
            "a template or a beginning-of-text token that is applied twice or more",
            "answers of one or two tokens, of which the end token is a large part: harmless",
        ),
        advice="Decode one row with its labels; run ulysses check-data.",
    ),
    entry(
        "duplicate_rows",
        LargeShare,
        metric="data/duplicate_rows/total",
        above=0.3,
        clear=32,
        family=_FAMILY,
        sees="Rows that a rank trained on less than nine steps ago, although the data has many "
        "others.",
        formula="`data/duplicate_rows/total` > 0.3 on the mean of 32 values; where there are "
        "fewer, the others count as 0",
        source="definition: within an epoch each row comes once; a small data set gives no value",
        causes=(
            "a streamed data set that each of the loader's workers reads as a whole",
            "duplicates beside one another in data that is not shuffled",
            "a loop that takes a batch again, as for each micro-batch of a step",
            "a sampler that draws a small part of the data far too often",
        ),
        advice="Print the first rows of some batches; split a stream by worker_info; remove "
        "duplicates (ulysses check-data finds them).",
    ),
    entry(
        "truncated_rows",
        LargeShare,
        metric="data/rows_at_longest/total",
        above=0.5,
        clear=32,
        family=_FAMILY,
        sees="Most rows have the same length, the longest, and no end: they are cut there.",
        formula="`data/rows_at_longest/total` > 0.5 on the mean of 32 values; where there are "
        "fewer, the others count as 0",
        source="definition: lengths of texts differ; rows of a fixed length and packed ones do not "
        "count",
        causes=(
            "a longest length (max_length, cutoff_len) that is shorter than most rows",
            "a template or a prompt that takes most of the room",
            "long documents that are cut into pieces, with a shorter last one: harmless",
        ),
        advice="Raise the longest length, or pack; at least cut prompts rather than answers.",
    ),
    entry(
        "random_in_evaluation",
        Level,
        metrics=("eval/random_steps/total",),
        above=0.0,
        clear=1,
        family=_FAMILY,
        sees="An evaluation whose steps draw random numbers, as dropout does.",
        formula="`eval/random_steps/total` > 0: torch's random state moved between two steps",
        source="definition: a model in evaluation mode draws none",
        causes=(
            "dropout that does not look at model.training, as with F.dropout or fused attention",
            "a model that stays in training mode while it is evaluated",
            "a collator that draws at random, which may be meant",
        ),
        advice="Evaluate the same batch twice: the losses must be equal. Call model.eval().",
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
