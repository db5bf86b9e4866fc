import pytest
from transformers import PreTrainedTokenizerFast

from ulysses_core.data import DataConfig
from ulysses_core.data.examples import Example, Message
from ulysses_core.data.tokenize import build_row, share_budget, tokenize_pt, tokenize_sft
from ulysses_monitor.common.errors import InputError

TURNS = [([1, 2, 3], [4, 5]), ([6, 7], [8, 9])]
X = -100


def example(question: str, answer: str, where: str = "") -> Example:
    return Example("", (Message("user", question), Message("assistant", answer)), where)


def test_only_answers_have_labels() -> None:
    row = build_row(TURNS, DataConfig())
    assert row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row.labels == [X, X, X, 4, 5, X, X, 8, 9]


def test_train_on_prompt_labels_everything() -> None:
    row = build_row(TURNS, DataConfig(train_on_prompt=True))
    assert row.labels == row.input_ids


def test_mask_history_labels_the_last_answer_only() -> None:
    row = build_row(TURNS, DataConfig(mask_history=True))
    assert row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row.labels == [X, X, X, X, X, X, X, 8, 9]


def test_turns_that_do_not_fit_are_dropped() -> None:
    row = build_row(TURNS, DataConfig(cutoff_len=5))
    assert row.input_ids == [1, 2, 3, 4, 5]


def test_mask_history_gives_the_last_turns_priority() -> None:
    row = build_row(TURNS, DataConfig(cutoff_len=4, mask_history=True))
    assert row.input_ids == [6, 7, 8, 9]
    assert row.labels == [X, X, 8, 9]


@pytest.mark.parametrize(
    ("prompt", "answer", "budget", "kept"),
    [
        (3, 4, 10, (3, 4)),  # both fit
        (100, 4, 10, (6, 4)),  # a short answer is kept in full
        (4, 100, 10, (4, 6)),  # a short prompt is kept in full
        (100, 100, 10, (5, 5)),  # both are long and cut in proportion
        (30, 10, 16, (12, 4)),
        (0, 100, 10, (0, 10)),
        (100, 0, 10, (10, 0)),
    ],
)
def test_prompt_and_answer_share_the_budget(
    prompt: int, answer: int, budget: int, kept: tuple[int, int]
) -> None:
    assert share_budget(prompt, answer, budget) == kept


def test_no_row_is_longer_than_cutoff_len() -> None:
    for cutoff_len in range(1, 12):
        for mask_history in (False, True):
            row = build_row(TURNS, DataConfig(cutoff_len=cutoff_len, mask_history=mask_history))
            assert len(row.input_ids) == len(row.labels) == min(cutoff_len, 9)


def test_conversations_are_tokenised_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    # Each digit is one token.
    examples = [example("1", "2"), example("1" * 50, "2"), example("1", "")]
    config = DataConfig(template="empty", cutoff_len=10)
    rows, stats = tokenize_sft(examples, tokenizer, config)
    assert [len(row.input_ids) for row in rows] == [2, 10]
    assert tokenizer.decode(rows[0].input_ids) == "12"
    assert rows[0].labels == [X, *tokenizer("2")["input_ids"]]
    assert (stats.examples, stats.dropped, stats.truncated, stats.rows) == (3, 1, 1, 2)
    assert (stats.tokens, stats.trained_tokens) == (12, 2)


def test_rows_without_a_label_are_counted_and_the_first_is_named(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = DataConfig(template="empty", cutoff_len=1)
    rows, stats = tokenize_sft([example("1", "2", where="f, row 1")] * 2, tokenizer, config)
    assert (rows, stats.dropped) == ([], 2)
    assert stats.first_dropped == "f, row 1: no token of an answer is within cutoff_len 1"


def test_cut_answers_are_counted_apart_from_cut_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(template="empty", cutoff_len=4)
    examples = [example("1" * 8, "2"), example("1", "2" * 8, where="f, row 2"), example("1", "2")]
    _, stats = tokenize_sft(examples, tokenizer, config)
    assert (stats.truncated, stats.cut_answers, stats.first_cut) == (2, 1, "f, row 2")


def test_sft_packs_rows_with_packing(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(template="empty", cutoff_len=4, packing=True)
    rows, stats = tokenize_sft([example("1", "2")] * 3, tokenizer, config)
    assert [row.position_ids for row in rows] == [[0, 1, 0, 1], [0, 1]]
    assert (stats.examples, stats.rows, stats.trained_tokens) == (3, 2, 3)


def test_documents_form_a_stream_that_is_cut_into_blocks(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows, stats = tokenize_pt(["123", "45678", "9"], tokenizer, DataConfig(cutoff_len=4))
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["123</s>", "4567", "8</s>9</s>"]
    assert all(row.labels == row.input_ids for row in rows)
    assert (stats.examples, stats.dropped, stats.rows, stats.tokens) == (3, 0, 3, 12)


def test_a_short_remainder_is_dropped_unless_it_is_the_only_block(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows, _ = tokenize_pt(["12345"], tokenizer, DataConfig(cutoff_len=4))
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["1234"]
    rows, _ = tokenize_pt(["12345"], tokenizer, DataConfig(cutoff_len=40))
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["12345</s>"]


def test_documents_are_truncated_without_packing(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(cutoff_len=4, packing=False)
    rows, stats = tokenize_pt(["12", "123456"], tokenizer, config)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["12</s>", "1234"]
    assert stats.truncated == 1


def test_neat_packing_keeps_documents_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(cutoff_len=6, neat_packing=True)
    rows, _ = tokenize_pt(["12", "1234567", "3"], tokenizer, config)
    assert [row.position_ids for row in rows] == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5], [0, 1]]
    assert [row.labels[0] for row in rows] == [X, X, X]


def test_a_tokenizer_that_adds_bos_adds_it_to_each_document(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.add_bos_token = True
    rows, _ = tokenize_pt(["1", "2"], tokenizer, DataConfig(packing=False))
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["<s>1</s>", "<s>2</s>"]


def test_pt_needs_an_eos_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no end-of-sequence.*set the tokenizer's eos_token"):
        tokenize_pt(["1"], tokenizer, DataConfig())
