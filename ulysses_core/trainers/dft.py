"""The loss of dynamic fine-tuning (arXiv 2508.05629): each token's loss times its probability.

Legend: B rows, S tokens.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dft_trainer_class"]


@cache
def dft_trainer_class() -> Any:
    """Returns transformers' Trainer with this loss. The model computes no logits of whole rows."""
    from transformers import Trainer
    from trl.trainer.utils import add_fused_lm_head

    from ulysses_core.parallel.supported import unwrap_peft

    class DftTrainer(Trainer):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            add_fused_lm_head(unwrap_peft(self.model))

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            outputs = model(**inputs, fused_lm_head=True)
            log_probs = outputs.log_probs  # [B, S - 1], 0 where there is no label
            weighted = -(log_probs * log_probs.detach().exp()).sum()
            if num_items_in_batch is None:
                loss = weighted / outputs.label_mask.sum().clamp(min=1)
            else:
                # The count is of the world's batch, and engines average over its ranks.
                ranks = self.accelerator.num_processes // self.get_tp_size()
                loss = weighted * ranks / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    return DftTrainer
