from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.reasoning.data import Sizes, make_data, work_out
from examples.reasoning.rewards import true_steps
from examples.reasoning.run import PHASES, main
from examples.reasoning.table import make_table
from tests.support.commands import run_python

REPOSITORY = Path(__file__).parents[2]
TITLES = {phase.name: phase.title for phase in PHASES if phase.title}
MINIATURE = """
from functools import partial
from examples.reasoning import run
from examples.reasoning.data import Sizes

short = ["max_steps=2", "per_device_train_batch_size=8"]
answers = ["num_generations=4", "max_completion_length=6", "max_new_tokens=6", "logging_steps=1"]
samples = ["keep=all", "max_new_tokens=6", "num_answers=2", "max_samples=8"]
overrides = dict.fromkeys(["cold_start", "sft", "small", "distilled"], short)
overrides |= dict.fromkeys(["grpo", "grpo_mixed"], [*short, *answers])
overrides |= dict.fromkeys(["sampled", "lessons"], samples)
sizes = Sizes(digits=2, worked=16, problems=16, heldout=6)
run.Road = partial(run.Road, sizes=sizes, overrides=overrides)
run.main(["--seeds", "5", "--out", "road"])
"""
ROAD = """
from examples.reasoning import run

run.main(["--seeds", "0", "--out", "road"])
"""


def run_road(program: str, folder: Path, seed: int, timeout: float) -> dict[str, Any]:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = run_python("-c", program, folder=folder, environment=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / f"road/seed{seed}/result.json").read_text())
    return result


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_worked_examples_carry_from_the_right() -> None:
    assert work_out(347, 285) == "<think>7+5+0=12,4+8+1=13,3+2+1=6</think>632"
    assert work_out(95, 5) == "<think>5+5+0=10,9+0+1=10</think>100"


def test_no_problem_is_in_two_datasets_and_a_seed_decides_them(tmp_path: Path) -> None:
    sizes = Sizes(digits=2, worked=30, problems=40, heldout=20)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_data(tmp_path / name, seed, sizes)
    names = ("worked", "problems", "heldout")
    made = [row["instruction"] for name in names for row in rows(tmp_path / f"a/{name}.jsonl")]
    assert len(made) == len(set(made)) == 90
    texts = [(tmp_path / f"{folder}/worked.jsonl").read_text() for folder in "abc"]
    assert texts[0] == texts[1] != texts[2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a/tokenizer")
    text = work_out(47, 85)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len(re.sub("</?think>", "t", text))


def test_the_own_reward_is_the_share_of_true_steps() -> None:
    thoughts = ["7+5+0=12,4+8+1=13", "7+5+0=12,4+8+1=14", "7+5=12", ""]
    answers = [f"<think>{thought}</think>1" for thought in thoughts]
    assert true_steps([*answers, "no thought"]) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_the_table_has_the_mean_and_the_range_over_seeds() -> None:
    scores = [{name: {"greedy": value} for name in TITLES} for value in (0.25, 0.5)]
    results = [{"scores": s, "wall_seconds": 60.0, "cpu_seconds": 30.0} for s in scores]
    table = make_table(results, TITLES)
    assert "| cold-start SFT | 38 (25 to 50) |" in table
    assert "mean of 2 seeds" in table
    assert "0.5 minutes of CPU time a seed, 1.0 minutes on the clock" in table


def test_each_seed_has_a_process_of_its_own_with_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(command: list[str], *, env: dict[str, str], check: bool) -> None:
        assert env["OMP_NUM_THREADS"] == "1"
        seed = command[command.index("--seeds") + 1]
        scores = {name: {"greedy": int(seed) / 10} for name in TITLES}
        result = {"scores": scores, "wall_seconds": 60.0, "cpu_seconds": 60.0}
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("subprocess.run", pretend)
    assert main(["--seeds", "2", "4", "--out", str(tmp_path)]) == 0
    assert "| cold-start SFT | 30 (20 to 40) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seeds", "1", "2", "1"], "--seeds has [1, 2, 1]; expected each seed once"),
        (["--jobs", "0"], "--jobs is 0; expected 1 or more"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(300)
def test_the_road_runs_in_miniature(tmp_path: Path) -> None:
    result = run_road(MINIATURE, tmp_path, seed=5, timeout=240)
    assert set(result["scores"]) == set(TITLES)
    for scores in result["scores"].values():
        assert set(scores) == {"greedy", "pass@1", "pass@8", "majority"}
        assert all(0 <= share <= 1 for share in scores.values())
    assert "mean of 1 seed." in (tmp_path / "road/table.md").read_text()
    kept = rows(tmp_path / "road/seed5/sampled/answers.jsonl")
    assert set(kept[0]["rewards"]) == {"exact_answer", "format"}


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_every_phase_of_the_road_lifts_the_accuracy(tmp_path: Path) -> None:
    result = run_road(ROAD, tmp_path, seed=0, timeout=2900)
    greedy = {name: scores["greedy"] for name, scores in result["scores"].items()}
    assert 0.2 < greedy["cold_start"] < 0.7
    assert greedy["grpo"] > greedy["cold_start"] + 0.08
    assert greedy["grpo_mixed"] > greedy["grpo"]
    assert greedy["distilled"] > greedy["small"] + 0.2
