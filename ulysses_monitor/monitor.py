"""The monitor: how a training is watched, and the ways to attach it to one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.common.validation import validate
from ulysses_monitor.engines import Engine, find_engine
from ulysses_monitor.engines.support import is_compiled
from ulysses_monitor.session.model_facts import special_tokens
from ulysses_monitor.session.open_sessions import choose_first_dir, start_session
from ulysses_monitor.session.opening import Ended, Training, describe_model
from ulysses_monitor.session.places import choose_place
from ulysses_monitor.session.plain_loop import PlainLoop
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.session import Session
from ulysses_monitor.session.settings import MonitorSettings, signature_of

__all__ = ["Monitor"]


class Monitor:
    """Watches trainings and records each in a run directory.

    Attach it to a Trainer, or watch a plain loop. One monitor serves one training after another:
    the first is recorded in `run_dir`, or beside it as ``-2`` if that holds a run; then ``-3``, ...

    Args:
        run_dir: such as ``runs/demo``; default ``runs/<script>-<time>``, printed on standard error.
        shadow: policies decide and are recorded, and touch nothing.
        config: what you configured, for run.json.
        settings: fields of `MonitorSettings`: `sinks`, `rules`, `policies`, `probes`,
            `tensorboard`, `mirror`, `sample_every`, `rows`, `if_exists`, `seed`.

    Raises:
        InputError: a setting is wrong.
    """

    __signature__: ClassVar[inspect.Signature]
    """With each setting by name, for help() and completion."""

    def __init__(
        self,
        run_dir: str | Path | None = None,
        *,
        shadow: bool = False,
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if shadow:
            settings = {"mode": "shadow", **settings}
        self.settings = validate(MonitorSettings, settings, "monitor")
        self._first_dir = choose_first_dir(run_dir, self.settings.if_exists)
        self._parts = self.settings.make_parts()
        self._config = dict(config or {})
        self._latest: Session | Ended | None = None
        self._policy_state: bytes | None = None
        self._undos: list[Undo] = []

    # -- attaching ---------------------------------------------------------------------------

    def attach(self, trainer: Any) -> None:
        """Watches a Hugging Face or TRL Trainer, until `detach`.

        Raises:
            InputError: `trainer` is not a `transformers.Trainer`.
        """
        from ulysses_monitor.integrations.attaching import attach  # it imports transformers

        self._undos.append(attach(self, trainer))

    def detach(self) -> None:
        """Leaves every Trainer that `attach` was given; ends an open run."""
        self.close("stopped")
        undo_all(self._undos)

    @contextmanager
    def watch(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        scaler: Any = None,
        step: int = 0,
        max_steps: int | None = None,
        save: Callable[[int], object] | None = None,
        loader: Any = None,
        tokenizer: Any = None,
    ) -> Iterator[Monitor]:
        """Watches a plain loop: inside, every ``optimizer.step()`` is one step.

        Give the loss with `observe`. torch's and accelerate's clipping functions are seen; call
        `before_clip` if the loop clips gradients by hand. If a policy or a person stops the
        training, the loop is left at the end of the step, the code after the ``with`` block runs,
        and `stopped` says why.

        Args:
            model: a module, a DDP or FSDP2 module, compiled or not, or a DeepSpeed engine.
            optimizer: the optimizer, or accelerate's wrapper of it; DeepSpeed brings its own.
            scaler: the `torch.amp.GradScaler`, if there is one; its ``step`` is then the step,
                also when it skips the optimizer's for an overflow.
            step: optimizer steps done before, in a loop that resumes from a checkpoint: the run
                directory is continued after them.
            max_steps: optimizer steps of the whole training, for policies that depend on it.
            save: writes a checkpoint of the loop when a policy or a person asks for one; called
                with the step, on every rank, when the step is done.
            loader: the DataLoader that the loop takes its batches from, so that alerts can say
                which rows of its dataset a step saw.
            tokenizer: of transformers; its special tokens are counted in the batches that
                `observe` is given.

        Raises:
            InputError: the engine is not supported, `tokenizer` is not one, the run directory is
                taken, or a policy cannot act.
        """
        special = () if tokenizer is None else special_tokens(tokenizer)
        if special is None:
            kind = type(tokenizer).__name__
            raise InputError(
                f"watch(): tokenizer is a {kind}; expected a tokenizer of transformers"
            )
        session = self.open(
            find_engine(model, optimizer, scaler=scaler),
            Training(
                step=step,
                max_steps=max_steps,
                info={"model": describe_model(model)},
                abilities=("stop",) if save is None else ("save", "stop"),
                no_rerun="torch.compile" if is_compiled(model) else "",
                special_tokens=special,
            ),
        )
        loop = PlainLoop(session, model, loader, save)
        try:
            with loop:
                yield self
        finally:
            self.close(loop.status)

    def open(self, engine: Engine, training: Training) -> Session:
        """Opens the run of a training that begins; every rank calls it.

        `attach` and `watch` call it for you, and `close` when the training ends.

        Raises:
            InputError: the run directory is taken, policies contradict one another, or a policy
                state is damaged.
        """
        self.close("failed")  # of a training that raised in this process before
        state, self._policy_state = self._policy_state, None
        if training.policy_state is None and state is not None:
            training = replace(training, policy_state=state)
        place = choose_place(
            self._first_dir,
            self.settings.if_exists,
            previous=None if self._latest is None else self._latest.run_dir,
            step=training.step,
            info=training.info,
            device=engine.device,
        )
        session = start_session(place, self.settings, self._parts, engine, training, self._config)
        self._latest = session
        return session

    def close(self, status: Status = "finished") -> None:
        """Ends the open run, if there is one, and lets go of what was trained."""
        latest = self._latest
        if isinstance(latest, Session):
            latest.close(status)
            self._latest = Ended(latest.run_dir, latest.step, latest.stopped)

    # -- the open run --------------------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """The open run; None between trainings."""
        latest = self._latest
        return latest if isinstance(latest, Session) and latest.is_open else None

    @property
    def run_dir(self) -> Path:
        """The directory of the latest run; before the first, where it will be."""
        return self._first_dir if self._latest is None else self._latest.run_dir

    @property
    def step(self) -> int:
        """The last optimizer step of the latest run."""
        return 0 if self._latest is None else self._latest.step

    @property
    def stopped(self) -> str | None:
        """Why a policy or a person stopped the latest training; None if they did not."""
        return None if self._latest is None else self._latest.stopped

    def observe(
        self,
        *,
        loss: Tensor | float | None = None,
        tokens: Tensor | float = 0.0,
        loss_tokens: Tensor | float | None = None,
        attended: Tensor | float = 0.0,
        batch: Any = None,
        row_losses: Tensor | None = None,
    ) -> None:
        """Adds what this rank saw of the coming step; call it for each micro-batch.

        Args:
            loss: this micro-batch's part of the step's loss; parts are summed over micro-batches
                and averaged over ranks. A scalar tensor is not copied to the host here.
            tokens: tokens that this rank trained on and no other rank did.
            loss_tokens: how many of them carry a label.
            attended: pairs of tokens that attention looked at, the sum of squared row lengths;
                counts in `train/mfu/total`.
            batch: what the model is called with: ``input_ids``, ``labels``, ``attention_mask``. It
                gives `data/*`, which say whether labels fit the tokens. Alerts name its rows if the
                loop does not call the module given to `watch`.
            row_losses: the loss of each row of `batch`.

        Raises:
            InputError: a value is not a real number, such as a loss of several elements.
        """
        if self.session is not None:
            self.session.observe(
                loss=loss,
                tokens=tokens,
                loss_tokens=loss_tokens,
                attended=attended,
                batch=batch,
                row_losses=row_losses,
            )

    def before_clip(self) -> None:
        """Reads the step's gradients now; for loops that clip or scale gradients by hand.

        Call it once a step, after the last micro-batch's backward pass and before clipping. torch's
        and accelerate's clipping functions are seen without it. It does nothing if the engine clips
        within its own step (DeepSpeed), which is read there.
        """
        if self.session is not None:
            self.session.before_clip()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Records numbers of your own at the current step; rank 0's count.

        Args:
            metrics: values by name, ``family/stat/scope``; ``my/metric`` is ``my/metric/total``.

        Raises:
            InputError: a name has another form.
        """
        if self.session is not None:
            self.session.log(metrics)

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what policies remember, to be kept with a checkpoint of this step.

        Every rank calls it. ``torch.load(..., weights_only=True)`` reads it. `attach` keeps it with
        every checkpoint of the Trainer and restores it.
        """
        state = None if self.session is None else self.session.policy_state()
        if state is None:
            return {}
        return {"policies": torch.frombuffer(bytearray(state), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned; call it before the training that resumes begins.

        Raises:
            InputError: `state` is something else.
        """
        held = state.get("policies")
        if held is not None and (not isinstance(held, Tensor) or held.dtype != torch.uint8):
            raise InputError("monitor: load_state_dict() expects what state_dict() returned")
        self._policy_state = None if held is None else held.cpu().numpy().tobytes()


Monitor.__signature__ = signature_of(Monitor.__init__)
