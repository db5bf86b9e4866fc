"""Wrong input gives one line on standard error and exit code 2; nothing starts or is written."""

from __future__ import annotations

import fcntl
import json
import sys

import pytest
import typer

from ulysses_core.cli import main


@pytest.fixture
def ulysses(world, monkeypatch, capsys):
    """Runs the command line in this process, and returns its exit code and standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(world.path)
        monkeypatch.setattr("sys.argv", ["ulysses", *arguments])
        monkeypatch.setattr("ulysses_core.cli.train.launch", _must_not_launch)
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return run


def _must_not_launch(*_: object) -> int:
    raise AssertionError("processes were started for wrong input")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.yaml"], "config none.yaml: no such file"),
        (
            ["pt.yaml", "lerning_rate=1"],
            "unknown key 'lerning_rate' (did you mean 'learning_rate'?)",
        ),
        (["pt.yaml", "dataset=txt"], "dataset 'txt' is not in"),
        (["pt.yaml", "dataset_dir=nowhere"], "dataset_dir is 'nowhere', which is not a folder"),
        (["pt.yaml", "dataset=", "val_size=0"], "dataset is not set"),
        (["pt.yaml", "--nproc", "3"], "does not divide 3 processes; allowed: 1, 3, or start 2"),
        (["pt.yaml", "--nproc", "0"], "--nproc is 0; expected an integer of 1 or more"),
        (
            ["pt.yaml", "tokenizer_name_or_path=./nope"],
            "tokenizer_name_or_path is './nope', but there is no such folder; expected a folder",
        ),
        (["pt.yaml", "tokenizer_name_or_path=runs/none"], "such folder (make train creates it)"),
        (["pt.yaml", "resume_from_checkpoint=true"], "but runs/pt has no checkpoints"),
        (
            ["pt.yaml", "resume_from_checkpoint=runs/x"],
            "resume_from_checkpoint is 'runs/x', but there is no such folder",
        ),
        (
            ["pt.yaml", "model_config.max_position_embeddings=16"],
            "cutoff_len is 32, but the model has 16 positions; set cutoff_len=16",
        ),
        (["pt.yaml", "loss_chunk=0"], "loss_chunk is 0; expected an integer above 0"),
        ([], "Missing argument 'CONFIG'"),
        (["pt.yaml", "--bogus"], "No such option: --bogus"),
    ],
)
def test_wrong_arguments_are_refused(world, ulysses, arguments, expected):
    world.config()
    code, error = ulysses("train", *arguments)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert not (world.path / "runs").exists()


def test_a_missing_data_file_is_named(world, ulysses):
    world.config()
    (world.path / "data/text.jsonl").unlink()
    code, error = ulysses("train", "pt.yaml")
    assert code == 2
    assert "text.jsonl" in error


def test_a_broken_row_is_named_by_file_and_line(world, ulysses):
    world.config()
    with (world.path / "data/text.jsonl").open("a") as file:
        file.write('{"text": \n')
    code, error = ulysses("train", "pt.yaml")
    assert code == 2
    assert "text.jsonl" in error
    assert "line 121" in error
    assert error.count("\n") == 1


def test_a_config_that_is_not_yaml_is_refused(world, ulysses):
    (world.path / "bad.yaml").write_text("stage: [pt\n")
    code, error = ulysses("train", "bad.yaml")
    assert code == 2
    assert "bad.yaml, line" in error
    assert "not valid YAML" in error


def test_a_directory_with_a_run_is_refused_and_unchanged(world, ulysses):
    world.config()
    run = world.path / "runs/pt"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": "old"}))
    code, error = ulysses("train", "pt.yaml")
    assert code == 2
    assert "already holds a run" in error
    assert [p.name for p in run.iterdir()] == ["run.json"]


def test_a_directory_in_use_is_refused_even_for_overwriting(world, ulysses):
    world.config()
    run = world.path / "runs/pt"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, error = ulysses("train", "pt.yaml", "overwrite_output_dir=true")
    assert code == 2
    assert "in use by a running training" in error


def test_a_report_of_a_folder_without_a_run_is_refused(world, ulysses):
    code, error = ulysses("report", "data")
    assert code == 2
    assert "no run.json there" in error


def test_dry_run_prints_the_plan_and_writes_nothing(world, ulysses):
    world.config()
    code, _ = ulysses("train", "pt.yaml", "--dry-run")
    assert code == 0
    assert not (world.path / "runs").exists()


def test_doctor_shows_the_heads_of_each_rank(world, monkeypatch, capsys):
    world.config()
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["ulysses", "doctor", "pt.yaml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "2: 1 data-parallel x 2 sequence-parallel" in out
    assert "2, 2" in out
    assert "1, 1" in out
    assert "exchange" in out
    assert "a rank sends" in out
    assert "per micro-batch" in out
    assert "about" in out


def test_doctor_suggests_settings_if_memory_is_too_small(world, monkeypatch, capsys):
    monkeypatch.setattr("ulysses_core.cli.doctor._memory_per_process", lambda _: 1 << 20)
    world.config()
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["ulysses", "doctor", "pt.yaml"])
    with pytest.raises(SystemExit):
        main()
    out = " ".join(capsys.readouterr().out.split())
    assert "does not fit in memory; add in this order: gradient_checkpointing=true" in out


def test_a_typer_without_an_exception_of_its_own_is_enough(capsys, monkeypatch):
    """As in typer 0.25, which axolotl pins."""
    monkeypatch.delattr(typer, "TyperException", raising=False)
    monkeypatch.setattr(sys, "argv", ["ulysses", "no-such-command"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("ulysses: No such command")
