"""A set of token ids that is looked up where the tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["TokenSet"]


class TokenSet:
    """A set of token ids; false if it is empty.

    `torch.isin` would make the host wait for a GPU if there are more than some dozen ids.

    Args:
        ids: the ids; negative ones stand for none, as in some configs.
    """

    def __init__(self, ids: Sequence[int] = ()) -> None:
        ids = [i for i in ids if i >= 0]
        self._others = max(ids, default=-1) + 1
        self._has = torch.zeros(self._others + 1, dtype=torch.bool)
        self._has[ids] = True

    def __bool__(self) -> bool:
        return self._others > 0

    def has(self, tokens: Tensor) -> Tensor:
        """Returns which of `tokens` are in the set; labels that are ignored are not."""
        self._has = self._has.to(tokens.device)
        is_other = (tokens < 0) | (tokens > self._others)
        return self._has[tokens.masked_fill(is_other, self._others).long()]
