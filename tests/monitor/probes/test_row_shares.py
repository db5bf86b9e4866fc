"""Shares of rows that were just trained on, of rows that are cut, and of special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from ulysses_monitor.probes.batches import BatchReader
from ulysses_monitor.records import StepRecord
from ulysses_monitor.rules import RuleSet, make_rules

REPEATED, LONGEST = "data/duplicate_rows/total", "data/rows_at_longest/total"
SPECIAL = "data/special_tokens/total"
END = 9


def batch_of(rows: Sequence[Sequence[int]], padding: int = 0, **more: Tensor) -> dict[str, Tensor]:
    """A collated batch: padded to the longest row and `padding` tokens more, with a mask."""
    size = max(map(len, rows)) + padding
    ids = torch.tensor([[*row, *[0] * (size - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(mask == 0, -100),
        "attention_mask": mask,
    } | (more)


def row(number: int, length: int = 6) -> list[int]:
    """A row that no other number has."""
    draw = torch.Generator().manual_seed(number)
    return torch.randint(100, 30_000, (length,), generator=draw).tolist()


def read(
    steps: Iterable[Sequence[dict[str, Tensor]]], reader: BatchReader | None = None
) -> list[dict[str, float]]:
    """The metrics of each step, a sequence of micro-batches."""
    reader = reader or BatchReader()
    found = []
    for step in steps:
        for batch in step:
            reader.add(batch)
        sums = {name: float(value) for name, value in reader.take_sums().items()}
        found.append(reader.metrics(sums))
    return found


def rows_of_steps(numbers: Iterable[Sequence[int]]) -> list[list[dict[str, Tensor]]]:
    return [[batch_of([row(n) for n in step])] for step in numbers]


def alerts(name: str, metrics: Sequence[dict[str, float]]) -> list[int]:
    rules = RuleSet(make_rules([name]))
    found = []
    for step, values in enumerate(metrics, 1):
        record = StepRecord.of(step, 0.0, {"my/own/total": 1.0, **values})
        found += [alert.step for alert in rules.observe(record)]
    return found


NEW = [range(4 * step, 4 * step + 4) for step in range(40)]
"""More rows than four times those of nine steps."""


def test_rows_that_are_all_new_are_no_repeats_once_the_data_is_known_to_be_large() -> None:
    found = read(rows_of_steps(NEW))
    assert REPEATED not in found[20]
    assert [step[REPEATED] for step in found[-3:]] == [0.0, 0.0, 0.0]


def test_repeats_are_counted_within_a_step_and_eight_steps_back_and_no_further() -> None:
    last = len(NEW)
    found = read(
        rows_of_steps(
            [
                *NEW,
                [1000, 1001, 1000, 1000],  # two within the step
                [1000, NEW[last - 7][0], NEW[last - 8][0], 1002],  # of 1, 8 and 9 steps before
            ]
        )
    )
    assert [step[REPEATED] for step in found[-2:]] == [0.5, 0.5]


def test_a_row_is_the_same_in_another_micro_batch_with_other_padding() -> None:
    again = [batch_of([row(1000)]), batch_of([row(1000)], padding=3), batch_of([row(1001, 9)])]
    assert read([*rows_of_steps(NEW), again])[-1][REPEATED] == pytest.approx(1 / 3)


def test_a_data_set_that_comes_round_within_the_window_says_nothing() -> None:
    found = read(rows_of_steps([[step % 12] for step in range(60)]))
    assert not any(REPEATED in step for step in found)


@pytest.mark.parametrize(("rows", "batch"), [(36, 1), (150, 4), (600, 16)])
def test_small_data_shuffled_in_each_epoch_raises_nothing(rows: int, batch: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    texts = [row(n) for n in range(rows)]
    epochs = torch.cat([torch.randperm(rows, generator=draw) for _ in range(8)])
    metrics = read([batch_of([texts[n] for n in step])] for step in epochs.split(batch)[:-1])
    assert any(REPEATED in step for step in metrics)
    assert alerts("duplicate_rows", metrics) == []


def test_two_workers_that_read_the_same_stream_raise_an_alert() -> None:
    copies = [[1000 + 4 * (n // 2) + i for i in range(4)] for n in range(40)]
    metrics = read(rows_of_steps([*NEW, *copies]))
    assert [step[REPEATED] for step in metrics[-4:]] == [0.0, 1.0, 0.0, 1.0]
    assert alerts("duplicate_rows", metrics) == [len(NEW) + 20]


def texts(longest: int, *, shortest: int = 5, steps: int = 60, ends: bool = False) -> list[dict]:
    """Steps of texts of 5 to 60 tokens, cut at `longest`; a whole text may have an end."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        lengths = torch.randint(shortest, 61, (8,), generator=draw).tolist()
        rows = [[11] * (n - 1) + [END if ends else 12] for n in lengths]
        found.append([batch_of([each[:longest] for each in rows])])
    return found


def test_texts_of_all_lengths_are_seldom_at_the_longest() -> None:
    metrics = read(texts(60))
    assert max(step[LONGEST] for step in metrics[8:]) <= 0.3
    assert alerts("truncated_rows", metrics) == []


def test_texts_that_are_cut_have_the_longest_length() -> None:
    steps = texts(20)
    metrics = read(steps)
    for found, (batch,) in zip(metrics[8:], steps[8:], strict=True):
        assert found[LONGEST] == (batch["attention_mask"].sum(1) == 20).double().mean()
    (first,) = alerts("truncated_rows", metrics)
    assert first <= 32


def test_a_longest_row_that_has_its_end_is_not_cut() -> None:
    same = [[11] * 19 + [END]] * 6 + [[11] * 8 + [END]] * 2
    for ends, share in (((END,), 0.0), ((), 6 / 8)):
        found = read([[batch_of(same)]] * 8, BatchReader(ends))
        assert found[-1][LONGEST] == share
    cut = read(texts(20, ends=True), BatchReader((END,)))
    assert alerts("truncated_rows", cut)


def test_an_end_counts_where_labels_end_and_not_behind_them() -> None:
    batch = batch_of([[11] * 17 + [END, 13, 13]] * 6 + [[11] * 5] * 2)
    batch["labels"][:, 18:] = -100
    assert read([[batch]] * 8, BatchReader((END,)))[-1][LONGEST] == 0.0


def test_rows_of_one_length_are_not_cut_even_if_a_last_one_is_shorter() -> None:
    fixed = [[batch_of([row(8 * s + i, 16) for i in range(8)])] for s in range(20)]
    rest = [batch_of([row(1, 16), row(2, 5)])]
    assert not any(LONGEST in step for step in read([*fixed, rest, *fixed]))


def test_lengths_that_hardly_differ_are_not_cut() -> None:
    assert not any(LONGEST in step for step in read(texts(60, shortest=59)))


def test_packed_rows_and_rows_without_a_mask_have_no_length() -> None:
    steps = texts(20)
    for (batch,) in steps:
        place = torch.arange(batch["input_ids"].shape[1]) % 4
        batch["position_ids"] = place.expand_as(batch["input_ids"])
    assert not any(LONGEST in step for step in read(steps))
    for (batch,) in steps:
        del batch["position_ids"], batch["attention_mask"]
    assert not any(LONGEST in step for step in read(steps))
    whole = texts(20)
    for (batch,) in whole:
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = places * batch["attention_mask"]  # 0 at padding
    assert read(whole)[-1][LONGEST] > 0.5


def test_special_tokens_are_counted_where_they_are_trained_on() -> None:
    batch = batch_of([[1, 11, 12, END], [1, 11, END, END]])
    batch["labels"][0, 3] = -100
    (found,) = read([[batch]], BatchReader((), (1, END)))
    assert found[SPECIAL] == pytest.approx(2 / 5)
    (unknown,) = read([[batch]], BatchReader((END,)))
    assert SPECIAL not in unknown


def test_sums_of_ranks_add_up_to_the_shares_of_all_rows() -> None:
    readers = [BatchReader((), (1,)) for _ in range(2)]
    for reader in readers:
        read(rows_of_steps(NEW), reader)
    readers[0].add(batch_of([row(1000), row(1000)]))
    readers[1].add(batch_of([row(n) for n in range(2000, 2006)]))
    parts = [reader.take_sums() for reader in readers]
    sums = {name: sum(float(part[name]) for part in parts) for name in BatchReader.SUMS}
    assert readers[0].metrics(sums)[REPEATED] == pytest.approx(1 / 8)


def test_a_micro_batch_without_rows_changes_nothing() -> None:
    none = {name: value[:0] for name, value in batch_of([row(1)]).items()}
    found = read([*rows_of_steps(NEW), [none, batch_of([row(1000), row(1000)])], [none]])
    assert found[-2][REPEATED] == 0.5
    assert found[-1] == {}
