"""Each check of a data set finds its damage, names the rows, and is quiet without it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from ulysses_core.data import DataConfig, load_datasets
from ulysses_core.data.files import Row as FileRow
from ulysses_core.data.health import Finding, Health, check_health
from ulysses_core.data.health.duplicates import RowIndex
from ulysses_core.data.health.findings import EXAMPLES
from ulysses_core.data.health.judging import CHECKS
from ulysses_core.data.health.signatures import sign_rows
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.masking import find_secrets

Write = Callable[..., Path]
Row = dict[str, Any]

LETTERS = "abcdefghijklmnoprstuvwxyz"
RANKING = {
    "ranking": True,
    "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
}
TAGGED = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"}}


def words(seed: int, count: int = 20) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(LETTERS, k=draw.randint(3, 7))) for _ in range(count))


def sound(count: int, start: int = 0) -> list[Row]:
    """Returns rows with nothing wrong."""
    rows = range(start, start + count)
    return [{"instruction": words(2 * i, 6), "output": words(2 * i + 1)} for i in rows]


def pairs(count: int, **changes: Any) -> list[Row]:
    rows = [
        {"instruction": words(i, 6), "chosen": words(1000 + i), "rejected": words(2000 + i)}
        for i in range(count)
    ]
    return [row | changes for row in rows]


@pytest.fixture
def check(write_dataset: Write, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Health]:
    """Checks rows; `entry` is of dataset_info.json, `evaluated` are rows to evaluate on."""

    def run(
        rows: Sequence[Row],
        stage: str = "sft",
        *,
        entry: dict[str, Any] | None = None,
        evaluated: Sequence[Row] = (),
        **settings: Any,
    ) -> Health:
        folder = write_dataset(list(rows), **(entry or {}))
        if evaluated:
            write_dataset(list(evaluated), name="held", **(entry or {}))
            settings["eval_dataset"] = "held"
        settings = {"dataset": "toy", "template": "default", "bad_rows": "skip"} | settings
        config = DataConfig(dataset_dir=folder, **settings)
        return check_health(config, find_stage(stage), tokenizer)

    return run


def find(health: Health, name: str) -> Finding:
    (found,) = (finding for finding in health.findings if finding.check == name)
    return found


def rows_of(finding: Finding) -> list[int]:
    """Returns the numbers of the rows that a finding names."""
    return [int(example.split("row ")[1].split(":")[0]) for example in finding.examples]


Check = Callable[..., Health]


# -- nothing wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "rows", "entry"),
    [
        ("sft", sound(40), {}),
        ("pt", [{"text": words(i, 30)} for i in range(40)], {"columns": {"prompt": "text"}}),
        ("dpo", pairs(40), RANKING),
        ("rm", pairs(40), RANKING),
        ("kto", [row | {"tag": i % 2 == 0} for i, row in enumerate(sound(40))], TAGGED),
        ("grpo", sound(40), {}),
        ("ppo", sound(40), {}),
    ],
)
def test_nothing_is_found_in_sound_rows(
    check: Check, stage: str, rows: list[Row], entry: dict[str, Any]
) -> None:
    health = check(rows, stage, entry=entry)
    assert list(health.findings) == []
    assert not health.is_serious
    assert {*health.clean, *health.skipped} == set(CHECKS)
    assert health.splits["train"].rows == 40
    if stage in ("grpo", "ppo"):
        assert health.skipped["eos_missing"] == f"stage {stage} samples its answers"


def test_numbers_are_those_of_the_training(
    check: Check, write_dataset: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = sound(30)
    numbers = check(rows, cutoff_len=165).splits["train"]
    config = DataConfig(
        dataset="toy", dataset_dir=write_dataset(rows), template="default", cutoff_len=165
    )
    trained = load_datasets(config, find_stage("sft"), tokenizer)
    stats, data = trained.stats["train"], trained.train
    assert data is not None
    assert (numbers.rows, numbers.tokens) == (stats.rows, stats.tokens)
    assert numbers.trained == stats.trained_tokens
    assert (numbers.truncated, numbers.cut_answers) == (stats.truncated, stats.cut_answers)
    assert 0 < numbers.truncated < 30
    lengths = [len(row["input_ids"]) for row in data]  # type: ignore[index]
    assert numbers.lengths["max"] == max(lengths)
    assert numbers.lengths["min"] == min(lengths)
    assert sum(count for _, count in numbers.histogram) == 30


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad_rows", "severity"), [("refuse", "serious"), ("skip", "warning")])
def test_rows_that_cannot_be_read_are_named(check: Check, bad_rows: str, severity: str) -> None:
    rows = [
        *sound(10),
        {"instruction": "x"},
        *sound(5, start=20),
        {"instruction": 3, "output": "x"},
    ]
    health = check(rows, bad_rows=bad_rows)
    found = find(health, "unreadable_rows")
    assert (found.count, rows_of(found), found.severity) == (2, [11, 17], severity)
    assert "output" in found.examples[0]
    assert health.splits["train"].unreadable == 2


def test_rows_without_labels_are_named(check: Check) -> None:
    health = check(sound(20), cutoff_len=1)
    assert find(health, "no_labels").count == 20
    assert "no token of an answer is within cutoff_len 1" in find(health, "no_labels").examples[0]
    assert "no_labels" in check(sound(20), cutoff_len=100).clean


def test_answers_and_prompts_that_are_cut_are_told_apart(check: Check) -> None:
    rows = sound(40)
    rows[6]["output"] = words(1, 200)
    rows[9]["instruction"] = words(2, 200)
    health = check(rows, cutoff_len=400)
    assert rows_of(find(health, "cut_answers")) == [7]
    assert rows_of(find(health, "truncated")) == [10]
    assert find(health, "cut_answers").severity == "warning"  # 1 of 40 rows


def test_documents_that_are_packed_are_not_cut(check: Check) -> None:
    rows = [{"text": words(i, 60)} for i in range(10)]
    entry = {"columns": {"prompt": "text"}}
    assert "truncated" in check(rows, "pt", entry=entry, cutoff_len=50).clean
    cut = check(rows, "pt", entry=entry, cutoff_len=50, packing=False)
    assert find(cut, "truncated").count == 10


def test_a_finding_names_few_rows_however_many_there_are(check: Check) -> None:
    rows = [{**row, "output": f"{row['output']} <|im_end|>"} for row in sound(60)]
    found = find(check(rows), "role_markers")
    assert found.count == 60
    assert rows_of(found) == [1, 2, 3, 4, 5]
    assert len(found.examples) == EXAMPLES


# -- tokens ----------------------------------------------------------------------------------------


def test_too_many_special_tokens_are_found(check: Check) -> None:
    rows = [{**row, "instruction": "<pad>" * 30 + row["instruction"]} for row in sound(20)]
    found = find(check(rows), "special_tokens")
    assert "'<pad>'" in found.message
    assert found.severity == "warning"


def test_a_dominant_token_is_found(check: Check) -> None:
    rows = [{**row, "output": f"{row['output'][:40]}{'!' * 60}"} for row in sound(20)]
    health = check(rows)
    assert "'!'" in find(health, "dominant_token").message
    assert find(health, "dominant_token").severity == "serious"
    assert find(health, "repetitive_rows").count == 20


def test_a_prompt_that_repeats_a_token_is_no_dominant_token(check: Check) -> None:
    rows = [{**row, "instruction": "!" * 300} for row in sound(20)]
    assert "dominant_token" in check(rows).clean


def test_a_low_share_of_labels_is_found(check: Check) -> None:
    rows = [{"instruction": words(i, 200), "output": words(i + 500, 1)} for i in range(10)]
    assert find(check(rows), "label_coverage").severity == "warning"
    assert "label_coverage" in check(rows, train_on_prompt=True).clean


# -- the template ----------------------------------------------------------------------------------


def test_a_doubled_bos_is_found(check: Check) -> None:
    rows = sound(20)
    rows[3]["instruction"] = "<s>" + rows[3]["instruction"]
    health = check(rows, template="deepseek3")  # its prefix is bos
    assert "bos_doubled" in check(sound(20), template="deepseek3").clean
    assert "bos_doubled" not in [f.check for f in check(rows, template="default").findings]
    assert rows_of(find(health, "role_markers")) == [4]
    rows[3]["instruction"] = "x"
    twice = [{**row, "system": "<s>"} for row in sound(20)]
    entry = {"columns": {"prompt": "instruction", "response": "output", "system": "system"}}
    assert find(check(twice, template="deepseek", entry=entry), "bos_doubled").count == 20


def test_answers_that_never_end_are_found(check: Check) -> None:
    found = find(check(sound(20), template="empty"), "eos_missing")
    assert (found.count, found.severity) == (20, "serious")
    assert "eos_missing" in check(sound(20), template="chatml").clean


def test_answers_that_are_cut_are_not_told_to_lack_an_end(check: Check) -> None:
    assert "eos_missing" in check(sound(20), cutoff_len=60).clean


@pytest.mark.parametrize(
    ("text", "is_mark"),
    [
        ("so <|im_start|>assistant said", True),
        ("first line\nHuman: and then", True),
        ("it was Human: he erred", False),  # plain words count at the start of a line
        ("### Instruction: do", True),
        ("[INST] do [/INST]", True),
        ("a < b and c > d", False),
    ],
)
def test_marks_of_templates_are_found_in_texts(check: Check, text: str, is_mark: bool) -> None:
    rows = sound(30)
    rows[12]["output"] += f" {text}"
    health = check(rows)
    assert ("role_markers" in health.clean) is not is_mark
    if is_mark:
        assert rows_of(find(health, "role_markers")) == [13]


def test_the_marks_of_a_template_that_is_not_used_are_text(
    check: Check, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = sound(20)
    rows[3]["output"] += "\nHuman: and then"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    health = check(rows, template=None)
    assert {"role_markers", "eos_missing"} <= set(health.clean)


# -- copies ----------------------------------------------------------------------------------------


def test_equal_rows_are_named_with_what_they_repeat(check: Check) -> None:
    rows = sound(30)
    rows += [rows[4], rows[4]]
    found = find(check(rows), "exact_duplicates")
    assert found.count == 2
    assert rows_of(found) == [31, 32]
    assert all(example.endswith("row 5") for example in found.examples)


def test_nearly_equal_rows_are_found(check: Check) -> None:
    rows = sound(30)
    rows.append({**rows[4], "output": rows[4]["output"][:-1] + "."})
    health = check(rows)
    found = find(health, "near_duplicates")
    assert (found.count, rows_of(found)) == (1, [31])
    assert "exact_duplicates" in health.clean


def test_a_system_prompt_that_all_rows_share_makes_no_duplicates(check: Check) -> None:
    health = check(sound(30), default_system=words(9, 300))
    assert "near_duplicates" in health.clean


def test_rows_that_are_trained_and_evaluated_on_are_serious(check: Check) -> None:
    rows = sound(30)
    near = {**rows[7], "output": rows[7]["output"][:-1] + "."}
    health = check(rows, evaluated=[*sound(5, start=100), rows[3], near])
    found = find(health, "train_eval_overlap")
    assert (found.count, found.severity) == (2, "serious")
    assert "held.json, row 6: as " in found.examples[0]
    assert found.examples[0].endswith("toy.json, row 4")
    assert {"exact_duplicates", "near_duplicates"} <= set(health.clean)
    assert "train_eval_overlap" in check(rows, evaluated=sound(5, start=100)).clean


def test_val_size_says_that_copies_may_be_on_both_sides(check: Check) -> None:
    rows = sound(30)
    health = check([*rows, rows[0]], val_size=4)
    assert "val_size" in find(health, "exact_duplicates").message
    assert "val_size" in health.skipped["train_eval_overlap"]


@pytest.mark.parametrize(
    ("similarity", "lowest", "highest"), [(0.95, 0.98, 1.0), (0.9, 0.91, 1.0), (0.5, 0.0, 0.02)]
)
def test_the_signature_finds_pairs_by_their_similarity(
    similarity: float, lowest: float, highest: float
) -> None:
    draw = np.random.default_rng(1)
    new = round(
        600 * (1 - 2 * similarity / (1 + similarity))
    )  # tokens that the copy does not share
    rows = [draw.integers(0, 30_000, 600).tolist() for _ in range(300)]
    copies = [draw.integers(0, 30_000, new).tolist() + row[new:] for row in rows]
    index = RowIndex()
    for number, batch in enumerate((rows, copies)):
        index.add([FileRow({}, Path("a.jsonl"), i + 1) for i in range(300)], batch, number)
    index.finish()
    found = index.find_near(index.find_exact())
    assert (found.later - found.earlier == 300).all()  # no other pair is alike
    assert lowest * 300 <= len(found) <= highest * 300


def test_what_is_kept_of_a_row_is_53_bytes() -> None:
    index, places = RowIndex(), [FileRow({}, Path("a.jsonl"), i + 1) for i in range(500)]
    for start in range(4):
        index.add(places, [[start, i, *range(300)] for i in range(500)], 0)
    index.finish()
    kept = [value for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in kept) <= 2000 * (53 + 1)  # and a flag


def test_the_signature_estimates_the_jaccard_similarity() -> None:
    draw = np.random.default_rng(2)
    agreed, true = [], []
    for part in (0.2, 0.5, 0.8):
        row = draw.integers(0, 30_000, 400).tolist()
        other = row[: int(400 * part)] + draw.integers(0, 30_000, 400 - int(400 * part)).tolist()
        first, second = ({*zip(r, r[1:], r[2:], strict=False)} for r in (row, other))
        (a, b), _ = sign_rows([row, other])
        agreed.append(float((a == b).mean()))
        true.append(len(first & second) / len(first | second))
    assert agreed == pytest.approx(true, abs=0.2)  # two standard deviations of 32 values


# -- preferences -----------------------------------------------------------------------------------


def test_equal_and_empty_sides_are_named(check: Check) -> None:
    rows = pairs(20)
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[5]["rejected"] = " "
    rows[8]["chosen"] = ""
    health = check(rows, "dpo", entry=RANKING)
    assert rows_of(find(health, "identical_sides")) == [3]
    assert rows_of(find(health, "empty_sides")) == [6, 9]
    assert "unreadable_rows" in health.clean


def test_sides_that_are_equal_within_cutoff_len_are_named(check: Check) -> None:
    rows = pairs(20)
    rows[2] |= {"chosen": words(1, 60) + " a", "rejected": words(1, 60) + " b"}
    found = find(check(rows, "dpo", entry=RANKING, cutoff_len=200), "identical_sides")
    assert rows_of(found) == [3]


def test_chosen_answers_that_are_longer_are_told(check: Check) -> None:
    rows = [row | {"chosen": words(i, 60)} for i, row in enumerate(pairs(20))]
    assert find(check(rows, "dpo", entry=RANKING), "side_lengths").severity == "warning"


@pytest.mark.parametrize(
    ("desirable", "severity"), [(40, "serious"), (0, "serious"), (38, "warning"), (20, "")]
)
def test_the_balance_of_kto_is_judged(check: Check, desirable: int, severity: str) -> None:
    rows = [row | {"tag": i < desirable} for i, row in enumerate(sound(40))]
    health = check(rows, "kto", entry=TAGGED)
    if severity:
        assert find(health, "kto_balance").severity == severity
    else:
        assert "kto_balance" in health.clean


# -- secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("use hf_abcdefghijklmnop1234", "secrets"),
        ("clone https://me:hunter22@host/x", "secrets"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secrets"),
        ("password: hunter22", "possible_secrets"),
        ("write to ada.l@lovelace.org today", "addresses"),
        ("write to me@example.com or @ada", ""),
        ("the key: a token is a word", ""),
    ],
)
def test_secrets_and_addresses_are_found_and_never_shown(
    check: Check, text: str, name: str
) -> None:
    rows = sound(30)
    rows[20]["instruction"] += f" {text}"
    health = check(rows)
    if not name:
        assert {"secrets", "possible_secrets", "addresses"} <= set(health.clean)
        return
    assert rows_of(find(health, name)) == [21]
    shown = json.dumps(dataclasses.asdict(health))
    for secret in ("abcdefghij", "hunter22", "lovelace"):
        assert secret not in shown


def test_what_is_masked_is_a_secret() -> None:
    assert find_secrets("nothing here: 3") == []
    assert find_secrets("api_key=abcd1234") == ["a value behind the name of a secret"]


# -- wrong input -----------------------------------------------------------------------------------


def test_a_config_without_datasets_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="dataset is not set"):
        check_health(DataConfig(), find_stage("sft"), tokenizer)


def test_a_data_set_with_no_readable_row_is_told(check: Check) -> None:
    health = check([{"instruction": "x"}] * 3)
    assert find(health, "unreadable_rows").count == 3
    assert health.splits["train"].rows == 0
    assert health.skipped["special_tokens"] == "there are no rows to train on"
