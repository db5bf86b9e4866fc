"""A value head on a causal language model, beside its logits.

Legend: B rows, S tokens of a row (or of this rank's slice), H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from ulysses_monitor.common.patching import patch_method

__all__ = ["NAME", "ValueHead", "ValuedOutput", "add_value_head", "return_values"]

NAME = "v_head"
"""The module's name in the model, as in LLaMA-Factory and TRL."""


class ValueHead(nn.Module):
    """One number for each hidden state; 0 at first.

    It is not an `nn.Linear`, which `lora_target: all` would give an adapter.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, states: Tensor) -> Tensor:
        """Returns values [B, S] of hidden states [B, S, H]."""
        return states.to(self.weight.dtype) @ self.weight + self.bias


@dataclass
class ValuedOutput(FusedCausalLMOutput):
    """The output of TRL's fused head with the value of the state before each label.

    Attributes:
        token_values: as `log_probs`.
    """

    token_values: Tensor | None = None


def add_value_head(model: Any) -> None:
    """Adds a value head that is trained and saved with the model."""
    setattr(model, NAME, ValueHead(model.config.get_text_config().hidden_size, model.dtype))


def return_values(model: Any) -> None:
    """Makes a model with a value head and TRL's fused head return a `ValuedOutput`.

    Args:
        model: a causal language model of transformers, not the PEFT model around it.
    """

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return original(*args, **kwargs)
        states: list[Tensor] = []
        hook = model.base_model.register_forward_hook(
            lambda _module, _inputs, output: states.append(output.last_hidden_state)
        )
        try:
            output = original(*args, **kwargs)
        finally:
            hook.remove()
        values = getattr(model, NAME)(states[0])
        if kwargs.get("shift_labels") is None:
            values = values[:, :-1]  # the last token predicts none
        return ValuedOutput(**output, token_values=values)

    patch_method(model, "forward", wraps(model.forward)(forward))
