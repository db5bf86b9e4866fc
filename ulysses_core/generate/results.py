"""What becomes of the answers: which are kept, what they say, and the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from ulysses_core.answers.statistics import pass_at_k, vote
from ulysses_core.data.registry import INFO_FILE
from ulysses_core.generate.config import GenerateConfig
from ulysses_core.rewards import make_rewards
from ulysses_monitor.common.files import replace_file

__all__ = ["Answered", "finish"]

_COLUMNS = {"messages": "conversations", "system": "system"}
_PAIRS = {**_COLUMNS, "chosen": "chosen", "rejected": "rejected"}


class Answered(TypedDict):
    """A prompt and its answers."""

    system: str
    turns: list[dict[str, str]]
    """The conversation before the answers, in ShareGPT's form."""
    reference: str | None
    answers: list[str]
    scores: dict[str, list[float | None]]
    """The rewards of each answer, by reward."""


def finish(config: GenerateConfig, parts: Sequence[Path]) -> dict[str, Any]:
    """Writes the datasets and the summary from what each process wrote, which is then removed.

    Returns:
        The summary.
    """
    found = sorted(
        (json.loads(line) for part in parts for line in part.open(encoding="utf-8")),
        key=lambda row: row["index"],
    )
    scorers = make_rewards(config.reward_funcs) if config.reward_funcs else []
    weights = {scorer.name: scorer.weight for scorer in scorers}
    rewards = [_sum_rewards(row, weights) for row in found]
    kept = [_choose(config, row, own) for row, own in zip(found, rewards, strict=True)]
    name, info = config.output_name, {}
    rows = [
        _as_row(row, i, own)
        for row, own, chosen in zip(found, rewards, kept, strict=True)
        for i in chosen
    ]
    info[name] = _entry(f"{name}.jsonl", _COLUMNS)
    _write_jsonl(config.output_dir / f"{name}.jsonl", rows)
    pairs = list(_make_pairs(found, rewards)) if weights else []
    if pairs:
        info[f"{name}_pairs"] = _entry(f"{name}_pairs.jsonl", _PAIRS) | {"ranking": True}
        _write_jsonl(config.output_dir / f"{name}_pairs.jsonl", pairs)
    summary = _summarize(config, found, rewards) | {"kept": len(rows), "pairs": len(pairs)}
    _write_json(config.output_dir / "summary.json", summary)
    _write_json(config.output_dir / INFO_FILE, info)  # last: it says that the folder is complete
    for part in parts:
        part.unlink()
    return summary


def _sum_rewards(row: Answered, weights: dict[str, float]) -> list[float]:
    """Returns the weighted sum of each answer's rewards; one that does not apply counts as 0."""
    return [
        sum(weight * (row["scores"][name][i] or 0.0) for name, weight in weights.items())
        for i in range(len(row["answers"]))
    ]


def _choose(config: GenerateConfig, row: Answered, rewards: Sequence[float]) -> list[int]:
    """Returns which answers to keep; never an empty one, which no stage trains on."""
    answers = row["answers"]
    places = [i for i, answer in enumerate(answers) if answer]
    if config.distinct:
        places = [i for i in places if answers.index(answers[i]) == i]
    if config.keep == "best":
        return sorted(places, key=lambda i: -rewards[i])[:1]
    if config.threshold is not None:
        return [i for i in places if rewards[i] > config.threshold]
    return places


def _as_row(row: Answered, place: int, rewards: Sequence[float]) -> dict[str, Any]:
    scores = {name: values[place] for name, values in row["scores"].items()}
    return {
        "conversations": [*row["turns"], _answer(row["answers"][place])],
        "system": row["system"],
        "reference": row["reference"],
        **({"reward": rewards[place], "rewards": scores} if scores else {}),
    }


def _answer(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def _make_pairs(
    found: Sequence[Answered], rewards: Sequence[Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """Yields the best and the worst answer of each prompt whose answers differ in reward."""
    for row, own in zip(found, rewards, strict=True):
        places = [i for i, answer in enumerate(row["answers"]) if answer]
        if not places:
            continue
        best, worst = max(places, key=own.__getitem__), min(places, key=own.__getitem__)
        if own[best] > own[worst]:
            yield {
                "conversations": row["turns"],
                "system": row["system"],
                "chosen": _answer(row["answers"][best]),
                "rejected": _answer(row["answers"][worst]),
            }


def _summarize(
    config: GenerateConfig, found: Sequence[Answered], rewards: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Computes the means over prompts of rewards, pass@k and the majority vote's accuracy."""
    summary: dict[str, Any] = {
        "prompts": len(found),
        "answers": sum(len(row["answers"]) for row in found),
        "empty": sum(not answer for row in found for answer in row["answers"]),
    }
    names = list(found[0]["scores"]) if found else []
    if not names:
        return summary
    summary["reward"] = fmean(reward for own in rewards for reward in own)
    summary["rewards"] = {name: _mean_reward(found, name) for name in names}
    right = [[_is_right(config, score) for score in row["scores"][names[0]]] for row in found]
    n = config.num_answers
    ks = sorted({*(2**power for power in range(n.bit_length()) if 2**power <= n), n})
    summary["pass_at_k"] = {str(k): fmean(pass_at_k(n, sum(own), k) for own in right) for k in ks}
    voted = [vote(row["answers"]) for row in found]
    summary["majority"] = fmean(
        0.0 if place is None else float(own[place]) for place, own in zip(voted, right, strict=True)
    )
    return summary


def _mean_reward(found: Sequence[Answered], name: str) -> float | None:
    values = [score for row in found for score in row["scores"][name] if score is not None]
    return fmean(values) if values else None


def _is_right(config: GenerateConfig, score: float | None) -> bool:
    return score is not None and score >= config.right_at


def _entry(file: str, columns: dict[str, str]) -> dict[str, Any]:
    return {"file_name": file, "formatting": "sharegpt", "columns": columns}


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replace_file(path) as file:
        file.write(text.encode())


def _write_json(path: Path, value: object) -> None:
    with replace_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
