"""About how much memory a step takes on one process, before anything is started.

Activations are counted as the tensors that a transformer layer's backward pass needs, by what is
common to Llama-like models; the truth differs by some tens of percent with kernels and model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Footprint", "what_fits"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What memory depends on.

    Attributes:
        total: parameters.
        trained: those that are trained.
        processes: over which ZeRO shares states.
        stage: of ZeRO; 0 without.
        master: whether float32 masters are kept beside the weights.
        width: bytes of a weight, an activation and a gradient.
        tokens: of a micro-batch on one process, after rows are shared out.
        layers: number of layers.
        hidden: hidden size.
        inner: width inside an MLP.
        heads: width of all query heads together.
        key_heads: width of all key/value heads together.
        vocabulary: number of logits.
        checkpointing: whether layers keep their input alone.
        offload_checkpoints: whether that lies in the host's memory.
        loss_chunk: tokens whose logits are there at a time; None for all.
        mlp_chunk: tokens in an MLP at a time; None for all.
    """

    total: int
    trained: int
    processes: int
    stage: int
    master: bool
    width: int
    tokens: int
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    checkpointing: bool = False
    offload_checkpoints: bool = False
    loss_chunk: int | None = None
    mlp_chunk: int | None = None

    @classmethod
    def of(cls, model: Any, **settings: Any) -> Footprint:
        """From a transformers model, whose weights need not be there, and settings."""
        config = model.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            total=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=config.num_attention_heads * width,
            key_heads=key_heads * width,
            vocabulary=config.vocab_size,
            **settings,
        )

    def states(self) -> int:
        """Bytes of weights, gradients and Adam's states.

        ZeRO-1 shares out the optimizer's float32 weights and moments, ZeRO-2 the gradients too,
        ZeRO-3 the weights too (arXiv 1910.02054).
        """
        shared = self.processes
        weights = self.total * self.width // (shared if self.stage >= 3 else 1)
        gradients = self.trained * self.width // (shared if self.stage >= 2 else 1)
        moments = self.trained * (12 if self.master else 8) // (shared if self.stage >= 1 else 1)
        return weights + gradients + moments

    def activations(self) -> int:
        """Bytes that are kept from forward to backward pass."""
        if self.checkpointing:
            layers = 1 if self.offload_checkpoints else self.layers
            return layers * self.hidden * self.tokens * self.width
        inside = 0 if self.mlp_chunk else self._inside()
        return self.layers * (self._outside() + inside)

    def at_work(self) -> int:
        """Bytes of the one layer whose backward pass is under way, where it was not kept whole."""
        inside = self._inside()
        if self.mlp_chunk:
            inside = inside * min(self.mlp_chunk, self.tokens) // self.tokens
        if self.checkpointing:
            return self._outside() + inside
        return inside if self.mlp_chunk else 0

    def _outside(self) -> int:
        """Of a layer, what is kept beside the MLP's inside: norms, q, k, v and attention."""
        return (6 * self.hidden + 4 * self.heads + 6 * self.key_heads) * self.tokens * self.width

    def _inside(self) -> int:
        return 4 * self.inner * self.tokens * self.width

    def logits(self) -> int:
        """Bytes of logits in their own precision and in float32, with a gradient."""
        at_a_time = min(self.loss_chunk or self.tokens, self.tokens)
        chunked = 4 * self.vocabulary * self.hidden if self.loss_chunk else 0
        return at_a_time * self.vocabulary * (self.width + 8) + chunked

    def whole(self) -> int:
        """At its highest: logits are gone when a layer's backward pass begins."""
        return self.states() + self.activations() + max(self.logits(), self.at_work())


def what_fits(need: Footprint, room: int, *, on_gpu: bool) -> list[str]:
    """Settings to switch on, each beside those before it, until `need` fits into `room` bytes.

    Returns:
        As they are written in a config, and last what to do where all of it does not help.
    """
    steps: list[tuple[str, dict[str, Any]]] = [
        ("gradient_checkpointing=true", {"checkpointing": True}),
        ("loss_chunk=1024", {"loss_chunk": 1024}),
        ("mlp_chunk=4096", {"mlp_chunk": 4096}),
    ]
    if on_gpu:
        steps.append(("offload_checkpoints=true", {"offload_checkpoints": True}))
    if need.processes > 1:
        steps += [(f"deepspeed=zero{s}", {"stage": s, "master": True}) for s in (2, 3)]
    advice: list[str] = []
    for name, change in [*steps, *steps]:  # what does not help first may do so after another
        if need.whole() <= room:
            return advice
        better = replace(need, **change)
        if better.whole() < need.whole():
            need = better
            key = name.split("=")[0]
            advice = [a for a in advice if a.split("=")[0] != key] + [name]
    if need.whole() > room:
        advice.append("a larger sequence_parallel_size, LoRA, zero3-offload, a shorter cutoff_len")
    return advice
