"""A stage of training, and how one is found by its name.

Each module of `ulysses_core.trainers.stages` is one stage: it says which rows the stage reads, how
they become tokens, the model, the trainer and the YAML keys. Adding a stage is adding a module.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from ulysses_core import config as configs
from ulysses_core.config import RunConfig
from ulysses_core.data import DataConfig, DatasetPair, DataStats
from ulysses_core.data.files import Row
from ulysses_core.data.kinds import Kind
from ulysses_core.data.registry import DatasetSpec
from ulysses_core.trainers import stages
from ulysses_monitor.common.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

__all__ = [
    "NoKeys",
    "Parts",
    "Stage",
    "StageKeys",
    "find_stage",
    "finish_trainer",
    "list_stages",
    "load_config",
    "plain_arguments",
    "with_defaults",
]


class StageKeys(BaseModel):
    """Base of the YAML keys of a stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @property
    def generated_tokens(self) -> int:
        """Tokens that the stage appends to a row of `cutoff_len`."""
        return 0


class NoKeys(StageKeys):
    """The keys of a stage that has none of its own."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a stage builds its trainer from.

    Attributes:
        config: the whole config.
        args: the training arguments that `Stage.make_arguments` made.
        model: the model, with adapters if the config has them.
        tokenizer: its tokenizer.
        data: the tokenised rows.
        make_reference: makes a frozen model like the one that training starts from.
    """

    config: RunConfig
    args: TrainingArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DatasetPair
    make_reference: Callable[[], PreTrainedModel]


Arguments = tuple[Callable[..., Any], dict[str, Any]]
"""The class of the training arguments, and the values that it gets from the stage's keys."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of training.

    Attributes:
        name: its name in a config.
        kind: what the rows of its datasets hold.
        keys: its YAML keys.
        task: the model's head: `causal` for logits, `score` for one number a row, `value` for
            logits and a number a token.
        convert: makes an example of a row, or raises `InputError`.
        tokenize: makes rows of tokens, as the collator takes them, of examples.
        make_arguments: see `Arguments`.
        build_trainer: builds the trainer, with its collator.
    """

    name: str
    kind: Kind
    keys: type[StageKeys] = NoKeys
    task: Literal["causal", "score", "value"] = "causal"
    convert: Callable[[Row, DatasetSpec], Any]
    tokenize: Callable[
        [Any, PreTrainedTokenizerBase, DataConfig], tuple[list[dict[str, Any]], DataStats]
    ]
    make_arguments: Callable[[RunConfig], Arguments]
    build_trainer: Callable[[Parts], Trainer]


def list_stages() -> list[str]:
    """Returns the names of the stages."""
    return sorted(module.name for module in pkgutil.iter_modules(stages.__path__))


def find_stage(name: str) -> Stage:
    """Returns a stage.

    Raises:
        InputError: there is no such stage.
    """
    if name not in list_stages():
        hint = nearest(name, list_stages())
        raise InputError(f"stage is {name!r}{hint}; allowed: {', '.join(list_stages())}")
    stage: Stage = importlib.import_module(f"{stages.__name__}.{name}").STAGE
    return stage


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads and validates a config with the keys of its stage; see `ulysses_core.config`.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    keys: Mapping[str, type[BaseModel]] = {name: find_stage(name).keys for name in list_stages()}
    return configs.load_config(path, overrides, keys)


def plain_arguments(_: RunConfig) -> Arguments:
    """Returns transformers' own training arguments."""
    from transformers import TrainingArguments

    return TrainingArguments, {}


def with_defaults(kind: type[Any], values: dict[str, Any]) -> Arguments:
    """Returns `kind`, a subclass of `TrainingArguments`, with transformers' defaults.

    TRL changes some of them, such as the learning rate; a config means the same in every stage.
    """
    from transformers import TrainingArguments

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TrainingArguments)
        if field.init and field.default is not dataclasses.MISSING
    }
    return kind, defaults | values


def finish_trainer(trainer: Trainer, data: DatasetPair) -> Trainer:
    """Makes a trainer print nothing, and evaluate after the last step if it has rows for it."""
    from transformers import PrinterCallback, TrainerCallback

    class FinalEvaluation(TrainerCallback):
        """Evaluates after the last step, whatever `eval_strategy` is."""

        def on_step_end(
            self,
            args: TrainingArguments,  # noqa: ARG002 - transformers fixes the signature
            state: TrainerState,
            control: TrainerControl,
            **kwargs: Any,  # noqa: ARG002
        ) -> None:
            if state.global_step >= state.max_steps:
                control.should_evaluate = True

    if data.eval is not None:
        trainer.add_callback(FinalEvaluation())
    trainer.remove_callback(PrinterCallback)  # the console sink prints the same numbers
    return trainer
