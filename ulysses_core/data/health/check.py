"""Checks the health of a data set: reads all rows once, then judges what was counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ulysses_core.data.config import DataConfig
from ulysses_core.data.health.counting import SPLITS, RowCounter
from ulysses_core.data.health.findings import Health
from ulysses_core.data.health.judging import Judge
from ulysses_core.data.health.reading import read_batches, unpacked
from ulysses_core.data.sources import RowPlan
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_health"]


def check_health(
    config: DataConfig,
    plan: RowPlan,
    tokenizer: PreTrainedTokenizerBase,
    on_rows: Callable[[int], None] = lambda _: None,
) -> Health:
    """Checks the rows of a config's datasets as the trainer sees them.

    Rows are read, rendered, tokenised and cut by the code that training uses, a batch at a time.
    Of each row 53 bytes are kept.

    Args:
        config: the data settings.
        plan: how the stage of training reads rows and turns them into tokens.
        tokenizer: the model's tokenizer.
        on_rows: is told the number of rows of each batch that was read.

    Raises:
        InputError: the config or a file is wrong, or there are no rows.
    """
    if not config.dataset and not config.eval_dataset:
        raise InputError(
            "dataset is not set; set dataset or eval_dataset to a name in dataset_info.json"
        )
    counter, read = RowCounter(tokenizer, config), unpacked(config, plan)
    for batch in read_batches(read, plan, tokenizer):
        counter.count(batch)
        on_rows(len(batch))
    counter.index.finish()
    judge = Judge(config, plan, tokenizer, counter)
    names = {"train": config.dataset, "eval": config.eval_dataset}
    return Health(
        stage=plan.name,
        splits={split: counter.numbers(split) for split in SPLITS if names[split]},
        findings=judge.findings(),
        clean=judge.clean(),
        skipped=judge.skipped(),
    )
