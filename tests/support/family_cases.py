"""The grid over transformers' families of causal language models, in the ranks of a test."""

from __future__ import annotations

import traceback
from typing import Any

from tests.support.forget import forget_last_trainer
from ulysses_core.parallel.families.proof import Variant, train_variant
from ulysses_monitor.common.errors import InputError

__all__ = ["Named", "refuse_rows", "train_variants"]

Named = tuple[str, str | None, Any, str]
"""A variant as processes pass it on: model_type, the option's name and value, the kind of rows.

Rows called `score` are padded on the right, and the model has a reward model's head.
"""


def train_variants(variants: list[Named], size: int) -> list[dict[str, Any]]:
    """The child: every variant in turn; one that fails on all ranks does not stop the others."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    results = []
    for name, option, value, rows in variants:
        chosen = None if option is None else (option, value)
        variant = Variant(
            kind=CONFIG_MAPPING[name],
            option=chosen,
            rows="right" if rows == "score" else rows,
            has_score=rows == "score",
        )
        try:
            results.append(train_variant(variant, size))
        except Exception as error:  # noqa: BLE001 - not every family allows every option
            line = str(error).strip().split("\n", 1)[0]
            text = f"{type(error).__name__}: {line}"
            results.append({"error": text, "trace": traceback.format_exc()})
        forget_last_trainer()
    return results


def refuse_rows() -> str:
    """The child: trains OPT on rows padded on the left, and returns what the error says."""
    from transformers import Trainer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import ulysses_core as uc
    from ulysses_core.parallel.families import proof

    model = proof.build_small(Variant(kind=CONFIG_MAPPING["opt"]))
    args = proof.make_arguments("unused")
    trainer = Trainer(model, args, train_dataset=proof.make_rows("left"))
    uc.sequence_parallel(trainer, 2)
    try:
        trainer.train()
    except InputError as error:
        return str(error)
    finally:
        forget_last_trainer()
    return "not refused"
