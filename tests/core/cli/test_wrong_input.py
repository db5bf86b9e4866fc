"""Wrong input: one line on standard error, exit code 2, nothing started and nothing written."""

from __future__ import annotations

import fcntl
import json

import pytest

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
        (["pt.yaml", "dataset_dir=nowhere"], "dataset_dir='nowhere' is not a folder"),
        (["pt.yaml", "dataset=", "val_size=0"], "dataset is not set"),
        (["pt.yaml", "--nproc", "3"], "must divide the number of processes: use one of [1, 3]"),
        (["pt.yaml", "--nproc", "0"], "--nproc is 0; allowed is 1 or more"),
        (
            ["pt.yaml", "tokenizer_name_or_path=./nope"],
            "tokenizer_name_or_path ./nope: no such folder",
        ),
        (["pt.yaml", "tokenizer_name_or_path=runs/none"], "no such folder; make train makes it"),
        (["pt.yaml", "resume_from_checkpoint=true"], "has no checkpoint to resume from"),
        (
            ["pt.yaml", "resume_from_checkpoint=runs/x"],
            "resume_from_checkpoint runs/x: no such folder",
        ),
        (
            ["pt.yaml", "model_config.max_position_embeddings=16"],
            "cutoff_len is 32 but the model has positions for 16: set cutoff_len=16",
        ),
        (["pt.yaml", "loss_chunk=0"], "loss_chunk"),
        ([], "Missing argument 'config'"),
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
    assert "not YAML" in error


def test_a_directory_that_holds_a_run_is_left_alone(world, ulysses):
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


def test_report_of_no_run_is_refused(world, ulysses):
    code, error = ulysses("report", "data")
    assert code == 2
    assert "no run.json there" in error


def test_dry_run_prints_the_plan_and_writes_nothing(world, ulysses):
    world.config()
    code, _ = ulysses("train", "pt.yaml", "--dry-run")
    assert code == 0
    assert not (world.path / "runs").exists()


def test_doctor_says_how_heads_fall_on_ranks(world, monkeypatch, capsys):
    world.config()
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["ulysses", "doctor", "pt.yaml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "data 1 x sequence 2" in out
    assert "2, 2" in out
    assert "1, 1" in out
    assert "exchange" in out
    assert "sent by a rank for each micro-batch" in out
    assert "about" in out


def test_doctor_says_what_to_switch_on_where_it_does_not_fit(world, monkeypatch, capsys):
    monkeypatch.setattr("ulysses_core.cli.doctor._memory_per_process", lambda _: 1 << 20)
    world.config()
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["ulysses", "doctor", "pt.yaml"])
    with pytest.raises(SystemExit):
        main()
    out = " ".join(capsys.readouterr().out.split())
    assert "it does not fit; switch on, in this order: gradient_checkpointing=true" in out
