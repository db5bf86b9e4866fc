"""The training arguments of PPO."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig

__all__ = ["PPOConfig"]


@dataclass
class PPOConfig(GRPOConfig):
    """TRL's arguments of sampling, for one answer to a prompt, which GRPO does not have."""

    def __post_init__(self) -> None:
        super(GRPOConfig, self).__post_init__()
        self.num_generations, self.num_generations_eval = 1, 1
        self.pad_to_multiple_of = None
        rows = self.per_device_train_batch_size * self.world_size
        self.generation_batch_size = rows * (self.steps_per_generation or 1)
