"""The keys that a Trainer's batch may hold, and the label that marks a token as not trained on.

Keys of images are left out: sequence parallelism refuses every tensor per token that it does not
know.

Legend: B examples, R rows (B, or 2B where rejected rows follow the chosen ones), S tokens of a row,
P tokens of a prompt, C tokens of a completion, D packed documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BATCH_KEYS", "IGNORE_INDEX", "ROW_MASKS", "BatchKey", "names_by_slicing"]

IGNORE_INDEX = -100
"""Label of a token that is not trained on, as in `torch.nn.CrossEntropyLoss`."""

Slicing = Literal["sliced", "rebuilt", "kept"]
"""What sequence parallelism does with a key when the model is called with it.

``sliced``: each rank gets its part of every row. ``rebuilt``: left out, because the same facts are
read from `position_ids`. ``kept``: every rank keeps all of it; if it has a value per token, it is
for the trainer, and a model that is called with it is an error.
"""


@dataclass(frozen=True)
class BatchKey:
    """One key of a batch.

    Attributes:
        name: the key.
        shape: of its value, see the legend; empty for a number.
        stages: the stages whose trainers make it.
        slicing: what sequence parallelism does with it.
        meaning: what it holds.
    """

    name: str
    shape: str
    stages: tuple[str, ...]
    slicing: Slicing
    meaning: str


_ROWS = ("pt", "sft", "rm", "dpo", "kto")  # whole rows, prompt and answer in one
_LABELLED = ("pt", "sft")
_PAIRS = ("orpo", "cpo")
_ROLLOUTS = ("grpo", "rloo")

BATCH_KEYS = (
    # Rows
    BatchKey("input_ids", "[R, S]", _ROWS, "sliced", "token ids"),
    BatchKey("attention_mask", "[R, S]", _ROWS, "sliced", "0 for padding"),
    BatchKey("labels", "[R, S]", _LABELLED, "sliced", "the token itself, or IGNORE_INDEX"),
    BatchKey("shift_labels", "[R, S]", _LABELLED, "sliced", "labels of the next token"),
    # Packed rows; position_ids restart at 0 where a document begins
    BatchKey("position_ids", "[R, S]", _LABELLED, "sliced", "places within the document"),
    BatchKey("seq_idx", "[R, S]", _LABELLED, "rebuilt", "number of the token's document"),
    BatchKey("cu_seq_lens_q", "[D + 1]", _LABELLED, "rebuilt", "where the documents begin"),
    BatchKey("cu_seq_lens_k", "[D + 1]", _LABELLED, "rebuilt", "where the documents begin"),
    BatchKey("max_length_q", "", _LABELLED, "rebuilt", "tokens of the longest document"),
    BatchKey("max_length_k", "", _LABELLED, "rebuilt", "tokens of the longest document"),
    # Preferences
    BatchKey("margin", "[B]", ("rm",), "kept", "least difference of the two rewards"),
    BatchKey("ref_chosen_logps", "[B]", ("dpo",), "kept", "of the reference model"),
    BatchKey("ref_rejected_logps", "[B]", ("dpo",), "kept", "of the reference model"),
    BatchKey("label", "[B]", ("kto",), "kept", "whether the answer is desirable"),
    BatchKey("ref_logps", "[B]", ("kto",), "kept", "of the reference model"),
    BatchKey("ref_KL_logps", "[B]", ("kto",), "kept", "of the reference model"),
    BatchKey("KL_input_ids", "[B, S]", ("kto",), "kept", "rows run without gradients"),
    BatchKey("KL_attention_mask", "[B, S]", ("kto",), "kept", "0 for padding"),
    BatchKey("KL_completion_mask", "[B, S]", ("kto",), "kept", "1 for tokens of the answer"),
    BatchKey("chosen_input_ids", "[B, S]", _PAIRS, "kept", "token ids"),
    BatchKey("chosen_attention_mask", "[B, S]", _PAIRS, "kept", "0 for padding"),
    BatchKey("chosen_labels", "[B, S]", _PAIRS, "kept", "as labels"),
    BatchKey("rejected_input_ids", "[B, S]", _PAIRS, "kept", "token ids"),
    BatchKey("rejected_attention_mask", "[B, S]", _PAIRS, "kept", "0 for padding"),
    BatchKey("rejected_labels", "[B, S]", _PAIRS, "kept", "as labels"),
    BatchKey("prompt_input_ids", "[B, P]", _PAIRS, "kept", "token ids"),
    BatchKey("prompt_attention_mask", "[B, P]", _PAIRS, "kept", "0 for padding"),
    # Preferences [R, S], and rollouts [B, C]
    BatchKey(
        "completion_mask",
        "[R, S] or [B, C]",
        ("dpo", "kto", *_ROLLOUTS),
        "kept",
        "1 for tokens of the answer",
    ),
    # Rollouts
    BatchKey("prompt_ids", "[B, P]", _ROLLOUTS, "kept", "token ids, padded on the left"),
    BatchKey("prompt_mask", "[B, P]", _ROLLOUTS, "kept", "0 for padding"),
    BatchKey("completion_ids", "[B, C]", _ROLLOUTS, "kept", "token ids"),
    BatchKey("tool_mask", "[B, C]", ("grpo",), "kept", "0 for tokens that a tool wrote"),
    BatchKey("old_per_token_logps", "[B, C]", ("grpo",), "kept", "when it was sampled"),
    BatchKey("ref_per_token_logps", "[B, C]", ("grpo",), "kept", "of the reference model"),
    BatchKey("sampling_per_token_logps", "[B, C]", ("grpo",), "kept", "of the sampling engine"),
    BatchKey("importance_sampling_ratio", "[B, C]", ("grpo",), "kept", "trained over sampled"),
    BatchKey("old_logps", "[B]", ("rloo",), "kept", "when it was sampled"),
    BatchKey("advantages", "[B]", _ROLLOUTS, "kept", "reward over the baseline"),
    BatchKey("num_items_in_batch", "", ("grpo",), "kept", "tokens that the loss divides by"),
)

ROW_MASKS = (
    ("attention_mask",),
    ("prompt_mask", "completion_mask"),
    ("chosen_attention_mask", "rejected_attention_mask"),
)
"""Sets of masks, 0 for padding, that together cover the rows that a micro-batch trains on."""


def names_by_slicing(slicing: Slicing) -> frozenset[str]:
    """Returns the keys with which sequence parallelism does the same."""
    return frozenset(key.name for key in BATCH_KEYS if key.slicing == slicing)
