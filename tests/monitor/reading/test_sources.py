"""Runs of other tools: TensorBoard files and a Trainer's state; and runs at URLs."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

import ulysses_monitor as um
from tests.support.recorded import training, write_run
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Event
from ulysses_monitor.report import write_report


@pytest.fixture(scope="session")
def trainer_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a real Trainer: checkpoints, its state, and its TensorBoard files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer") / "output"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=31,
        max_position_embeddings=32,
    )
    rows = [torch.randint(0, 31, (9,)) for _ in range(32)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
        arguments = TrainingArguments(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            report_to="tensorboard",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            LlamaForCausalLM(config), arguments, train_dataset=data, eval_dataset=data[:8]
        )
        trainer.train()
    trainer.save_state()
    return folder


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of a folder in fsspec's memory."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def upload(folder: Path, url: str) -> None:
    fsspec.filesystem("memory").put(str(folder), url.removeprefix("memory:/"), recursive=True)


# -- TensorBoard -------------------------------------------------------------------------------


def test_only_scalars_are_read_in_either_form(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 21):
            writer.add_scalar("Loss/test", 1 / step, step, 1e9 + step)
            writer.add_scalar("acc", step, step, 1e9 + step, new_style=True)
            writer.add_scalar(
                "wide", step * 2, step, 1e9 + step, new_style=True, double_precision=True
            )
        writer.add_histogram("weights", np.arange(10.0), 1)
        writer.add_text("notes", "hello", 1)
        writer.add_image("picture", np.zeros((3, 40, 40), np.uint8), 1)
        writer.add_scalar("broken", math.nan, 3, 1e9)
        writer.add_scalar("broken", math.inf, 4, 1e9)
    run = um.open_run(tmp_path)
    frame = run.metrics()
    assert run.names() == list(frame) == ["Loss/test", "acc", "wide", "broken"]
    assert frame["Loss/test"].to_numpy() == pytest.approx(1 / np.arange(1, 21))
    assert frame["acc"].tolist() == list(range(1, 21))
    assert frame["wide"].tolist() == list(range(2, 41, 2))
    assert frame["broken"].loc[4] == math.inf
    assert run.times().iloc[9] == 1e9 + 10
    assert run.metrics("acc", times=(1e9 + 5, 1e9 + 6), points=2).index.tolist() == [5, 6]
    assert run.events().empty
    assert run.info | {"starts": [], "ended": 0} == {
        "name": tmp_path.name,
        "status": "unknown",
        "format": "TensorBoard",
        "starts": [],
        "ended": 0,
    }
    assert not run.damaged


def test_the_values_equal_those_of_tensorboards_own_reader(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draw = np.random.default_rng(0)
    for _ in range(2):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(200):
                for tag in ("a/b", "Reward", "grad/norm/total"):
                    writer.add_scalar(tag, draw.standard_normal(), step)
        time.sleep(1.1)  # the names of the files, and so their order, hold the time in seconds
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    theirs.Reload()
    frame = um.open_run(tmp_path).metrics()
    for tag in theirs.Tags()["scalars"]:
        last = {event.step: event.value for event in theirs.Scalars(tag)}
        assert frame[tag].to_dict() == last


def test_a_growing_file_is_followed_and_a_torn_record_waits(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    run = um.open_run(tmp_path)
    assert run.metrics().index.tolist() == [1]
    writer.add_scalar("loss", 2.0, 2)
    writer.close()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert run.metrics().index.tolist() == [1]
    file.write_bytes(whole)
    assert run.metrics().index.tolist() == [1, 2]
    assert not run.damaged


def test_a_damaged_record_is_skipped_and_a_damaged_length_ends_the_file(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("loss", float(step), step)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    at = whole.index(b"loss", whole.index(b"loss", whole.index(b"loss") + 1) + 1)
    file.write_bytes(whole[: at + 8] + b"\xff" + whole[at + 9 :])
    run = um.open_run(tmp_path)
    assert run.metrics().index.tolist() == [1, 2, 4, 5]
    assert run.damaged == {file.name: "records with a wrong checksum, skipped: 1"}
    begin = whole.rindex(b"loss") - 30
    file.write_bytes(whole[:begin] + b"\x01" * 12 + whole[begin + 12 :])
    run = um.open_run(tmp_path)
    assert run.metrics().index.tolist()[:3] == [1, 2, 3]
    assert 5 not in run.metrics().index
    assert list(run.damaged) == [file.name]


def test_a_damaged_text_and_a_file_of_another_kind_are_named(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1)
        writer.add_text("notes", "x" * 10_000, 2)
        writer.add_scalar("loss", 3.0, 3)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    at = whole.index(b"notes") - 4
    file.write_bytes(whole[:at] + b"\xff" * 24 + whole[at + 24 :])
    (tmp_path / "other.tfevents").write_bytes(b"this is no event file at all")
    run = um.open_run(tmp_path)
    assert run.metrics()["loss"].to_dict() == {1: 1.0, 3: 3.0}
    assert set(run.damaged) == {file.name, "other.tfevents"}


def test_a_folder_of_tensorboard_runs_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("first", "deep/second"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("loss", 1.0, 1)
    with pytest.raises(
        InputError, match="holds 2 TensorBoard runs; expected one: deep/second, first"
    ):
        um.open_run(tmp_path)
    assert um.open_run(tmp_path / "deep/second").names() == ["loss"]


def test_two_tags_never_share_a_name(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/loss", 1.0, 1)
        writer.add_scalar("train/loss/total", 2.0, 1)
        writer.add_scalar("eval/rouge-l", 3.0, 1)
        writer.add_scalar("eval/rouge l", 4.0, 1)
    row = um.open_run(tmp_path).metrics().loc[1].to_dict()
    assert row == {
        "train/loss": 1.0,
        "train/loss/total": 2.0,
        "eval/rouge_l/total": 3.0,
        "eval/rouge l": 4.0,
    }


def test_the_tensorboard_files_of_our_own_runs_keep_their_names(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for name in ("train/loss/total", "grad/norm/layer/3", "optim/lr/0"):
            writer.add_scalar(name, 1.0, 1)
    assert um.open_run(tmp_path).names() == ["train/loss/total", "grad/norm/layer/3", "optim/lr/0"]


# -- trainer_state.json ------------------------------------------------------------------------


def test_a_trainers_log_gets_our_names(trainer_output: Path) -> None:
    run = um.open_run(trainer_output)
    logs = json.loads((trainer_output / "trainer_state.json").read_text())["log_history"]
    frame = run.metrics()
    assert frame.index.tolist() == [1, 2, 3, 4, 5, 6]
    losses = {log["step"]: log["loss"] for log in logs if "loss" in log}
    assert frame["train/loss/total"].to_dict() == pytest.approx(losses, rel=1e-6)
    assert {"eval/loss/total", "grad/norm/total", "optim/lr/0"} <= set(frame.columns)
    assert frame["eval/loss/total"].dropna().index.tolist() == [2, 4, 6]
    summary = run.summary()
    assert (summary["name"], summary["status"], summary["steps"]) == ("output", "finished", 6)
    assert summary["loss_first"] == pytest.approx(np.mean(list(losses.values())[:5]), rel=1e-6)
    assert run.times().isna().all()
    with pytest.raises(InputError, match="recorded no times"):
        run.metrics(times=(0, 1))


def test_a_trainers_tensorboard_files_equal_its_state(trainer_output: Path) -> None:
    state = um.open_run(trainer_output).metrics()
    board = um.open_run(trainer_output / "logs").metrics()
    assert set(board.columns) <= set(state.columns)
    assert {"train/loss/total", "eval/loss/total", "grad/norm/total", "optim/lr/0"} <= {*board}
    for name in board:
        pd.testing.assert_series_equal(board[name].dropna(), state[name].dropna(), rtol=1e-6)


def test_a_checkpoint_a_state_file_and_an_output_dir_without_one_open(
    trainer_output: Path, tmp_path: Path
) -> None:
    def last(place: Path) -> int:
        return int(um.open_run(place).metrics("train/loss/*").index.max())

    assert last(trainer_output / "checkpoint-4") == 4
    assert last(trainer_output / "checkpoint-2/trainer_state.json") == 2
    for step in (2, 10, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": step, "loss": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (tmp_path / "checkpoint-99").mkdir()  # still being written
    assert last(tmp_path) == 10
    assert um.open_run(tmp_path).info["status"] == "unknown"


def test_log_entries_that_are_not_numbers_are_skipped(tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": "nan", "note": "text", "flag": True, "deep": {"a": 1}},
        {"loss": 3.0},
        "no log",
        {"step": 2, "loss": math.inf, "rewards/chosen": 0.5, "eval_rouge-l": 1},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    frame = um.open_run(tmp_path).metrics()
    assert list(frame) == ["train/loss/total", "train/rewards/chosen/total", "eval/rouge_l/total"]
    assert frame["train/loss/total"].tolist() == pytest.approx([math.nan, math.inf], nan_ok=True)


@pytest.mark.parametrize("content", ['{"log_hi', "[]", "3"])
def test_a_damaged_state_is_an_input_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        um.open_run(tmp_path).metrics()


# -- URLs --------------------------------------------------------------------------------------


def test_a_run_at_a_url_reads_like_a_local_one(tmp_path: Path, memory: str) -> None:
    alert = Event(kind="alert", step=2, time=1.0, data={"rule": "spike"})
    here = write_run(tmp_path / "run", [*training(5), alert])
    upload(tmp_path / "run", f"{memory}/run")
    there = um.open_run(f"{memory}/run")
    pd.testing.assert_frame_equal(there.metrics(), here.metrics())
    assert there.names() == here.names()
    assert there.info == here.info
    assert there.summary() == here.summary()
    assert there.alerts()["rule"].tolist() == ["spike"]


def test_runs_of_other_tools_open_at_a_url(
    tmp_path: Path, memory: str, trainer_output: Path
) -> None:
    with SummaryWriter(str(tmp_path / "board")) as writer:
        writer.add_scalar("loss", 1.0, 1)
    upload(tmp_path / "board", f"{memory}/board")
    upload(trainer_output / "checkpoint-4", f"{memory}/output/checkpoint-4")
    assert um.open_run(f"{memory}/board").metrics()["loss"].tolist() == [1.0]
    assert um.open_run(f"{memory}/output").metrics("train/loss/*").index.tolist() == [1, 2, 3, 4]


def test_nothing_is_written_to_a_url(tmp_path: Path, memory: str) -> None:
    write_run(tmp_path / "run", training(3))
    upload(tmp_path / "run", f"{memory}/run")
    run = um.open_run(f"{memory}/run")
    with pytest.raises(InputError, match=r"is a URL, .* name a local file"):
        write_report(run)
    with pytest.raises(InputError, match="not on this machine"):
        _ = run.path
    assert write_report(run, tmp_path / "here.html").is_file()


def test_a_run_at_a_url_is_never_called_crashed(tmp_path: Path, memory: str) -> None:
    write_run(tmp_path / "run", training(3), None)
    upload(tmp_path / "run", f"{memory}/run")
    assert um.open_run(tmp_path / "run").info["status"] == "crashed"
    assert um.open_run(f"{memory}/run").info["status"] == "running"


@pytest.mark.parametrize("place", ["nowhere", "memory://nowhere", "nonsense://bucket/run"])
def test_a_place_without_a_run_is_refused_in_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        um.open_run(place)
    assert str(caught.value).startswith(f"run {place}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="expected a run directory"):
        um.open_run(tmp_path / "notes.txt")


# -- the report --------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>"


def test_the_report_of_another_tools_run_shows_what_it_has(
    trainer_output: Path, tmp_path: Path
) -> None:
    html = write_report(um.open_run(trainer_output), tmp_path / "state.html").read_text()
    for heading in ("Loss", "Gradient norms"):
        assert f">{heading}</h2>" in html
    board = write_report(um.open_run(trainer_output / "logs"))
    assert board == trainer_output / "logs/report.html"
    assert ">Loss</h2>" in board.read_text()


def test_names_in_another_tools_run_are_escaped_in_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)<"
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 5):
            writer.add_scalar(f"grad/norm/param/{EVIL}", 1.0, step)
            writer.add_scalar(f"eval/{EVIL}/total", 1.0, step)
            writer.add_scalar("grad/norm/total", 1.0, step)
            writer.add_scalar("train/loss", 1.0, step)
    html = write_report(um.open_run(folder)).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def state(**more: Any) -> str:
    return json.dumps({"log_history": [{"step": 1, "loss": 1.0}], **more})


def test_the_report_of_a_state_file_is_written_beside_it(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(state(trial_name=EVIL))
    path = write_report(um.open_run(tmp_path / "trainer_state.json"))
    assert path == tmp_path / "report.html"
    assert "<script" not in path.read_text()
