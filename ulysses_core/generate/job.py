"""The job of `ulysses generate`: every process answers a share of the prompts, rank 0 collects.

A batch of prompts has a seed of its own, and a process takes whole batches, so the answers are the
same on any number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_core.data import check_sources, load_datasets
from ulysses_core.data.examples import Message
from ulysses_core.data.files import Row
from ulysses_core.data.kinds import Kind
from ulysses_core.data.prompts import Prompt, to_prompt, tokenize_prompts
from ulysses_core.data.registry import INFO_FILE, DatasetSpec
from ulysses_core.generate.config import GenerateConfig
from ulysses_core.generate.results import Answered, finish
from ulysses_core.rewards import Scorer, make_rewards
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ulysses_core.data import DataConfig
    from ulysses_core.data.tokenize import DataStats

__all__ = ["check_job", "generate"]


class _Plan:
    """How to read rows; see `ulysses_core.data.sources.RowPlan`."""

    name = "generate"
    kind: Kind = "prompts"

    def convert(self, row: Row, spec: DatasetSpec) -> Prompt:
        return to_prompt(row, spec)

    def find_problem(self, _: Sequence[Prompt]) -> str:
        return ""

    def tokenize(
        self, examples: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig
    ) -> tuple[list[dict[str, Any]], DataStats]:
        """Adds the conversation to the columns, because the answers are written behind it."""
        rows, stats = tokenize_prompts(examples, tokenizer, config)
        by_place = {prompt.example.where: prompt for prompt in examples}
        for row in rows:
            example = by_place[row["where"]].example
            row["system"] = example.system
            row["turns"] = [_as_turn(message) for message in example.messages[:-1]]
        return rows, stats


def _as_turn(message: Message) -> dict[str, str]:
    tags = {"user": "human", "assistant": "gpt", "function": "function_call"}
    return {"from": tags.get(message.role, message.role), "value": message.content}


def check_job(config: GenerateConfig) -> None:
    """Checks what can be checked without importing torch.

    Raises:
        InputError: the first error found.
    """
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        _check_folder(key, getattr(config, key))
    for adapter in config.adapter_name_or_path:
        _check_folder("adapter_name_or_path", adapter)
    taken = config.output_dir / INFO_FILE
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"output_dir is {str(config.output_dir)!r}, which is not a folder")
    if taken.exists() and not config.overwrite_output_dir:
        raise InputError(
            f"output_dir is {str(config.output_dir)!r}, which has a {INFO_FILE} already; name "
            "another folder, or set overwrite_output_dir"
        )
    check_sources(config.data, _Plan())


def _check_folder(key: str, name: str | None) -> None:
    # A hub name is owner/model; everything else, or what looks like a path, is a folder.
    if name is None or Path(name).is_dir():
        return
    if name.count("/") != 1 or name.startswith((".", "/")) or Path(name).parent.is_dir():
        raise InputError(f"{key} is {name!r}, but there is no such folder")


def generate(config: GenerateConfig) -> dict[str, Any] | None:
    """Answers the prompts; in a distributed run, every process calls it.

    Returns:
        The summary on rank 0; None on the others.

    Raises:
        InputError: the model, a row or a reward is wrong.
    """
    from ulysses_core.generate.model import load_model
    from ulysses_core.trainers.build import build_tokenizer

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _start_ranks() if ranks > 1 else None
    scorers = make_rewards(config.reward_funcs) if config.reward_funcs else []
    tokenizer = build_tokenizer(config.model)
    rows: Any = load_datasets(config.data, _Plan(), tokenizer, config.seed, device).train
    model = load_model(config)
    _check_length(model, rows)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    size = config.per_device_eval_batch_size
    part = _part(config.output_dir, rank)
    with part.open("w", encoding="utf-8") as file:
        for batch in range(rank, -(-len(rows) // size), ranks):
            chosen = list(range(batch * size, min((batch + 1) * size, len(rows))))
            texts = _sample(config, model, tokenizer, [rows[i]["prompt"] for i in chosen], batch)
            for index, answered in zip(
                chosen, _score(config, scorers, [rows[i] for i in chosen], texts), strict=True
            ):
                file.write(json.dumps({"index": index, **answered}, ensure_ascii=False) + "\n")
    if ranks > 1:
        _wait_for_all()
    if rank:
        return None
    parts = [_part(config.output_dir, each) for each in range(ranks)]
    return finish(config, parts)


def _part(folder: Path, rank: int) -> Path:
    return folder / f".answers-{rank}.jsonl.part"


def _check_length(model: Any, rows: Any) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    for row in rows:
        if positions is not None and len(row["prompt"]) >= positions:
            raise InputError(
                f"{row['where']}: the prompt has {len(row['prompt'])} tokens, but the model has "
                f"{positions} positions; set cutoff_len={positions - 1} and bad_rows=skip"
            )


def _sample(
    config: GenerateConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch: int,
) -> list[list[str]]:
    """Returns the answers to each prompt of a batch."""
    from transformers import set_seed

    from ulysses_core.answers import Sampling, answer_prompts, stop_tokens

    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        num_answers=config.num_answers,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )
    set_seed((config.seed * 1_000_003 + batch) % 2**32)
    stops = stop_tokens(tokenizer, config.template, model)
    tokens = answer_prompts(model, tokenizer, prompts, sampling, stops=stops)
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    count = config.num_answers
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def _score(
    config: GenerateConfig,
    scorers: Sequence[Scorer],
    rows: Sequence[dict[str, Any]],
    texts: Sequence[Sequence[str]],
) -> list[Answered]:
    flat = [text for of_prompt in texts for text in of_prompt]
    repeated = [row for row in rows for _ in range(config.num_answers)]
    scores = {
        scorer.name: scorer.score(
            prompts=[row["question"] for row in repeated],
            completions=flat,
            answers=[row["answer"] for row in repeated],
            where=[row["where"] for row in repeated],
        )
        for scorer in scorers
    }
    found: list[Answered] = []
    for number, (row, of_prompt) in enumerate(zip(rows, texts, strict=True)):
        span = slice(number * config.num_answers, (number + 1) * config.num_answers)
        answered: Answered = {
            "system": row["system"],
            "turns": row["turns"],
            "reference": row["answer"],
            "answers": list(of_prompt),
            "scores": {name: values[span] for name, values in scores.items()},
        }
        found.append(answered)
    return found


def _start_ranks() -> torch.device:
    """Starts the process group, and returns the device of what the processes exchange."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return torch.device("cpu")


def _wait_for_all() -> None:
    import torch.distributed as dist

    dist.barrier()
