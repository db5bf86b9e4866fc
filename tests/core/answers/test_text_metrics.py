from __future__ import annotations

import pytest

from ulysses_core.answers import compare_texts


def test_equal_texts_have_full_marks() -> None:
    text = "the list holds every item of the map"
    assert compare_texts([text], [text]) == pytest.approx(
        {"bleu": 100.0, "rouge_l": 100.0, "exact_match": 100.0}
    )


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # common: "the cat sat"; precision 3/4, recall 3/6
    found = compare_texts(["the cat sat there"], ["the black cat sat on mats"])
    assert found["rouge_l"] == pytest.approx(100 * 2 * 0.75 * 0.5 / (0.75 + 0.5))


def test_bleu_is_that_of_sacrebleu_over_the_corpus() -> None:
    import sacrebleu

    answers = ["the cat sat on the mat today", "a dog runs in the park"]
    references = ["the cat sat on the mat", "the dog runs in the park"]
    expected = sacrebleu.corpus_bleu(answers, [references]).score
    assert compare_texts(answers, references)["bleu"] == pytest.approx(expected)


def test_exact_match_compares_what_follows_the_thoughts() -> None:
    answers = ["<think>3+4</think>7", "<think>3+4</think>8", "7.0"]
    assert compare_texts(answers, ["7", "7", "7"])["exact_match"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("text", ["列表保存每个元素的值", "список хранит каждое значение ключа"])
def test_texts_without_latin_letters_are_compared_too(text: str) -> None:
    assert compare_texts([text], [text])["rouge_l"] == 100
    assert compare_texts([text], [text])["bleu"] == pytest.approx(100)
