"""Healthy trainings with Trainers and on two ranks, like those that faults are put into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from benchmarks.faults.hf import HFTraining
from benchmarks.faults.ranks import RankTraining
from benchmarks.faults.training import Setting
from benchmarks.faults.trl_trainers import make_dpo, make_sft

__all__ = ["HEALTHY_RANKS", "HEALTHY_TRAINERS"]

_EVALUATES: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10}
_DROPS = {"attention_dropout": 0.1}

HEALTHY_TRAINERS: Mapping[str, Callable[[Setting], HFTraining]] = {
    "all weights": HFTraining,
    "tied weights": lambda s: HFTraining(s, config={"tie_word_embeddings": True}),
    "evaluated, with dropout": lambda s: HFTraining(s, config=_DROPS, arguments=_EVALUATES),
    "accumulated": lambda s: HFTraining(
        replace(s, batch=1), arguments={"gradient_accumulation_steps": 8, **_EVALUATES}
    ),
    "LoRA": lambda s: HFTraining(s, lora=4, targets=("q_proj", "v_proj", "up_proj")),
    "LoRA with checkpointing": lambda s: HFTraining(
        s, lora=4, arguments={"gradient_checkpointing": True}
    ),
    "SFT": lambda s: HFTraining(s, make=make_sft),
    "DPO": lambda s: HFTraining(
        replace(s, rate=s.rate / 10, batch=2),
        make=make_dpo,
        arguments={"gradient_accumulation_steps": 2, **_EVALUATES},
    ),
}


def _nothing(_: RankTraining) -> None:
    pass


def _accumulates(training: RankTraining) -> None:
    training.passes = 2


def _splits_rows(training: RankTraining) -> None:
    training.splits_rows = True


def _packs(training: RankTraining) -> None:
    training.documents = 2


def _drops_out(training: RankTraining) -> None:
    def drop(t: RankTraining) -> None:
        for layer in t.model.layers:
            layer.register_forward_hook(lambda _, __, out: F.dropout(out, 0.1))

    training.on_model = drop


def _without_clipping(training: RankTraining) -> None:
    training.setting = replace(training.setting, clip=0.0)


HEALTHY_RANKS: Mapping[str, Callable[[RankTraining], None]] = {
    "rows apart": _nothing,
    "accumulated": _accumulates,
    "sequence parallel": _splits_rows,
    "packed": _packs,
    "with dropout": _drops_out,
    "not clipped": _without_clipping,
}
