"""What the stages that sample answers share: scores of rewards, and the sampler's probabilities.

Legend: B rows, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ulysses_core.rewards import Scorer
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import patch_method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LogProbRecorder",
    "measure_ratios",
    "record_log_probs",
    "score_together",
]


def score_together(scorers: Sequence[Scorer], **columns: Sequence[Any]) -> list[list[float | None]]:
    """Returns each reward's scores of this rank's rows; every rank calls it.

    Args:
        scorers: the rewards.
        columns: see `Scorer.score`.

    Raises:
        InputError: a reward fails on any rank; raised on all, so that none waits for another.
    """
    from accelerate.utils import gather_object

    problem, scores = None, []
    try:
        scores = [scorer.score(**columns) for scorer in scorers]
    except InputError as error:
        problem = str(error)
    found = [each for each in gather_object([problem]) if each is not None]
    if found:
        raise InputError(found[0])
    return scores


class LogProbRecorder:
    """A logits processor that keeps the log-probability of each sampled token."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Reads the token that was sampled last; leaves the logits [B, V] of the next one alone."""
        self._take(input_ids[:, -1])
        self._last = (scores / self._temperature).log_softmax(dim=-1)
        return scores

    def _take(self, tokens: Tensor) -> None:
        if self._last is not None:
            self._columns.append(self._last.gather(1, tokens.unsqueeze(1)))
            self._last = None

    def finish(self, input_ids: Tensor) -> None:
        """Reads the last sampled token of rows of prompts and answers."""
        self._take(input_ids[:, -1])

    def read(self, lengths: Sequence[int]) -> list[list[float]]:
        """Returns the log-probabilities of each answer's first tokens."""
        import torch

        rows = torch.cat(self._columns, dim=1).tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@contextmanager
def record_log_probs(model: Any, temperature: float) -> Iterator[LogProbRecorder]:
    """Records the log-probabilities of what `model.generate` samples, before top-k and top-p.

    Args:
        model: a model of transformers, not the PEFT model around it.
        temperature: what the sampler divides the logits by.
    """
    recorder = LogProbRecorder(temperature)

    def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers import LogitsProcessorList

        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or []), recorder])
        rows = original(*args, logits_processor=processors, **kwargs)
        recorder.finish(rows)
        return rows

    undo = patch_method(model, "generate", generate)
    try:
        yield recorder
    finally:
        undo()


def measure_ratios(
    trained: Tensor, old: Tensor, sampled: Tensor, mask: Tensor, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Compares the log-probabilities of trainer and sampler over all ranks' tokens.

    Args:
        trained: of the model that is trained, now [B, T].
        old: of the model that sampled, as the trainer computes it [B, T].
        sampled: of the same model, as the sampler computed it [B, T].
        mask: where answers are [B, T].
        gather: gathers a tensor [n] of each rank as [ranks * n].
    """
    import torch

    counted = mask.bool()
    gap = (old - sampled)[counted].abs().double()
    ratio = (trained - sampled)[counted].double().exp()
    inf = gap.new_full((1,), torch.inf)
    own = [gap.sum(), torch.cat([gap, -inf]).max(), ratio.sum()]
    own += [torch.cat([ratio, inf]).min(), torch.cat([ratio, -inf]).max(), counted.sum().double()]
    gaps, largest, ratios, low, high, counts = gather(torch.stack(own)).view(-1, len(own)).unbind(1)
    count = counts.sum().clamp(min=1)
    return {
        "sampling/sampling_logp_difference/mean": float(gaps.sum() / count),
        "sampling/sampling_logp_difference/max": float(largest.max()),
        "sampling/raw_importance_sampling_ratio/min": float(low.min()),
        "sampling/raw_importance_sampling_ratio/mean": float(ratios.sum() / count),
        "sampling/raw_importance_sampling_ratio/max": float(high.max()),
    }
