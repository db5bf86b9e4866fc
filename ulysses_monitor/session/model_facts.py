"""What transformers models and tokenizers say of themselves: vocabulary, special tokens, ties."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["chance_loss", "count_untied", "end_tokens", "special_tokens"]


def chance_loss(model: nn.Module) -> float:
    """Returns the cross-entropy of a uniform guess over the vocabulary; NaN if it is not known."""
    base = _base(model)
    head = getattr(base, "get_output_embeddings", None)
    read = getattr(getattr(base, "config", None), "get_text_config", None)
    if head is None or read is None or head() is None:  # a model without a language head
        return math.nan
    size = getattr(read(), "vocab_size", None)
    return math.log(size) if isinstance(size, int) and size > 1 else math.nan


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text; none if the model does not say."""
    base = _base(model)
    configs = (getattr(base, name, None) for name in ("config", "generation_config"))
    given = [getattr(config, "eos_token_id", None) for config in configs]
    listed = [ids if isinstance(ids, list | tuple) else [ids] for ids in given]
    return tuple(dict.fromkeys(i for ids in listed for i in ids if isinstance(i, int)))


def special_tokens(tokenizer: Any) -> tuple[int, ...] | None:
    """Returns the ids of special tokens, also of those that have no role such as ``eos_token``.

    Args:
        tokenizer: a tokenizer of transformers, or a processor that has one.

    Returns:
        None if it is something else.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    roles = getattr(inner, "all_special_ids", None)
    if not isinstance(roles, list | tuple):
        return None
    added = getattr(inner, "added_tokens_decoder", {}).items()
    return tuple(sorted({*roles, *(i for i, token in added if token.special)}))


def count_untied(model: nn.Module) -> int | None:
    """Counts trained weights that should be one with another and are not; None if none should.

    transformers 5 keeps which ones should, under the names that they have in the model.
    """
    base = _base(model)
    ties = getattr(base, "all_tied_weights_keys", None)
    if not isinstance(ties, Mapping) or not ties:
        return None
    return sum(_is_untied(*pair) for pair in _pairs(base, ties))


def _pairs(base: nn.Module, ties: Mapping[str, str]) -> Iterator[tuple[nn.Parameter, ...]]:
    for names in ties.items():
        try:
            yield tuple(base.get_parameter(name) for name in names)
        except AttributeError:  # an adapter stands in its place
            continue


def _is_untied(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one is not other and (one.requires_grad or other.requires_grad)


def _base(model: nn.Module) -> Any:
    """Returns the model inside PEFT's."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
