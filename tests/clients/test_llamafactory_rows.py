"""The rows that LLaMA-Factory's own pipeline makes of the same data, token by token."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.clients.conftest import clients_folder
from tests.clients.environments import ROOT, prepare
from tests.clients.test_llamafactory import CLIENT
from ulysses_core.data import DataConfig, load_datasets
from ulysses_core.data.templates import TEMPLATES
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError

DEMO = Path(os.environ.get("ULYSSES_DEMO_DATA") or ROOT.parent / "shared" / "data")
PAGE = ROOT / "docs" / "llamafactory-data.md"
BEGIN, END = "<!-- rows: written by make test-clients -->", "<!-- end of rows -->"

ADD = {
    "name": "add",
    "description": "Adds numbers.",
    "parameters": {
        "type": "object",
        "properties": {
            "x": {"type": "integer", "description": "A number."},
            "unit": {"type": "string", "description": "Its unit.", "enum": ["m", "ft"]},
        },
        "required": ["x"],
    },
}
CALL = json.dumps({"name": "add", "arguments": {"x": 1, "unit": "m"}})
THOUGHT = "<think>\nlet me see\n</think>\n\n"
CHATS = [
    {
        "conversations": [
            {"from": "human", "value": f"question {n}"},
            {
                "from": "gpt",
                "value": (THOUGHT if n % 3 == 0 else "") + f"answer {n} " * (n % 5 + 1),
            },
            {"from": "human", "value": f"and then {n}"},
            {"from": "gpt", "value": (THOUGHT if n % 2 == 0 else "") + f"that is all {n}"},
        ],
        "system": "Be brief." if n % 2 else "",
        "tag": bool(n % 2),
    }
    for n in range(40)
]
CALLS = [
    {
        "conversations": [
            {"from": "human", "value": f"add {n}"},
            {"from": "function_call", "value": CALL},
            {"from": "observation", "value": f"result {n}"},
            {"from": "gpt", "value": f"it is {n}"},
        ],
        "tools": json.dumps([ADD]),
        "system": "Be brief." if n % 2 else "",
    }
    for n in range(20)
]
MORE = {"x": 1, "unit": "m", "more": [2, {"y": None}], "is_short": True}
SEVERAL = [
    {
        **row,
        "conversations": [
            {"from": "human", "value": f"add {n}"},
            {
                "from": "function_call",
                "value": json.dumps([json.loads(CALL), {"name": "add", "arguments": MORE}]),
            },
            *row["conversations"][2:],
        ],
        "tools": json.dumps([ADD, {"type": "function", "function": ADD}]),
    }
    for n, row in enumerate(CALLS)
]
HISTORY = [
    {"q": f"third {n}", "i": "more" if n % 2 else "", "a": f"last {n}", "h": [["first", "one"]]}
    for n in range(20)
]
PAIRS = [
    {"q": f"question {n} " * (n % 7 + 1), "good": f"good {n} " * (n % 9 + 1), "bad": f"bad {n}"}
    for n in range(40)
]
TAGGED = [{"q": f"question {n}", "a": f"answer {n}", "tag": n % 3 == 0} for n in range(40)]
TEXTS = [{"text": f"a document with the number {n} " * (n % 4 + 1)} for n in range(40)]
FILES = {
    "chats": CHATS,
    "calls": CALLS,
    "several": SEVERAL,
    "history": HISTORY,
    "pairs": PAIRS,
    "tagged": TAGGED,
    "texts": TEXTS,
}
INFO: dict[str, dict[str, Any]] = {
    "chats": {
        "formatting": "sharegpt",
        "columns": {"system": "system", "messages": "conversations"},
    },
    "tagged_chats": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "kto_tag": "tag"},
    },
    "calls": {
        "formatting": "sharegpt",
        "columns": {"system": "system", "messages": "conversations", "tools": "tools"},
    },
    "several": {
        "formatting": "sharegpt",
        "columns": {"system": "system", "messages": "conversations", "tools": "tools"},
    },
    "history": {"columns": {"prompt": "q", "query": "i", "response": "a", "history": "h"}},
    "pairs": {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "tagged": {"columns": {"prompt": "q", "response": "a", "kto_tag": "tag"}},
    "texts": {"columns": {"prompt": "text"}},
}
SHORT = {"cutoff_len": 48}
FORMS: dict[str, dict[str, Any]] = {
    "sft, ShareGPT": {"stage": "sft", "dataset": "chats"},
    "sft, ShareGPT, cut": {"stage": "sft", "dataset": "chats", **SHORT},
    "sft, mask_history": {"stage": "sft", "dataset": "chats", "mask_history": True},
    "sft, history": {"stage": "sft", "dataset": "history"},
    "sft, tools": {"stage": "sft", "dataset": "calls"},
    "sft, several calls": {"stage": "sft", "dataset": "several", "cutoff_len": 4096},
    "rm, pairs": {"stage": "rm", "dataset": "pairs"},
    "dpo, pairs, cut": {"stage": "dpo", "dataset": "pairs", **SHORT},
    "kto, alpaca": {"stage": "kto", "dataset": "tagged"},
    "kto, ShareGPT, cut": {"stage": "kto", "dataset": "tagged_chats", **SHORT},
}
ONCE: dict[str, dict[str, Any]] = {
    "pt": {"stage": "pt", "dataset": "texts", "packing": False, "template": "default"},
    "sft, train_on_prompt": {
        "stage": "sft",
        "dataset": "chats",
        "train_on_prompt": True,
        "template": "qwen",
    },
    "sft, two datasets": {"stage": "sft", "dataset": "chats,history", "template": "llama3"},
    "sft, interleaved": {
        "stage": "sft",
        "dataset": "chats,history",
        "mix_strategy": "interleave_over",
        "interleave_probs": "0.3,0.7",
        "template": "llama3",
    },
    "sft, max_samples": {"stage": "sft", "dataset": "chats", "max_samples": 7, "template": "phi"},
    "sft, val_size": {"stage": "sft", "dataset": "chats", "val_size": 0.25, "template": "phi"},
    "sft, no thinking": {
        "stage": "sft",
        "dataset": "chats",
        "enable_thinking": False,
        "template": "qwen3",
    },
    "sft, tool_format": {
        "stage": "sft",
        "dataset": "calls",
        "tool_format": "mistral",
        "template": "default",
    },
    "sft, default_system": {
        "stage": "sft",
        "dataset": "chats",
        "default_system": "Answer.",
        "template": "qwen",
    },
}
DEMOS: dict[str, dict[str, Any]] = {
    "demo: alpaca_en_demo": {"stage": "sft", "dataset": "alpaca_en_demo,identity"},
    "demo: dpo_en_demo": {"stage": "dpo", "dataset": "dpo_en_demo"},
}
DEMO_TEMPLATES = ("llama3", "qwen3", "gemma2", "default")


def make_cases() -> dict[str, dict[str, Any]]:
    cases = {
        f"{form}: {name}": {**settings, "template": name}
        for name in TEMPLATES
        for form, settings in FORMS.items()
        if not (settings["dataset"] == "several" and TEMPLATES[name].tool_style == "glm4")
    }  # glm4 has one call in a turn
    if DEMO.is_dir():
        for name in DEMO_TEMPLATES:
            demo = {"template": name, "dataset_dir": str(DEMO), "cutoff_len": 512}
            cases |= {f"{form}: {name}": settings | demo for form, settings in DEMOS.items()}
    return cases | ONCE


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer in which the tags of all templates are tokens.

    LLaMA-Factory would add those that end an answer.
    """
    tags = re.findall(r"<\|?[^<>{}\s]+>|\[/?[A-Z_]{3,}\]|\[e~\[", repr(TEMPLATES))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>", *sorted({*tags, "<eos>", "<|eom_id|>", "<|eom|>"})],
        show_progress=False,
    )
    core.train_from_iterator([json.dumps(FILES)], trainer)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens)


def our_rows(tokenizer: Any, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields our rows in LLaMA-Factory's columns."""
    data = {key: value for key, value in settings.items() if key in DataConfig.model_fields}
    stage = settings["stage"]
    config = DataConfig(**data, bad_rows="skip")
    try:
        train = load_datasets(config, find_stage(stage), tokenizer, seed=42).train
    except InputError as error:
        assert "no row is left" in str(error)  # noqa: PT017 - the templates' tags fill the rows
        return
    for row in train:
        if stage in ("sft", "pt"):
            yield {"input_ids": row["input_ids"]} | (
                {"labels": row["labels"]} if stage == "sft" else {}
            )
        elif stage == "kto":
            answer = row["completion_ids"]
            yield {
                "input_ids": row["prompt_ids"] + answer,
                "labels": [-100] * len(row["prompt_ids"]) + answer,
                "kto_tags": row["label"],
            }
        elif stage == "rm":
            yield {f"{side}_input_ids": row[f"{side}_ids"] for side in ("chosen", "rejected")}
        else:
            yield _pair(row)


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    prompt, pair = row["prompt_ids"], {}
    for side in ("chosen", "rejected"):
        answer = row[f"{side}_ids"]
        pair[f"{side}_input_ids"] = prompt + answer
        pair[f"{side}_labels"] = [-100] * len(prompt) + answer
    return pair


def is_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return all(theirs[key] == value for key, value in ours.items())


class Comparison:
    """Compares our rows with LLaMA-Factory's, and says why some differ."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def explain(
        self, settings: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
    ) -> str:
        template = TEMPLATES[settings["template"]]
        if template.ends_with_eos and settings.get("mask_history") and self._ends(ours, theirs):
            return "the end of an answer that `mask_history` masks"
        if template.tool_style == "llama3" and self._undated(ours) == self._undated(theirs):
            return "today's date before the tools"
        return "UNEXPLAINED"

    def is_left_out(self, theirs: dict[str, Any]) -> bool:
        """Returns whether a pair's answers are equal where they are cut."""
        sides = [theirs.get(f"{side}_input_ids") for side in ("chosen", "rejected")]
        return sides[0] is not None and sides[0] == sides[1]

    def _ends(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        pairs = zip(ours["labels"], theirs["labels"], strict=True)
        different = {pair for pair in pairs if pair[0] != pair[1]}
        is_same_text = ours["input_ids"] == theirs["input_ids"]
        return is_same_text and different == {(-100, self._tokenizer.eos_token_id)}

    def _undated(self, row: dict[str, Any]) -> list[str]:
        text = self._tokenizer.decode(row["input_ids"])
        answers = [label for label in row["labels"] if label != -100]
        return [re.sub(r"Today Date: .*", "", text), self._tokenizer.decode(answers)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    for name, rows in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} | entry for name, entry in INFO.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def run_program() -> Callable[..., str]:
    return prepare(CLIENT, clients_folder() / CLIENT.package).python


@pytest.mark.clients
@pytest.mark.timeout(3600)
def test_rows_are_those_of_llamafactory(world: Path, run_program: Callable[..., str]) -> None:
    common = {
        "model_name_or_path": str(world / "tokenizer"),
        "dataset_dir": str(world),
        "output_dir": str(world / "out"),
        "do_train": True,
        "use_cpu": True,
        "report_to": "none",
        "overwrite_cache": True,
        "cutoff_len": 1024,
    }
    cases = make_cases()
    asked = {"tokenizer": str(world / "tokenizer"), "common": common, "cases": cases}
    (world / "cases.json").write_text(json.dumps(asked))
    program = Path(__file__).parent / "programs" / "llamafactory_rows.py"
    run_program(program, world / "cases.json", world / "rows.json")
    found = json.loads((world / "rows.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world / "tokenizer")
    comparison = Comparison(tokenizer)
    results: dict[str, Counter[str]] = defaultdict(Counter)
    unexplained = []
    for name, settings in cases.items():
        form = name.split(": ")[0] if not name.startswith("demo") else name.rsplit(": ", 1)[0]
        ours = list(our_rows(tokenizer, common | settings))
        theirs = [row for row in found[name] if not comparison.is_left_out(row)]
        if missing := len(found[name]) - len(theirs):
            results[form]["both answers cut to the same"] += missing
        assert len(ours) == len(theirs), name
        for mine, other in zip(ours, theirs, strict=True):
            reason = "" if is_equal(mine, other) else comparison.explain(settings, mine, other)
            results[form][reason] += 1
            if reason == "UNEXPLAINED":
                unexplained.append(f"{name}: {mine} {other}")
    write_table(results)
    assert not unexplained, unexplained[0]


def write_table(results: dict[str, Counter[str]]) -> None:
    """Writes the numbers of equal rows into the documentation."""
    lines = ["| rows | compared | equal | different, and why |", "|---|---|---|---|"]
    for form, counts in results.items():
        why = "; ".join(f"{count}: {reason}" for reason, count in counts.items() if reason)
        lines.append(f"| {form} | {counts.total():,} | {counts['']:,} | {why} |")
    everything = sum(results.values(), Counter())
    lines.append(f"| all | {everything.total():,} | {everything['']:,} | |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    table = "\n".join([BEGIN, *lines, END])
    PAGE.write_text(before + table + rest.split(END)[1], encoding="utf-8")
