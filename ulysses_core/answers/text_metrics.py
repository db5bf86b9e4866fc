"""Compares answers with their references: BLEU, ROUGE-L, exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ulysses_core.rewards import extract_answer, is_same_answer

__all__ = ["compare_texts"]

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+")


class _Words:
    """Splits a text into words, and Chinese and Japanese into characters.

    rouge-score's own tokenizer knows only the letters a to z.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def compare_texts(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compares each answer with its reference.

    Args:
        answers: the answers; at least one.
        references: one for each answer.

    Returns:
        Three numbers from 0 to 100: `bleu`, of the corpus, as sacrebleu computes it (Papineni et
        al., 2002); `rouge_l`, the mean F1 of the longest common subsequence of words (Lin, 2004);
        `exact_match`, the share of final answers that are the reference's.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    is_chinese = any(map(_CHINESE.search, references))
    bleu = BLEU(tokenize="zh" if is_chinese else "13a")
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = list(zip(answers, references, strict=True))
    rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    equal = [_is_equal(answer, reference) for answer, reference in pairs]
    return {
        "bleu": float(bleu.corpus_score(list(answers), [list(references)]).score),
        "rouge_l": 100 * sum(rouge) / len(pairs),
        "exact_match": 100 * sum(equal) / len(pairs),
    }


def _is_equal(answer: str, reference: str) -> bool:
    found, expected = extract_answer(answer), extract_answer(reference)
    return found is not None and expected is not None and is_same_answer(found, expected)
