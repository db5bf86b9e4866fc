"""``TrainingArguments(report_to="ulysses")`` after `um.register`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer
from tests.support.spawn import spawn
from ulysses_monitor.integrations.reporting import registration

QUIET = {"tensorboard": False}


@pytest.fixture(autouse=True)
def _unregistered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ULYSSES_RUN_DIR", raising=False)
    yield
    um.unregister()


def train(folder: Path, **more: Any) -> Any:
    trainer = build_trainer("plain", folder, **{"report_to": "ulysses", **more})
    trainer.train()
    return trainer


def steps(run: Path) -> list[int]:
    return list(um.open_run(run).metrics("grad/norm/total").index)


def norms(trainer: Any) -> list[float]:
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def test_a_training_is_watched_as_by_attach_and_the_next_one_gets_its_own_run(
    tmp_path: Path,
) -> None:
    bare = train(tmp_path / "bare", report_to="none")
    um.register(**QUIET, sample_every=2)
    trainer = train(tmp_path, report_to=["ulysses"])
    assert norms(trainer) == norms(bare)
    trainer.train()
    folder = tmp_path / "output"
    assert sorted(p.name for p in folder.iterdir()) == ["ulysses", "ulysses-2"]
    assert steps(folder / "ulysses") == steps(folder / "ulysses-2") == [1, 2, 3, 4]
    run = um.open_run(folder / "ulysses")
    found = run.metrics("grad/norm/total")["grad/norm/total"].tolist()
    assert found == pytest.approx(norms(bare), rel=1e-6)
    assert list(run.metrics("param/norm/total").dropna().index) == [1, 3]
    assert run.info["status"] == "finished"
    assert run.info["training_arguments"]["learning_rate"] == 1e-2


def test_a_second_start_gets_a_run_of_its_own_and_a_resumed_one_continues(tmp_path: Path) -> None:
    um.register(**QUIET)
    train(tmp_path, save_strategy="steps", save_steps=2)
    train(tmp_path, save_strategy="steps", save_steps=2)
    folder = tmp_path / "output"
    later = build_trainer("plain", tmp_path, report_to="ulysses", max_steps=6)
    later.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert steps(folder / "ulysses") == [1, 2, 3, 4]
    assert steps(folder / "ulysses-2") == [1, 2, 3, 4, 5, 6]
    assert not (folder / "ulysses-3").exists()


def test_the_environment_names_the_run_directory_and_the_call_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULYSSES_RUN_DIR", str(tmp_path / "named"))
    um.register(**QUIET)
    train(tmp_path, max_steps=1)
    um.register(tmp_path / "given", **QUIET)
    train(tmp_path, max_steps=1)
    assert steps(tmp_path / "named") == steps(tmp_path / "given") == [1]


def test_overwrite_replaces_an_earlier_run_but_never_one_of_this_process(tmp_path: Path) -> None:
    um.Monitor(tmp_path / "run", **QUIET).attach(
        trainer := build_trainer("plain", tmp_path, max_steps=2)
    )
    trainer.train()
    um.register(tmp_path / "run", if_exists="overwrite", **QUIET)
    train(tmp_path, max_steps=1)
    train(tmp_path, max_steps=3)
    assert (steps(tmp_path / "run"), steps(tmp_path / "run-2")) == ([1], [1, 2, 3])


def test_a_trainer_with_a_monitor_of_its_own_is_recorded_once(tmp_path: Path) -> None:
    um.register(**QUIET)
    trainer = build_trainer("plain", tmp_path, report_to="ulysses", max_steps=1)
    um.Monitor(tmp_path / "own", **QUIET).attach(trainer)
    trainer.train()
    assert steps(tmp_path / "own") == [1]
    assert not (tmp_path / "output/ulysses").exists()


def test_the_name_is_known_between_register_and_unregister_only(tmp_path: Path) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as CALLBACKS

    from ulysses_monitor.integrations.reporting import report, tracker

    before = dict(CALLBACKS)
    assert "ulysses" not in before, (report, tracker)  # their imports registered nothing
    with pytest.raises(ValueError, match="ulysses is not supported"):
        build_trainer("plain", tmp_path, report_to="ulysses")
    um.register()
    um.register()
    assert before | {"ulysses": report.ReportCallback} == CALLBACKS
    um.unregister()
    um.unregister()
    assert before == CALLBACKS


def test_a_class_that_was_registered_before_comes_back() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as CALLBACKS

    CALLBACKS["ulysses"] = int
    um.register()
    um.unregister()
    assert CALLBACKS.pop("ulysses") is int


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_every": 0}, "register: sample_every is 0; expected an integer of 1 or more"),
        ({"sample_evry": 1}, "register: .*sample_evry"),
        ({"run_dir": "s3://bucket"}, "run_dir is 's3://bucket'; expected a local directory"),
    ],
)
def test_a_wrong_setting_is_told_at_the_call(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(um.InputError, match=message):
        um.register(**settings)


def test_without_either_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registration, "is_installed", lambda _: False)
    with pytest.raises(um.InputError, match=r"pip install 'ulysses-toolkit\[trainers\]'"):
        um.register()


def train_on_two_ranks(folder: str) -> list[str]:
    um.register(**QUIET)
    for _ in range(2):
        train(Path(folder), max_steps=2)
    return sorted(p.name for p in Path(folder, "output").iterdir())


def test_two_ranks_record_one_run_for_each_training(tmp_path: Path) -> None:
    seen = spawn(train_on_two_ranks, 2, args=[str(tmp_path)], timeout=120)
    assert seen[0] == ["ulysses", "ulysses-2"]
    for name in seen[0]:
        run = um.open_run(tmp_path / "output" / name)
        assert (run.info["world_size"], run.info["engine"]) == (2, "ddp")
        assert run.metrics("grad/norm/total").index.tolist() == [1, 2]
