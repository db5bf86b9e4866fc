"""Several trainings in one process."""

from __future__ import annotations

import os

__all__ = ["forget_last_trainer"]


def forget_last_trainer() -> None:
    """accelerate keeps the first Trainer's engine for the life of the process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        del os.environ[name]
