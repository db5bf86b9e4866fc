"""`ulysses generate`: answers written as datasets, filtered by reward, with their statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from ulysses_core.answers import pass_at_k
from ulysses_core.data import DataConfig
from ulysses_core.data.sources import read_examples
from ulysses_core.trainers.stage import find_stage

CONFIG: dict[str, Any] = {
    "model_name_or_path": "model",
    "dataset": "questions",
    "dataset_dir": "data",
    "template": "default",
    "num_answers": 4,
    "max_new_tokens": 6,
    "seed": 3,
    "per_device_eval_batch_size": 2,
    "reward_funcs": ["scoring:has_s", {"scoring:length": {"weight": 0.1}}],
}
REWARDS = """
def has_s(completions):
    return [float("s" in text) for text in completions]


def length(completions):
    return [len(text) for text in completions]


def fail(prompts, completions):
    if "set" in prompts[0]:
        raise KeyError("gone")
    return [1.0] * len(prompts)


def nan(completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    world = make_world()
    tokenizer = AutoTokenizer.from_pretrained(world.path / "tokenizer")
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, vocab_size=len(tokenizer))
    ).save_pretrained(world.path / "model")
    tokenizer.save_pretrained(world.path / "model")
    questions = [{"instruction": f"the {word}", "output": word} for word in ("map", "key", "set")]
    questions += [{"instruction": "every value", "output": None}, {"instruction": "a list"}]
    data = world.path / "data"
    (data / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    info = json.loads((data / "dataset_info.json").read_text())
    info["questions"] = {"file_name": "questions.jsonl"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    (world.path / "scoring.py").write_text(REWARDS)
    return world


def write_config(world: Any, name: str, changes: dict[str, Any]) -> None:
    values = {**CONFIG, "output_dir": name, **changes}
    values = {key: value for key, value in values.items() if value is not None}
    (world.path / f"{name}.yaml").write_text(yaml.safe_dump(values))


def run(world: Any, name: str, *options: str, **changes: Any) -> Any:
    write_config(world, name, changes)
    return world.run("generate", f"{name}.yaml", *options)


def read(world: Any, name: str, file: str = "answers") -> list[dict[str, Any]]:
    lines = (world.path / name / f"{file}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def everything(world: Any) -> dict[str, Any]:
    done = run(world, "all", "--json")
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_every_answer_is_a_row_with_its_prompt_reference_and_rewards(
    world: Any, everything: dict[str, Any]
) -> None:
    rows = read(world, "all")
    assert everything["prompts"] == 5
    assert len(rows) == everything["kept"] == 20 - everything["empty"]
    assert [turn["from"] for turn in rows[0]["conversations"]] == ["human", "gpt"]
    assert rows[0]["conversations"][0]["value"] == "the map"
    assert (rows[0]["reference"], rows[-1]["reference"]) == ("map", None)
    for row in rows:
        text = row["conversations"][1]["value"]
        assert row["rewards"] == {"has_s": float("s" in text), "length": len(text)}
        assert row["reward"] == pytest.approx(float("s" in text) + 0.1 * len(text))


def test_the_summary_has_pass_at_k_and_the_majority_votes_accuracy(
    world: Any, everything: dict[str, Any]
) -> None:
    assert set(everything["pass_at_k"]) == {"1", "2", "4"}
    prompts: dict[str, list[float]] = {}
    for row in read(world, "all"):
        prompts.setdefault(row["conversations"][0]["value"], []).append(row["rewards"]["has_s"])
    for k, share in everything["pass_at_k"].items():
        each = [pass_at_k(4, int(sum(own)), int(k)) for own in prompts.values()]
        assert share == pytest.approx(sum(each) / 5)
    assert 0 < everything["pass_at_k"]["1"] < everything["pass_at_k"]["4"]
    assert 0 <= everything["majority"] <= 1
    assert json.loads((world.path / "all/summary.json").read_text()) == everything


@pytest.mark.parametrize(("stage", "name"), [("sft", "answers"), ("dpo", "answers_pairs")])
def test_the_datasets_are_read_by_the_stages_at_once(
    world: Any, everything: dict[str, Any], stage: str, name: str
) -> None:
    data = DataConfig(dataset=[name], dataset_dir=world.path / "all")
    expected = everything["kept" if stage == "sft" else "pairs"]
    assert len(read_examples([name], data, find_stage(stage), seed=0)[name]) == expected
    assert expected > 0


def test_pairs_are_the_best_and_the_worst_answer_of_a_prompt(
    world: Any, everything: dict[str, Any]
) -> None:
    rewards: dict[str, dict[str, float]] = {}
    for row in read(world, "all"):
        prompt, answer = (turn["value"] for turn in row["conversations"])
        rewards.setdefault(prompt, {})[answer] = row["reward"]
    for pair in read(world, "all", "answers_pairs"):
        own = rewards[pair["conversations"][0]["value"]]
        assert own[pair["chosen"]["value"]] == max(own.values())
        assert own[pair["rejected"]["value"]] == min(own.values())


def test_several_processes_give_the_answers_of_one(world: Any, everything: dict[str, Any]) -> None:
    done = run(world, "shared", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "pass@4" in done.stdout
    assert "majority vote" in done.stdout
    assert read(world, "shared") == read(world, "all")
    assert not list((world.path / "shared").glob(".*"))


@pytest.mark.parametrize(("keep", "distinct"), [("best", False), ("above 2.0", True)])
def test_answers_are_kept_by_their_reward(
    world: Any, everything: dict[str, Any], keep: str, distinct: bool
) -> None:
    name = keep.replace(" ", "-")
    done = run(world, name, keep=keep, distinct=distinct)
    assert done.returncode == 0, done.stderr
    rows, every = read(world, name), read(world, "all")
    if keep == "best":
        best = {row["conversations"][0]["value"]: row["reward"] for row in every}
        for row in every:
            prompt = row["conversations"][0]["value"]
            best[prompt] = max(best[prompt], row["reward"])
        assert {row["conversations"][0]["value"]: row["reward"] for row in rows} == best
        return
    kept = [json.dumps(row) for row in every if row["reward"] > 2.0]
    assert sorted({json.dumps(row) for row in rows}) == sorted(set(kept))
    assert 0 < len(rows) == len(set(kept)) < len(every)


@pytest.mark.usefixtures("everything")
def test_answers_are_never_overwritten_unasked(world: Any) -> None:
    done = run(world, "all")
    assert done.returncode == 2
    assert "output_dir is 'all', which has a dataset_info.json already" in done.stderr
    assert run(world, "all", overwrite_output_dir=True).returncode == 0


def test_an_adapter_is_merged_into_the_model(world: Any) -> None:
    from peft import LoraConfig, get_peft_model

    set_seed(1)
    model = LlamaForCausalLM.from_pretrained(world.path / "model")
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, adapters).save_pretrained(world.path / "adapter")
    greedy = {"temperature": 0, "num_answers": 1, "reward_funcs": None}
    for name, adapter in (("base", None), ("adapted", "adapter")):
        assert run(world, name, adapter_name_or_path=adapter, **greedy).returncode == 0
    assert read(world, "base") != read(world, "adapted")
    assert "reward" not in read(world, "base")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "some"}, "keep is 'some'; allowed: all, best, above THRESHOLD"),
        ({"keep": "above nan"}, "keep is 'above nan'; allowed"),
        ({"keep": "best", "reward_funcs": None}, "reward_funcs is not set"),
        ({"temperature": 0}, "temperature is 0, so all 4 answers to a prompt would be equal"),
        ({"top_p": 0}, "top_p is 0"),
        ({"num_answer": 3}, "unknown key 'num_answer' (did you mean 'num_answers'?)"),
        ({"dataset": "quetsions"}, "did you mean 'questions'"),
        ({"model_name_or_path": "./none"}, "model_name_or_path is './none'"),
        ({"reward_funcs": ["exact_answr"]}, "did you mean 'exact_answer'"),
        ({"reward_funcs": ["scoring:gone"]}, "scoring has no gone"),
        ({"reward_funcs": ["scoring:fail"]}, "prompt 'the set': KeyError: 'gone'"),
        ({"reward_funcs": ["scoring:nan"]}, "prompt 'the map': returned nan"),
        ({"cutoff_len": 2}, "expected at most 2 (cutoff_len)"),
    ],
)
def test_wrong_input_is_one_line(
    world: Any,
    ulysses: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(world.path)
    write_config(world, "wrong", changes)
    code, _, error = ulysses("generate", "wrong.yaml")
    assert code == 2, error
    assert error.count("\n") == 1
    assert message in error
    assert not Path(world.path, "wrong", "dataset_info.json").exists()
