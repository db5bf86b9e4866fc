"""Small trainings with transformers' and TRL's Trainers, which reported bugs are put into."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ulysses_monitor as um
from benchmarks.faults.model import VOCABULARY, Texts
from benchmarks.faults.training import IGNORED, Recorded, Setting
from ulysses_monitor.sinks.memory import MemorySink

__all__ = ["MOVES", "NOT_MONITORED", "HFTraining", "adamw"]

NOT_MONITORED = "monitor"
"""Stands for a rule where the monitor refuses a training with a line that says what is wrong."""

MOVES = 2
"""First step that should move weights: the warm-up begins at a rate of 0."""

Model = Any
Trainer = Any


@dataclass
class HFTraining:
    """A training of a small Llama; a bug changes its attributes before `run`.

    Attributes:
        lora: rank of the adapters; 0 trains all weights.
        targets: modules that get adapters.
        config: further settings of the model.
        arguments: further arguments of the Trainer.
        on_model: changes the model before the Trainer is made; may return another.
        optimizer: makes the optimizer; the Trainer's own if None.
        trainer_class: makes the Trainer's class of transformers'.
        on_trainer: changes the Trainer before it trains.
        rows: makes the data set of rows of tokens [N, T]; may return other columns.
        trains: trains with the Trainer.
    """

    setting: Setting
    lora: int = 0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    on_model: Callable[[Model], Model | None] | None = None
    optimizer: Callable[[Model], torch.optim.Optimizer] | None = None
    trainer_class: Callable[[type[Any]], type[Any]] | None = None
    make: Callable[[HFTraining, Model, Any, Path], Trainer] | None = None
    on_trainer: Callable[[Trainer], None] | None = None
    trains: Callable[[HFTraining, Trainer, Path], object] | None = None

    def run(self) -> Recorded:
        """Trains, and returns what was recorded."""
        from datasets import disable_progress_bars

        disable_progress_bars()
        torch.manual_seed(self.setting.seed)
        sink = MemorySink()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            monitor = um.Monitor(
                folder / "run", sinks=[sink], rules="off", tensorboard=False, sample_every=1
            )
            trainer = self.build(folder)
            monitor.attach(trainer)
            try:
                train = self.trains or (lambda _, trainer, __: trainer.train())
                train(self, trainer, folder)
            except um.UlyssesError as error:
                return Recorded(sink.records, refused=str(error))
        return Recorded(sink.records)

    # -- building --------------------------------------------------------------------------------

    def build(self, folder: Path) -> Trainer:
        """Returns a Trainer of a new model."""
        from transformers import PrinterCallback

        model = self.model()
        if self.on_model is not None:
            model = self.on_model(model) or model
        rows = self.rows()
        trainer = (self.make or _make)(self, model, rows, folder)
        trainer.remove_callback(PrinterCallback)
        if self.on_trainer is not None:
            self.on_trainer(trainer)
        return trainer

    def model(self) -> Model:
        """Returns a small Llama, with adapters if there are any."""
        from transformers import LlamaConfig, LlamaForCausalLM

        width, layers = self.setting.width, self.setting.layers
        settings: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "initializer_range": 0.05,
        }
        model: Any = LlamaForCausalLM(LlamaConfig(**settings | self.config))
        if self.lora:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=self.lora, lora_alpha=2 * self.lora, target_modules=list(self.targets)
            )
            model = get_peft_model(model, config)
        return model

    def rows(self) -> list[dict[str, list[int]]]:
        """Returns rows of a language; a quarter of each is its prompt, without labels."""
        setting = self.setting
        draw = torch.Generator().manual_seed(setting.seed)
        rows = Texts(setting.seed).rows(512, setting.length, draw).tolist()
        prompt = setting.length // 4
        return [
            {
                "input_ids": row,
                "labels": [IGNORED] * prompt + row[prompt:],
                "attention_mask": [1] * len(row),
            }
            for row in rows
        ]

    def trainer_arguments(self, folder: Path) -> dict[str, Any]:
        """Returns the arguments that all Trainers get."""
        return {
            "output_dir": str(folder / "output"),
            "per_device_train_batch_size": self.setting.batch,
            "max_steps": self.setting.steps,
            "learning_rate": self.setting.rate,
            "warmup_steps": 3,
            "max_grad_norm": self.setting.clip,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": self.setting.seed,
            **self.arguments,
        }


def _make(training: HFTraining, model: Model, rows: Any, folder: Path) -> Trainer:
    from transformers import Trainer, TrainingArguments, default_data_collator

    kind = Trainer if training.trainer_class is None else training.trainer_class(Trainer)
    optimizer = None if training.optimizer is None else training.optimizer(model)
    return kind(
        model=model,
        args=TrainingArguments(**training.trainer_arguments(folder)),
        train_dataset=rows,
        eval_dataset=rows[:16],
        data_collator=default_data_collator,
        optimizers=(optimizer, None),
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Returns an AdamW of all parameters."""
    return torch.optim.AdamW(model.parameters(), 3e-3)
