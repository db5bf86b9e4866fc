"""Answers prompts with a causal language model, on one process or on several that share weights.

Legend: B prompts, S tokens of the longest prompt, N answers a prompt, T tokens of the longest
answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ulysses_core.data.templates import get_template

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = [
    "Sampling",
    "answer_prompts",
    "gather_to_generate",
    "keep_random_state",
    "stop_tokens",
]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample answers.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        num_answers: answers a prompt.
        temperature: divides the logits; 0 always takes the most probable token.
        top_p: sample from the most probable tokens that together have this probability.
        top_k: sample from this many tokens; 0 for all.
    """

    max_new_tokens: int
    num_answers: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def answer_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stops: Sequence[int],
) -> Tensor:
    """Answers one batch of prompts; random numbers come from torch's global generator.

    If processes share the weights (ZeRO-3, FSDP2), transformers lets them generate together, each
    until the longest answer of all ends; each must then call this equally often.

    Args:
        model: a causal language model of transformers, with or without adapters, as the engine cut
            it; it may be in training, and is again after it.
        tokenizer: gives the pad token.
        prompts: B lists of at most S token ids.
        sampling: how to sample.
        stops: tokens that end an answer.

    Returns:
        Token ids [B * N, T] without the prompts; the N answers of a prompt follow one another, and
        what comes after a stop token is padding.
    """
    ids, mask = _pad_left(prompts, int(tokenizer.pad_token_id or 0), model.device)
    # Not `generation_config`: the model's own would fill in what is not set, such as a penalty.
    config = _generation_config(sampling, int(tokenizer.pad_token_id or 0), stops)
    _fit_positions(config, model, ids.shape[1])
    was_training = model.training
    gather_to_generate(model)
    model.eval()
    try:
        with torch.no_grad(), _own_defaults(model):
            output: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
            )
    finally:
        model.train(was_training)
    return output[:, ids.shape[1] :]


def gather_to_generate(model: Any) -> None:
    """Makes `generate` of a PEFT model under FSDP2 gather the weights outside the layers.

    FSDP2 gathers them in the outermost model's `forward`, which PEFT's `generate` goes around.

    Args:
        model: the outermost model, as FSDP2 cut it.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    if hasattr(model, "get_base_model") and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")


def _pad_left(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _generation_config(sampling: Sampling, pad: int, stops: Sequence[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    is_random = sampling.temperature > 0
    drawn = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    config: GenerationConfig = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.num_answers,
        do_sample=is_random,
        pad_token_id=pad,
        eos_token_id=list(stops) or None,
        use_cache=True,  # a training switches it off in the model's config
        **(drawn if is_random else {}),
    )
    return config


def _fit_positions(config: GenerationConfig, model: Any, length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        config.max_new_tokens = max(1, min(config.max_new_tokens, positions - length))


@contextmanager
def _own_defaults(model: Any) -> Iterator[None]:
    """Keeps transformers from filling in what the model's own generation config has."""
    from transformers import GenerationConfig

    models = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [each.generation_config for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, config in zip(models, before, strict=True):
            each.generation_config = config


def stop_tokens(tokenizer: PreTrainedTokenizerBase, template: str | None, model: Any) -> list[int]:
    """Returns the tokens that end an answer, wherever one is sampled.

    These are the eos token and the stop of the named template; without a template, which says it,
    the tokens that the model's own generation config names.
    """
    stops = {tokenizer.eos_token_id}
    if template is None:
        own = model.generation_config.eos_token_id
        stops |= set(own) if isinstance(own, list) else {own}
    elif stop := get_template(template).stop:
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        stops |= set(ids) if len(ids) == 1 else set()
    return sorted(int(token) for token in stops - {None})


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch, on the CPU and on devices."""
    python, host, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - what dropout and collators draw from
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    states = None if device is None else torch.get_device_module(device).get_rng_state_all()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(host)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if device is not None:
            torch.get_device_module(device).set_rng_state_all(states)
