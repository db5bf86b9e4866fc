"""A stage that is stopped between two checkpoints and resumed, or trained without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.forget import forget_last_trainer
from tests.support.parity_cases import ParityCase, build
from tests.support.sequence_cases import weights_of

__all__ = ["STEPS", "train_part"]

STEPS = 4


def train_part(settings: dict[str, Any], folder: str, output: str, part: str) -> dict[str, Any]:
    """The child: trains `all` steps, or what is `before` or `after` the break.

    The break comes after step 3; the checkpoint is of step 2.
    """
    from transformers import TrainerCallback

    import ulysses_core as uc
    from ulysses_core.trainers.deepspeed import load_checkpoints_safely

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= part == "before" and state.global_step == 3

    case = ParityCase(**settings)
    changes = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
    trainer = build(case, folder, **changes)
    trainer.args.output_dir = output
    trainer.add_callback(Break())
    load_checkpoints_safely(trainer)
    uc.sequence_parallel(trainer, case.size)
    resume = str(Path(output, "checkpoint-2")) if part == "after" else None
    trainer.train(resume_from_checkpoint=resume)
    weights = weights_of(trainer.accelerator.unwrap_model(trainer.model))
    step = trainer.state.global_step
    forget_last_trainer()
    return {"weights": weights, "step": step}
