"""`ulysses train` on streams, tokenised rows and several sets of held-out rows."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

import ulysses_monitor as um

pytestmark = [pytest.mark.usefixtures("compiled_deepspeed"), pytest.mark.timeout(600)]

SFT = {"stage": "sft", "dataset": "pairs", "template": "default", "logging_steps": 1}
PLAIN = {"deepspeed": None, "sequence_parallel_size": 1}
STREAM: dict[str, Any] = {"streaming": True, "buffer_size": 20, "preprocessing_batch_size": 10}
PAIRS = {
    "ranking": True,
    "columns": {"prompt": "instruction", "chosen": "output", "rejected": "other"},
}
TAGGED = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"}}
OF_STAGE: dict[str, dict[str, Any]] = {
    "pt": {"stage": "pt", "dataset": "text"},
    "sft": {"packing": True},
    "rm": {"stage": "rm", "dataset": "preferred"},
    "dpo": {"stage": "dpo", "dataset": "preferred"},
    "kto": {"stage": "kto", "dataset": "tagged", "finetuning_type": "lora"},
}


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    world = make_world()
    data = world.path / "data"
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"other": f"wrong {number}", "tag": number % 2 == 0}
    (data / "rows.json").write_text(json.dumps(rows))
    info = json.loads((data / "dataset_info.json").read_text())
    info["preferred"] = {"file_name": "rows.json", **PAIRS}
    info["tagged"] = {"file_name": "rows.json", **TAGGED}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return world


def train(world: Any, name: str, **settings: Any) -> pd.DataFrame:
    world.config(f"{name}.yaml", **SFT | settings | {"output_dir": f"runs/{name}"})
    done = world.run("train", f"{name}.yaml", timeout=240)
    assert done.returncode == 0, done.stderr
    frame = um.open_run(world.path / "runs" / name).metrics("train/*", "eval/*", "grad/norm/total")
    assert frame.loc[1:, "grad/norm/total"].gt(0).all()
    return frame


def test_a_stream_is_the_same_for_ranks_that_share_rows_as_for_one_process(world: Any) -> None:
    names = ("train/loss/total", "grad/norm/total", "eval/loss/total")
    alone = train(world, "alone", **STREAM, **PLAIN)
    shared = train(world, "shared", **STREAM)
    pd.testing.assert_frame_equal(
        alone[list(names)], shared[list(names)], rtol=1e-3, check_like=True
    )


@pytest.mark.parametrize(
    "stage",
    [pytest.param(name, marks=() if name == "kto" else pytest.mark.full) for name in OF_STAGE],
)
def test_every_stage_trains_on_a_stream(world: Any, stage: str) -> None:
    train(world, f"stream-{stage}", **STREAM, **OF_STAGE[stage])


def test_a_stream_needs_max_steps(world: Any) -> None:
    world.config("endless.yaml", **SFT | STREAM | {"max_steps": None})
    done = world.run("train", "endless.yaml", "--dry-run")
    assert done.returncode == 2
    assert "streaming is true, but max_steps is not set" in done.stderr


def test_rows_are_tokenised_by_the_first_run_and_only_read_by_later_ones(world: Any) -> None:
    kept = {"tokenized_path": "rows"}
    first = train(world, "first", **kept, **PLAIN)
    later = train(world, "later", dataset=None, val_size=None, **kept, **PLAIN)
    pd.testing.assert_series_equal(first["train/loss/total"], later["train/loss/total"])
    world.config("wrong.yaml", **SFT | kept | PLAIN | {"cutoff_len": 16})
    done = world.run("train", "wrong.yaml", "--dry-run")
    assert done.returncode == 2
    assert "tokenized_path rows: its rows have cutoff_len 32; cutoff_len is 16" in done.stderr


@pytest.mark.parametrize("stage", ["sft", pytest.param("kto", marks=pytest.mark.full)])
def test_each_eval_dataset_has_its_own_loss(world: Any, stage: str) -> None:
    settings: dict[str, Any] = {"val_size": None, "eval_on_each_dataset": True}
    settings["eval_dataset"] = "tagged" if stage == "kto" else "pairs,more"
    info = json.loads((world.path / "data/dataset_info.json").read_text())
    info["more"] = info["pairs"]
    (world.path / "data/dataset_info.json").write_text(json.dumps(info))
    frame = train(world, f"each-{stage}", **OF_STAGE[stage] | settings)
    for name in settings["eval_dataset"].split(","):
        assert frame[f"eval/{name}_loss/total"].notna().sum() == 2


def test_a_wrong_row_far_into_a_file_is_one_line_on_every_rank(world: Any) -> None:
    rows = [{"instruction": "q", "output": "a"}] * 1500
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "q"}])
    (world.path / "data/far.jsonl").write_text(text)
    info = json.loads((world.path / "data/dataset_info.json").read_text())
    (world.path / "data/dataset_info.json").write_text(
        json.dumps(info | {"far": {"file_name": "far.jsonl"}})
    )
    world.config("far.yaml", **SFT | {"dataset": "far", "output_dir": "runs/far"})
    done = world.run("train", "far.yaml")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "far.jsonl" in line]
    assert len(lines) == 1
    assert "far.jsonl, line 1501: column 'output' (response) is missing" in lines[0]
