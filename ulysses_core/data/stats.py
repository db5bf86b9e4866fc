"""Statistics of tokenised rows: what was read, cut, and left out."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["DataStats", "Tally"]


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """Statistics of a split."""

    examples: int
    """Examples read, after `num_samples` and `max_samples`."""
    dropped: int
    """Examples that have nothing to train on within `cutoff_len`."""
    truncated: int
    """Examples cut off at `cutoff_len`."""
    rows: int
    """Rows in the dataset; fewer than examples if they are packed."""
    tokens: int
    """Tokens in those rows."""
    trained_tokens: int
    """Tokens with a label."""
    cut_answers: int = 0
    """Examples of which an answer is cut off at `cutoff_len`."""
    first_dropped: str = ""
    """What is wrong with the first dropped example, and where it is."""
    first_cut: str = ""
    """Where the first example with a cut answer is."""

    def __add__(self, other: DataStats) -> DataStats:
        """Returns the statistics of both."""
        return DataStats(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
                if not field.name.startswith("first_")
            },
            first_dropped=self.first_dropped or other.first_dropped,
            first_cut=self.first_cut or other.first_cut,
        )


class Tally:
    """Counts examples while they are tokenised."""

    def __init__(self) -> None:
        self.examples = 0
        self._dropped = 0
        self._truncated = 0
        self._cut_answers = 0
        self._first_dropped = ""
        self._first_cut = ""

    def drop(self, where: str, problem: str) -> None:
        """Counts an example that has nothing to train on."""
        self._dropped += 1
        self._first_dropped = self._first_dropped or (f"{where}: {problem}" if where else problem)

    def cut(self, where: str, *, is_answer: bool) -> None:
        """Counts an example that is cut off at `cutoff_len`."""
        self._truncated += 1
        self._cut_answers += is_answer
        if is_answer:
            self._first_cut = self._first_cut or where

    def finish(self, *, rows: int, tokens: int, trained_tokens: int) -> DataStats:
        """Returns the statistics."""
        return DataStats(
            examples=self.examples,
            dropped=self._dropped,
            truncated=self._truncated,
            rows=rows,
            tokens=tokens,
            trained_tokens=trained_tokens,
            cut_answers=self._cut_answers,
            first_dropped=self._first_dropped,
            first_cut=self._first_cut,
        )
