"""Models, batches and cases of the exactness tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    *("BETAS", "EPS", "LR", "MODELS", "ROWS", "STEPS", "Case", "batches", "llama"),
    "optimizer_for",
]

STEPS = 3
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
ROWS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    engine: str
    model: str = "toy"
    accumulate: int = 1
    clip: float = 0.0
    bits: str = "fp32"
    optimizer: str = "adamw"

    @property
    def label(self) -> str:
        parts = (self.engine, self.model, f"ga{self.accumulate}", f"clip{self.clip:g}")
        return "-".join((*parts, self.bits, self.optimizer))


class Toy(nn.Module):
    """Has odd sizes, a layer wider than a block of sums, a frozen part, an unused part, and a
    parameter of one element, of which only one rank holds something when it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 33)
        widths = (33, 31, 171, 33)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.unused = nn.Linear(5, 3)
        self.head = nn.Linear(33, 29)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = self.head(x + self.frozen(x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        return loss * self.gain.squeeze()


def toy() -> nn.Module:
    torch.manual_seed(0)
    return Toy()


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss


def llama(**config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=29, **(sizes | heads | config)))


def tied() -> nn.Module:
    """Ties embedding and head, and recomputes activations in the backward pass."""
    model = llama(tie_word_embeddings=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return _Loss(model.train())


def adapted(**settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(llama(), LoraConfig(**({"r": 3, "target_modules": targets} | settings)))
    stir(model)
    return _Loss(model)


def stir(model: nn.Module) -> None:
    """Starts with a B that is not zero, so that BA has a norm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.02)


def lora() -> nn.Module:
    return adapted()


def fresh_lora() -> nn.Module:
    """Starts as PEFT does: B = 0, so A gets no gradient at first."""
    from peft import LoraConfig, get_peft_model

    return _Loss(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"])))


def dora() -> nn.Module:
    return adapted(use_dora=True)


def rslora() -> nn.Module:
    return adapted(use_rslora=True, lora_alpha=5)


def embedding_lora() -> nn.Module:
    return adapted(target_modules=["q_proj", "embed_tokens"])


def two_adapters() -> nn.Module:
    """Trains and uses two adapters."""
    from peft import LoraConfig, get_peft_model

    first = LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), first, adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=7))
    model.base_model.set_adapter(["one", "two"])
    stir(model)
    return _Loss(model)


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (toy, tied, lora, fresh_lora, dora, rslora, embedding_lora, two_adapters)
}


def batches(step: int, world: int, accumulate: int) -> Tensor:
    """Returns token ids [world, accumulate, ROWS, 7]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 29, (world, accumulate, ROWS, 7), generator=generator)


def optimizer_for(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    """Makes two parameter groups with their own rates and decays, if the optimizer takes two."""
    trained = [p for p in model.parameters() if p.requires_grad]
    half = len(trained) // 2
    groups = [
        {"params": trained[:half], "lr": LR, "weight_decay": DECAY},
        {"params": trained[half:], "lr": LR / 4, "weight_decay": 0.0},
    ]
    common = {"betas": BETAS, "eps": EPS}
    if kind == "adamw":
        return torch.optim.AdamW(groups, **common)
    if kind in ("foreach", "fused"):
        return torch.optim.AdamW(groups, **common, **{kind: True})
    if kind == "adam":
        for group in groups:
            group["weight_decay"] = 0.0  # Adam adds it to the gradient that its moments see
        return torch.optim.Adam(groups, **common, amsgrad=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    if kind == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **common)
    raise ValueError(kind)
