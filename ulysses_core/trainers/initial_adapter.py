"""Keeps the adapter from which a training started, if its initialisation changed the base.

What the training saves at its end is then an adapter for the original base; see
`ulysses_core.lora.saved`. Checkpoints keep the trained adapter, because resuming changes the base
in the same way; their config names the initialisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ulysses_core.lora.saved import INITIAL, convert_adapter, mark_adapter
from ulysses_monitor.common.errors import InputError

__all__ = ["InitialAdapter"]

_WEIGHTS = "adapter_model.safetensors"
_REFERENCE = "ref"
"""Folder of the adapter that TRL keeps as the reference."""


class InitialAdapter(TrainerCallback):
    """Saves the initial adapter, marks checkpoints, and converts what is saved at the end.

    Args:
        run_dir: where the model is saved.
        init: the initialisation that changed the base.
    """

    def __init__(self, run_dir: Path, init: str) -> None:
        self._run_dir, self._init = run_dir, init

    def keep(self, model: Any) -> None:
        """Saves the adapter of `model`, or checks that a resumed run starts from the same one.

        Call it on the rank that saves, before an engine cuts the parameters.

        Raises:
            InputError: the run that is resumed started from another adapter.
        """
        folder = self._run_dir / INITIAL
        if (folder / _WEIGHTS).is_file():
            _check_same(model, folder)
            return
        model.save_pretrained(str(folder), selected_adapters=["default"])

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - transformers fixes the signature
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Writes the initialisation into a checkpoint's adapters."""
        if args.should_save:
            self._mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def finish(self) -> None:
        """Makes the saved adapter one for the original base."""
        self._mark(self._run_dir)
        convert_adapter(self._run_dir, self._run_dir / INITIAL, self._run_dir)

    def _mark(self, folder: Path) -> None:
        for place in (folder, folder / _REFERENCE):
            if (place / _WEIGHTS).is_file():
                mark_adapter(place, self._init)


def _check_same(model: Any, folder: Path) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    kept, made = load_file(folder / _WEIGHTS), get_peft_model_state_dict(model)
    close = kept.keys() == made.keys() and all(
        torch.allclose(kept[name].float(), made[name].float().cpu(), rtol=1e-3, atol=1e-6)
        for name in kept
    )
    if not close:
        raise InputError(
            f"resume_from_checkpoint: the run started from another adapter than this config "
            f"makes ({folder}); set seed, lora_rank and lora_init as they were"
        )
