"""The study of interventions: its statistics, its trainings, and what it says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import policies
from benchmarks.policy_study.effects import Effect, paired_effect, t_quantile, verdict
from benchmarks.policy_study.interventions import INTERVENTIONS, Intervention
from benchmarks.policy_study.jobs import Job, Row, jobs_of, read_rows, run, run_job
from benchmarks.policy_study.problems import PROBLEMS
from benchmarks.policy_study.report import report, results_of
from benchmarks.policy_study.tasks import TASKS, Poison, Task
from benchmarks.policy_study.training import score_of, train

TINY = replace(TASKS["vanishing-sgd"], steps=12, warmup=2)
ACTS = {
    "scaling": Intervention(["benchmarks.policy_study.interventions:times_100"]),
    "waits": Intervention([{"clip_threshold": {"above": 1e6}}]),
    "elsewhere": Intervention(["agc"], ("healthy-*",)),
}


# -- statistics -------------------------------------------------------------------------------


def test_the_interval_is_the_paired_t_interval() -> None:
    effect = paired_effect([-1.0, -2.0, -3.0])
    half = 4.303 / math.sqrt(3)  # a standard deviation of 1, and t with 2 degrees
    assert effect.mean == -2.0
    assert (effect.low, effect.high) == pytest.approx((-2 - half, -2 + half))
    assert verdict(effect, acted=True) == "no effect seen"


def test_one_seed_gives_no_verdict() -> None:
    effect = paired_effect([-5.0])
    assert (effect.mean, effect.low, effect.high) == (-5.0, -math.inf, math.inf)
    assert verdict(effect, acted=True) == "no effect seen"


def test_quantiles_fall_and_stay_above_the_normals() -> None:
    found = [t_quantile(degrees) for degrees in range(1, 40)]
    assert found == sorted(found, reverse=True)
    assert found[6] == 2.365
    assert found[-1] > 1.96


@pytest.mark.parametrize(
    ("low", "high", "acted", "word"),
    [
        (-2.0, -1.0, True, "helps"),
        (1.0, 2.0, True, "hurts"),
        (-1.0, 1.0, True, "no effect seen"),
        (0.0, 0.0, True, "no effect seen"),
        (0.0, 0.0, False, "nothing"),
    ],
)
def test_a_verdict_follows_from_the_interval(
    low: float, high: float, acted: bool, word: str
) -> None:
    assert verdict(Effect((low + high) / 2, low, high, 8), acted=acted) == word


@pytest.mark.parametrize(
    ("end", "score"), [(2.0, 2.0), (9.0, 5.0), (math.nan, 5.0), (math.inf, 5.0)]
)
def test_a_diverged_training_scores_like_one_that_never_started(end: float, score: float) -> None:
    assert score_of(5.0, end) == score


# -- tasks and interventions ------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_names_its_problem_and_its_fault(task: Task) -> None:
    assert task.problem in PROBLEMS
    assert bool(task.sound) != task.name.startswith("healthy-")
    assert (task.without_trouble() != task) == bool(task.sound)


def test_presets_run_on_every_task_and_every_intervention_on_some() -> None:
    for name, intervention in INTERVENTIONS.items():
        tasks = [task for task in TASKS if intervention.goes_to(task)]
        assert tasks
        if name in ("adaptive", "ulysses-pro", "ulysses-pro-2025-03"):
            assert tasks == list(TASKS)
    assert not INTERVENTIONS["lora_balance"].goes_to("healthy-sgd")


def test_poison_comes_in_bursts_at_places_of_the_seed() -> None:
    poison = Poison()
    places = [poison.steps(seed, 250) for seed in range(20)]
    assert places == [poison.steps(seed, 250) for seed in range(20)]
    assert len({frozenset(steps) for steps in places}) == 20
    for steps in places:
        assert 3 <= len(steps) <= 9
        assert all(80 < step <= 250 for step in steps)
        assert set(steps.values()) == {50.0}


# -- trainings --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return list(jobs_of([TINY], range(2), ACTS))


@pytest.fixture(scope="module")
def rows(jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("study")
    return [{**run_job(job, folder), "key": job.key} for job in jobs]


def of_kind(rows: Sequence[Row], kind: str, intervention: str = "") -> dict[int, Row]:
    chosen = [r for r in rows if (r["kind"], r["intervention"]) == (kind, intervention)]
    return {row["seed"]: row for row in chosen}


def test_a_study_has_each_training_once(jobs: list[Job]) -> None:
    assert len({job.key for job in jobs}) == len(jobs) == 2 + 2 + 2 * (1 + 2)


def test_shadow_and_inaction_leave_the_weights_bit_equal(rows: list[Row]) -> None:
    off = of_kind(rows, "off")
    assert off[0]["weights"] != off[1]["weights"]
    shadow = of_kind(rows, "shadow", "scaling")[0]
    assert (shadow["weights"], shadow["acted"]) == (off[0]["weights"], 12)
    waits = of_kind(rows, "active", "waits")
    assert [waits[s]["weights"] for s in (0, 1)] == [off[s]["weights"] for s in (0, 1)]
    active = of_kind(rows, "active", "scaling")
    assert [active[s]["weights"] != off[s]["weights"] for s in (0, 1)] == [True, True]
    assert active[0]["actions"] == {"times_100: scale": 12}
    assert not any(row["error"] or row["defects"] for row in rows)


def test_another_process_gives_the_same_weights(
    jobs: list[Job], rows: list[Row], tmp_path: Path
) -> None:
    (row,) = run(jobs[:1], 1, tmp_path)
    assert (row["key"], row["weights"]) == (rows[0]["key"], rows[0]["weights"])


@pytest.mark.parametrize("name", ["spikes-poisoned-adamw", "healthy-lora"])
def test_a_text_model_trains_the_same_without_a_monitor_and_in_shadow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("benchmarks.policy_study.problems.PRETRAINING_STEPS", 3)
    poison = Poison(bursts=1, longest=2, after=1) if TASKS[name].poison else None
    task = replace(TASKS[name], steps=5, warmup=2, poison=poison)
    off, shadow = (
        train(task, 0, tmp_path, policies=policies, shadow=True) for policies in (None, ["agc"])
    )
    assert off.weights == shadow.weights
    assert (off.acted, shadow.acted) == (0, 5)
    assert off.end != off.start
    assert not shadow.defects
    assert not list(tmp_path.glob("tmp*"))  # runs are gone


def test_the_report_states_the_outcome(jobs: list[Job], rows: list[Row]) -> None:
    results = results_of(rows)
    assert results["waits"].verdict == "nothing"
    assert results["scaling"].acted_in == 2
    assert results["scaling"].actions == 12.0
    text = " ".join(report(jobs, rows, 1, "the command").split())
    assert "bit by bit, in 2 of 2 trainings" in text
    assert "| waits | - | - | - | vanishing-sgd |" in text
    assert "2 seeds (0 to 1); 10 trainings" in text


def test_the_report_names_broken_guarantees(jobs: list[Job], rows: list[Row]) -> None:
    def spoilt(row: Row) -> Row:
        if row["kind"] == "shadow":
            return {**row, "weights": "others"}
        if row["intervention"] == "waits":
            return {**row, "weights": "others"}
        if row["intervention"] == "scaling":
            return {**row, "error": "InputError: wrong"}
        return row

    text = report(jobs, [spoilt(row) for row in rows], 1, "the command")
    assert "They differ with scaling in shadow, seed 0" in text
    assert "- waits: seed 0: nothing was done, and yet the weights differ" in text
    assert "- scaling: seed 1: not trained: InputError: wrong" in text
    assert "| scaling | not trained |" in text


def test_an_impossible_training_is_a_row_with_its_error(tmp_path: Path) -> None:
    job = Job(task=TINY, seed=0, kind="active", intervention="x", policies=["zlcip"])
    assert "did you mean 'zclip'" in run_job(job, tmp_path)["error"]


def test_a_killed_study_resumes_where_it_was(
    jobs: list[Job], rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw.jsonl"
    failed = {**rows[-1], "error": "killed"}
    raw.write_text("\n".join(map(json.dumps, [*rows[:-2], failed])) + '\n{"task": "vani')
    known = {row["key"]: row for row in rows}
    done: list[Job] = []

    def in_this_process(left: Sequence[Job], workers: int, folder: Path) -> Iterator[Row]:
        for job in left:
            done.append(job)
            yield known[job.key]

    monkeypatch.setattr(policies, "run", in_this_process)
    assert policies._rows(jobs, 1, raw) == rows
    assert done == jobs[-2:]
    assert len(read_rows(raw)) == len(rows)


def test_other_settings_are_another_training(jobs: list[Job]) -> None:
    assert replace(jobs[0], task=replace(TINY, lr=0.2)).key != jobs[0].key
    assert replace(jobs[0], task=replace(TINY, about="Said better.")).key == jobs[0].key
