"""`UlyssesTrainingManager`: trains one run from a config, for the CLI and for Python alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ulysses_core.config import RunConfig
from ulysses_core.data import load_datasets
from ulysses_core.trainers.answering import (
    check_answers,
    compare_in_evaluations,
    record_answers,
)
from ulysses_core.trainers.stage import Parts, find_stage, load_config
from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.launch import launched_rank
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.session.naming import check_run_dir, stamp_run_dir
from ulysses_monitor.session.settings import WhenTaken
from ulysses_monitor.sinks import Sink

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

    from ulysses_core.trainers.initial_adapter import InitialAdapter
    from ulysses_monitor.monitor import Monitor

__all__ = ["UlyssesTrainingManager"]

logger = logging.getLogger(__name__)

State = Literal["created", "ready", "running", "finished", "failed", "stopped"]


class UlyssesTrainingManager:
    """Trains one run; in a distributed run every process makes its own manager.

    Use it as a context manager, or call `cleanup` at the end::

        with UlyssesTrainingManager("examples/sft.yaml") as manager:
            manager.run_training()

    Args:
        config: a config file, or a validated config.
        overrides: ``key=value`` overrides of a config file.
        sinks: more sinks for the monitor.

    Raises:
        InputError: the config is wrong.
    """

    def __init__(
        self,
        config: str | Path | RunConfig,
        overrides: Iterable[str] = (),
        *,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.config = (
            config if isinstance(config, RunConfig) else load_config(Path(config), overrides)
        )
        self._sinks = sinks
        self._state: State = "created"
        self.run_dir: Path | None = None
        self.trainer: Trainer | None = None
        self._undos: list[Undo] = []
        self._monitor: Monitor | None = None
        self._initial: InitialAdapter | None = None

    def __enter__(self) -> Self:
        self.initialize()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cleanup()

    def initialize(self) -> None:
        """Loads data and model, builds the trainer, and attaches the monitor.

        A second call does nothing.

        Raises:
            InputError: data, model or settings are wrong.
        """
        if self._state != "created":
            return
        from ulysses_core.trainers.deepspeed import prepare_environment

        # Before transformers is imported, which imports DeepSpeed.
        prepare_environment(uses_deepspeed=self.config.deepspeed is not None)
        self.trainer = self._build_trainer()
        self._patch_trainer(self.trainer)
        self._monitor = self._attach_monitor()
        self._state = "ready"

    def _build_trainer(self) -> Trainer:
        from ulysses_core.trainers.arguments import build_training_arguments
        from ulysses_core.trainers.build import (
            build_model,
            build_reference,
            build_tokenizer,
        )
        from ulysses_core.trainers.init_rows import read_init_rows

        config, stage = self.config, find_stage(self.config.finetuning.stage)
        args = build_training_arguments(config, *stage.make_arguments(config))
        self.run_dir = config.settings.output_dir or _agreed_default_dir(config.name, args.device)
        args.output_dir = str(self.run_dir)
        if config.settings.monitor.enabled and launched_rank() == 0:
            check_run_dir(self.run_dir, self._when_taken())
        check_answers(config)
        tokenizer = build_tokenizer(config.model)
        seed = args.data_seed if args.data_seed is not None else args.seed
        data = load_datasets(config.data, stage, tokenizer, seed, args.device)
        if not config.settings.do_train:
            data = replace(data, train=data.eval)  # TRL's trainers want one
        if data.train is None:
            raise InputError("dataset is not set; set it to a name in dataset_info.json")
        args.eval_on_start = config.training.get("eval_on_start", data.eval is not None)
        model = (config, tokenizer, stage.task, args.device)
        return stage.build_trainer(
            Parts(
                config=config,
                args=args,
                model=build_model(*model, read_init_rows(config, data.train)),
                tokenizer=tokenizer,
                data=data,
                make_reference=lambda: build_reference(*model),
            )
        )

    def _patch_trainer(self, trainer: Trainer) -> None:
        """Adds safe loading, memory savings and sequence parallelism; `cleanup` undoes them."""
        from ulysses_core.memory import save_memory
        from ulysses_core.parallel import sequence_parallel
        from ulysses_core.trainers.deepspeed import load_checkpoints_safely
        from ulysses_core.trainers.optimizers import use_loraplus

        settings, finetuning = self.config.settings, self.config.finetuning
        self._undos.append(load_checkpoints_safely(trainer))
        if finetuning.loraplus_lr_ratio is not None:
            self._undos.append(use_loraplus(trainer, finetuning))
        self._initial = self._add_callbacks(trainer)
        memory = save_memory(
            trainer,
            loss_chunk=settings.loss_chunk,
            mlp_chunk=settings.mlp_chunk,
            offload=settings.offload_checkpoints,
        )
        self._undos.append(memory.restore)
        parallel = sequence_parallel(
            trainer, settings.sequence_parallel_size, check_family=settings.check_family
        )
        self._undos.append(parallel.restore)
        if self.config.answers.predict_with_generate:
            self._undos.append(compare_in_evaluations(trainer, self.config))

    def _add_callbacks(self, trainer: Trainer) -> InitialAdapter | None:
        from transformers import EarlyStoppingCallback

        from ulysses_core.trainers.initial_adapter import InitialAdapter

        finetuning, names = self.config.finetuning, self.config.model.adapter_name_or_path
        if finetuning.early_stopping_steps is not None:
            trainer.add_callback(EarlyStoppingCallback(finetuning.early_stopping_steps))
        if not finetuning.changes_base or (names and not finetuning.create_new_adapter):
            return None
        assert self.run_dir is not None  # noqa: S101 - set by initialize
        initial = InitialAdapter(self.run_dir, finetuning.init)
        trainer.add_callback(initial)
        return initial

    def _attach_monitor(self) -> Monitor | None:
        settings = self.config.settings
        if not settings.monitor.enabled:
            return None
        from ulysses_core.trainers.stderr import KeepStderr
        from ulysses_monitor.monitor import Monitor

        assert self.run_dir is not None  # noqa: S101 - set by initialize
        monitor_settings = dict(settings.monitor.model_dump(exclude={"enabled"}))
        monitor_settings["sinks"] = [*self._sinks, *settings.monitor.sinks]
        # Checkpoints and the model go there as well, so the run never moves beside it.
        monitor_settings["if_exists"] = self._when_taken()
        monitor = Monitor(self.run_dir, config=self.config.raw, **monitor_settings)
        monitor.attach(self.trainer)
        assert self.trainer is not None  # noqa: S101 - set by initialize
        self.trainer.add_callback(KeepStderr(monitor))  # after the monitor's own
        if self.config.answers.sample_answers_every is not None:
            record_answers(self.trainer, monitor, self.config)
        return monitor

    def _when_taken(self) -> WhenTaken:
        if self.config.training.get("resume_from_checkpoint"):
            return "resume"
        return "overwrite" if self.config.settings.overwrite_output_dir else "refuse"

    def run_training(self) -> dict[str, Any]:
        """Trains and saves the model; with held-out data, evaluates before and after.

        Returns:
            The status after training, as from `get_status`.

        Raises:
            TrainingStoppedError: a policy or a user stopped the run; the model trained so
                far is saved.
        """
        self.initialize()
        trainer = self.trainer
        assert trainer is not None  # noqa: S101 - initialize made it
        self._state = "running"
        try:
            if self.config.settings.do_train:
                self._train(trainer)
            else:
                trainer.save_metrics("eval", trainer.evaluate())
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt | SystemExit)
            self._state = "stopped" if is_interrupt else "failed"
            raise
        self._state = "finished"
        if self._monitor is not None and (reason := self._monitor.stopped):
            self._state = "stopped"
            raise TrainingStoppedError(reason)
        return self.get_status()

    def _train(self, trainer: Trainer) -> None:
        keeps = self._initial if trainer.args.should_save else None
        if keeps is not None:
            keeps.keep(trainer.model)
        trainer.train(resume_from_checkpoint=self.config.training.get("resume_from_checkpoint"))
        trainer.save_model()
        if keeps is not None:
            keeps.finish()
        trainer.save_state()

    def get_status(self) -> dict[str, Any]:
        """Returns state, run directory, step, number of steps and the latest logged values."""
        status: dict[str, Any] = {"state": self._state, "run_dir": self.run_dir}
        if self.trainer is not None:
            state = self.trainer.state
            status |= {"step": state.global_step, "max_steps": state.max_steps}
            status["log"] = state.log_history[-1] if state.log_history else {}
        return status

    def cleanup(self) -> None:
        """Finishes the run's records and undoes all patches; a second call does nothing."""
        if self._monitor is not None:
            self._monitor.close(self._state if self._state in ("finished", "stopped") else "failed")
            self._monitor.detach()
            self._monitor = None
        undo_all(self._undos)


def _agreed_default_dir(name: str, device: torch.device) -> Path:
    """Returns ``runs/<name>-<time>`` with rank 0's time, so all ranks get the same directory."""
    import torch
    import torch.distributed as dist

    now = torch.tensor([int(time.time())], device=device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(now, src=0)
    return stamp_run_dir(name, int(now.item()))
