"""Estimates the memory that a step needs on one process, before training starts.

Activations are the tensors that the backward pass of a Llama-like transformer layer needs. Other
models and kernels can differ from the estimate by some tens of percent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Footprint", "suggest_settings"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The sizes and settings that determine memory.

    Attributes:
        parameters: number of parameters.
        trained_parameters: number of trained parameters.
        processes: processes over which ZeRO shards states.
        zero_stage: ZeRO stage; 0 without ZeRO.
        has_master_weights: whether the optimizer keeps float32 copies of the weights.
        element_size: bytes of an element of weights, activations and gradients.
        tokens: tokens of a micro-batch on one process; with sequence parallelism, of its slices.
        layers: number of layers.
        hidden_size: hidden size.
        intermediate_size: intermediate size of the MLPs.
        query_size: number of query heads times their width.
        key_size: number of key/value heads times their width.
        vocab_size: number of logits of a token.
        checkpointing: whether layers store only their input.
        offload_checkpoints: whether these inputs are in host memory.
        loss_chunk: tokens whose logits are computed at a time; None for all.
        mlp_chunk: tokens that an MLP processes at a time; None for all.
    """

    parameters: int
    trained_parameters: int
    processes: int
    zero_stage: int
    has_master_weights: bool
    element_size: int
    tokens: int
    layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    vocab_size: int
    checkpointing: bool = False
    offload_checkpoints: bool = False
    loss_chunk: int | None = None
    mlp_chunk: int | None = None

    @classmethod
    def from_model(cls, model: Any, **settings: Any) -> Footprint:
        """Reads the sizes of a transformers model, which may be on the meta device."""
        config = model.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            query_size=config.num_attention_heads * width,
            key_size=key_heads * width,
            vocab_size=config.vocab_size,
            **settings,
        )

    def state_bytes(self) -> int:
        """Returns the bytes of weights, gradients and Adam's states.

        ZeRO-1 shards the optimizer's float32 weights and moments, ZeRO-2 also the gradients, and
        ZeRO-3 also the weights (arXiv 1910.02054).
        """
        weights = self.parameters * self.element_size // self._shards(3)
        gradients = self.trained_parameters * self.element_size // self._shards(2)
        optimizer_bytes = 12 if self.has_master_weights else 8
        optimizer_states = self.trained_parameters * optimizer_bytes // self._shards(1)
        return weights + gradients + optimizer_states

    def _shards(self, first_stage: int) -> int:
        return self.processes if self.zero_stage >= first_stage else 1

    def activation_bytes(self) -> int:
        """Returns the bytes stored between the forward and the backward pass."""
        if self.checkpointing:
            layers = 1 if self.offload_checkpoints else self.layers
            return layers * self.hidden_size * self.tokens * self.element_size
        mlp = 0 if self.mlp_chunk else self._mlp_bytes()
        return self.layers * (self._attention_bytes() + mlp)

    def recomputed_bytes(self) -> int:
        """Returns the bytes that the backward pass of a layer recomputes before it uses them."""
        mlp = self._mlp_bytes()
        if self.mlp_chunk:
            mlp = mlp * min(self.mlp_chunk, self.tokens) // self.tokens
        if self.checkpointing:
            return self._attention_bytes() + mlp
        return mlp if self.mlp_chunk else 0

    def _attention_bytes(self) -> int:
        """A layer's activations outside the MLP: norms, q, k, v and attention."""
        width = 6 * self.hidden_size + 4 * self.query_size + 6 * self.key_size
        return width * self.tokens * self.element_size

    def _mlp_bytes(self) -> int:
        return 4 * self.intermediate_size * self.tokens * self.element_size

    def logit_bytes(self) -> int:
        """Returns the bytes of logits in their own precision and in float32, with a gradient."""
        tokens = min(self.loss_chunk or self.tokens, self.tokens)
        weight_gradient = 4 * self.vocab_size * self.hidden_size if self.loss_chunk else 0
        return tokens * self.vocab_size * (self.element_size + 8) + weight_gradient

    def peak_bytes(self) -> int:
        """Returns the bytes at the peak; logits are freed before a layer's backward pass."""
        temporary = max(self.logit_bytes(), self.recomputed_bytes())
        return self.state_bytes() + self.activation_bytes() + temporary


def suggest_settings(need: Footprint, available: int, *, on_gpu: bool) -> list[str]:
    """Suggests settings, each on top of the previous ones, until `need` fits in memory.

    Args:
        need: the footprint with the current settings.
        available: bytes of memory.
        on_gpu: whether training runs on a GPU.

    Returns:
        Settings as in a config. If they are not enough, the last item says what else to change.
    """
    steps: list[tuple[str, dict[str, Any]]] = [
        ("gradient_checkpointing=true", {"checkpointing": True}),
        ("loss_chunk=1024", {"loss_chunk": 1024}),
        ("mlp_chunk=4096", {"mlp_chunk": 4096}),
    ]
    if on_gpu:
        steps.append(("offload_checkpoints=true", {"offload_checkpoints": True}))
    if need.processes > 1:
        for stage in (2, 3):
            sharding = {"zero_stage": stage, "has_master_weights": True}
            steps.append((f"deepspeed=zero{stage}", sharding))
    advice: list[str] = []
    for name, change in [*steps, *steps]:  # a setting may help only after another one
        if need.peak_bytes() <= available:
            return advice
        better = replace(need, **change)
        if better.peak_bytes() < need.peak_bytes():
            need = better
            key = name.split("=")[0]
            advice = [a for a in advice if a.split("=")[0] != key] + [name]
    if need.peak_bytes() > available:
        advice.append("a larger sequence_parallel_size, LoRA, zero3-offload, a smaller cutoff_len")
    return advice
