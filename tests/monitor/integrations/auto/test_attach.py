"""The parts of `ulysses attach` that work within the command's processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ulysses_monitor as um
from tests.support.spawn import spawn
from ulysses_monitor.common.errors import TrainingStoppedError
from ulysses_monitor.integrations.auto import (
    AttachSettings,
    Note,
    check_first_place,
    choose_place,
    read_notes,
    write_note,
)
from ulysses_monitor.integrations.auto.places import origin
from ulysses_monitor.integrations.auto.settings import STARTUP
from ulysses_monitor.session.places import Place
from ulysses_monitor.session.session import Session
from ulysses_monitor.session.settings import MonitorSettings
from ulysses_monitor.store import RunDirectory

# -- settings ---------------------------------------------------------------------------------


def test_settings_survive_the_environment_and_the_startup_folder_comes_first(tmp_path):
    settings = AttachSettings(
        run_dir=tmp_path / "a run",
        command_id="x",
        notes=tmp_path / "notes",
        monitor=MonitorSettings(sample_every=3, if_exists="resume", tensorboard=False),
    )
    environment = settings.environment({"PYTHONPATH": f"mine{os.pathsep}{STARTUP}", "OTHER": "1"})
    assert AttachSettings.from_environment(environment) == settings
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(STARTUP), "mine"]
    assert environment["OTHER"] == "1"
    assert settings.environment({})["PYTHONPATH"] == str(STARTUP)
    minimal = AttachSettings(run_dir=tmp_path, command_id="x")
    assert AttachSettings.from_environment(minimal.environment({})) == minimal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ULYSSES_ATTACH: "),
        ('{"run_dir": "relative", "command_id": "x"}', "expected an absolute path"),
        ('{"run_dir": "/x"}', "command_id is missing"),
        ('{"run_dir": "/x", "command_id": "x", "monitor": {"sample_every": 0}}', "sample_every"),
        ('{"run_dir": "/x", "command_id": "x", "monitor": {"tensorboard": "yes"}}', "tensorboard"),
        ('{"run_dir": "/x", "command_id": "x", "monitor": {"if_exists": "ask"}}', "if_exists"),
    ],
)
def test_a_damaged_setting_is_named(text, message):
    with pytest.raises(um.InputError, match=message):
        AttachSettings.from_environment({"ULYSSES_ATTACH": text})


def test_without_settings_the_error_says_how_to_start_the_command():
    with pytest.raises(um.InputError, match="ULYSSES_ATTACH is not set; start the command with"):
        AttachSettings.from_environment({})


# -- notes ------------------------------------------------------------------------------------


def test_notes_are_read_once_each_in_order_and_dropped_if_nobody_reads(tmp_path):
    path = tmp_path / "notes"
    write_note(path, Note("made"))
    write_note(None, Note("made"))
    assert not path.exists()
    path.touch()
    for note in (Note("made"), Note("recorded", "/a"), Note("made"), Note("failed", "why, so\n")):
        write_note(path, note)
    assert read_notes(path) == [Note("made"), Note("recorded", "/a"), Note("failed", "why, so\n")]


# -- places -----------------------------------------------------------------------------------


def settings_for(folder: Path, command_id: str = "now", **monitor: Any) -> AttachSettings:
    return AttachSettings(
        run_dir=folder / "demo", command_id=command_id, monitor=MonitorSettings(**monitor)
    )


def leave_run(path: Path, settings: AttachSettings | None = None, output_dir: str = "out") -> None:
    path.mkdir(parents=True, exist_ok=True)
    config = {} if settings is None else {"attach": origin(settings, output_dir)}
    (path / "run.json").write_text(json.dumps({"config": config}))


def test_later_trainings_of_a_command_get_numbers_and_skip_existing_runs(tmp_path):
    settings = settings_for(tmp_path)
    assert choose_place(settings, "out", 0) == Place(tmp_path / "demo", "new")
    leave_run(tmp_path / "demo", settings)
    (tmp_path / "demo-2").touch()
    leave_run(tmp_path / "demo-3")
    used = RunDirectory(tmp_path / "demo-4")
    assert choose_place(settings, "out", 0).run_dir.name == "demo-5"
    used.release()


@pytest.mark.parametrize("if_exists", ["resume", "overwrite"])
def test_only_runs_of_this_family_are_replaced_or_continued(tmp_path, if_exists):
    before = settings_for(tmp_path, "before")
    now = settings_for(tmp_path, "now", if_exists=if_exists)
    leave_run(tmp_path / "demo")  # the user named this one, so anybody's
    leave_run(tmp_path / "demo-2")  # another's experiment, by chance of this name
    leave_run(tmp_path / "demo-3", before)
    taken = []
    for _ in range(3):
        place = choose_place(now, "out", 0)
        assert place.if_exists == if_exists
        leave_run(place.run_dir, now)
        taken.append(place.run_dir.name)
    assert taken == ["demo", "demo-3", "demo-4"]


def test_a_resumed_training_is_found_by_its_output_dir(tmp_path):
    before = settings_for(tmp_path, "before")
    leave_run(tmp_path / "demo", before, "a")
    leave_run(tmp_path / "demo-2", before, "b")
    resume = settings_for(tmp_path, if_exists="resume")
    assert choose_place(resume, "b", 10) == Place(tmp_path / "demo-2", "resume")
    # Of another start of the command, and not asked to continue: a place of its own.
    assert choose_place(settings_for(tmp_path), "b", 10) == Place(tmp_path / "demo-3", "new")
    # Of this very start: it simply goes on.
    same = settings_for(tmp_path, "before")
    assert choose_place(same, "a", 10) == Place(tmp_path / "demo", "resume")


@pytest.mark.parametrize("text", ["", "[]", '{"config": null}', '{"config": {"attach": 1}}'])
def test_a_run_json_without_our_entry_belongs_to_somebody_else(tmp_path, text):
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    place = choose_place(settings_for(tmp_path, if_exists="overwrite"), "out", 0)
    assert place.run_dir.name == "demo"  # named by the user
    assert choose_place(settings_for(tmp_path), "out", 5).run_dir.name == "demo-3"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(um.InputError, match="cannot be written"):
        check_first_place(tmp_path / "a/b", "refuse")


# -- the start of a process -------------------------------------------------------------------


def python(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ULYSSES_ATTACH")}
    before = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    env["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *map(str, path), *before])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        cwd="/",  # `python -c` looks there first
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


WAITS = "import sys; print([type(f).__name__ for f in sys.meta_path].count('_WaitForTrainer'))"


def test_without_settings_nothing_waits_for_a_trainer(tmp_path):
    assert python(WAITS).stdout == "0\n"
    assert python(WAITS, ULYSSES_ATTACH="{}").stdout == "1\n"


def test_the_shadowed_sitecustomize_runs_and_fails_as_it_would_alone(tmp_path):
    own = tmp_path / "sitecustomize.py"
    own.write_text("import sys\nsys.own = __name__\n")
    code = "import sys; print(sys.own, sys.modules['sitecustomize'].__file__)"
    assert python(code, tmp_path).stdout == f"sitecustomize {own}\n"
    path = "import sys; print(sys.path[1])"
    assert python(path, tmp_path).stdout == f"{tmp_path}\n"
    own.write_text("raise ValueError('mine')\n")
    assert "mine" in python("", tmp_path).stderr


def test_a_failure_while_attaching_is_one_line_and_a_note(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '4.9'\n")
    (tmp_path / "transformers/trainer.py").write_text("x = 1\n")
    # A stand-in for torch's world: this is about the start, and should start fast.
    package = tmp_path / "ulysses_monitor/integrations/auto"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    fails = "def install(module):\n    raise OSError(f'no\\n{module.x}')\n"
    (package / "callback.py").write_text(fails)
    notes = tmp_path / "notes"
    notes.touch()
    variables = {"ULYSSES_ATTACH": "{}", "ULYSSES_ATTACH_NOTES": str(notes)}
    code = "import transformers.trainer as t; print(t.x, type(t.__loader__).__name__)"
    done = python(code, tmp_path, **variables)
    assert done.stdout == "1 SourceFileLoader\n"
    assert done.stderr == "ulysses: training continues without the monitor: OSError: no 1\n"
    assert read_notes(notes) == [
        Note("started"),
        Note("failed", "OSError: no 1"),
        Note("imported", "transformers"),
    ]
    assert python(code, tmp_path, RANK="1", **variables).stderr == ""


def test_a_package_that_the_interpreter_lacks_is_taken_from_beside_the_startup_folder(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").touch()
    (tmp_path / "transformers/trainer.py").touch()
    code = (
        "import sys, importlib.util\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "sys.path[:] = [p for p in sys.path if 'python' in p or p.startswith(sys.argv[1])]\n"
        "assert importlib.util.find_spec('ulysses_monitor') is None\n"
        "before = list(sys.path)\n"
        "import transformers.trainer, ulysses_monitor\n"
        "print(ulysses_monitor.__file__, sys.path == before)\n"
    ).replace("sys.argv[1]", repr(str(tmp_path)))
    done = python(code, tmp_path, ULYSSES_ATTACH="{}")
    assert done.stdout == f"{Path(um.__file__)} True\n"


# -- agreement --------------------------------------------------------------------------------


def ask_around() -> list[str]:
    import torch.distributed as dist

    from ulysses_monitor.integrations.auto.agreement import NotAttachedError, agree

    rank = dist.get_rank()
    heard = [agree("1", "watch", 5), agree("2", "own" if rank else "watch", 5)]
    for silent in (0, 1):
        if rank == silent:
            heard.append("nothing")
            continue
        began = time.monotonic()
        try:
            agree(f"3 without {silent}", "watch", 0.5)
        except NotAttachedError as error:
            assert time.monotonic() - began < 10
            heard.append(str(error).partition(";")[0])
    dist.barrier()  # the connection is as good as before
    return heard


def test_ranks_agree_or_learn_that_some_are_not_attached():
    assert spawn(ask_around, 2, timeout=90) == [
        ["watch", "own", "nothing", "1 of 2 ranks are not attached"],
        ["watch", "own", "rank 0 is not attached", "nothing"],
    ]


# -- the callback -----------------------------------------------------------------------------


def train_with_the_callback(root: str) -> None:
    import transformers

    from tests.support.hf_cases import build_trainer
    from ulysses_monitor.integrations.auto.callback import AttachedCallback, install

    folder = Path(root)
    notes = folder / "notes"
    notes.touch()
    settings = AttachSettings(
        run_dir=folder / "run",
        command_id="s",
        notes=notes,
        monitor=MonitorSettings(tensorboard=False),
    )
    os.environ.update(settings.environment({}))
    install(transformers.trainer)

    check_a_failing_event_costs_neither_the_training_nor_the_record(build_trainer, folder)
    check_a_training_that_raised_ends_its_run_and_the_next_has_its_own(build_trainer, folder)
    trainer = build_trainer("plain", folder)
    (handed_on,) = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, AttachedCallback)
    ]
    build_trainer("plain", folder, callbacks=[handed_on]).train()
    check_a_requested_stop_is_not_swallowed(build_trainer, folder)
    check_replaced_default_callbacks_make_no_difference(build_trainer, folder)
    recorded = [n.text for n in read_notes(notes) if n.outcome == "recorded"]
    names = ("run", "run-2", "run-3", "run-4", "run-5", "run-6")
    assert recorded == [str(folder / name) for name in names]


def check_a_failing_event_costs_neither_the_training_nor_the_record(
    build_trainer: Any, folder: Path
) -> None:
    def fails(*args: Any) -> None:
        raise ValueError("not\na metric")

    original, Session.log = Session.log, fails  # type: ignore[method-assign]
    try:
        trainer = build_trainer("plain", folder, eval_strategy="steps", eval_steps=2)
        trainer.evaluate()  # before any training
        trainer.train()
    finally:
        Session.log = original  # type: ignore[method-assign]
    assert trainer.state.global_step == 4
    run = um.open_run(folder / "run")
    assert run.metrics("grad/norm/total").index.tolist() == [1, 2, 3, 4]
    assert run.info["status"] == "finished"
    failed = {(e["part"], e["error"]) for e in run.event_list() if e.get("state") == "failed"}
    assert failed == {(part, "ValueError: not a metric") for part in ("on_log", "on_evaluate")}


def check_replaced_default_callbacks_make_no_difference(build_trainer: Any, folder: Path) -> None:
    import transformers

    default = transformers.trainer.DEFAULT_CALLBACKS
    transformers.trainer.DEFAULT_CALLBACKS = [transformers.DefaultFlowCallback]  # as ms-swift does
    try:
        build_trainer("plain", folder).train()
    finally:
        transformers.trainer.DEFAULT_CALLBACKS = default
    assert um.open_run(folder / "run-6").metrics("grad/norm/total").index.tolist() == [1, 2, 3, 4]


def check_a_requested_stop_is_not_swallowed(build_trainer: Any, folder: Path) -> None:
    def stops(*args: Any) -> None:
        raise TrainingStoppedError("loss is NaN")

    original, Session.step_ends = Session.step_ends, stops  # type: ignore[assignment]
    try:
        with pytest.raises(TrainingStoppedError):
            build_trainer("plain", folder).train()
    finally:
        Session.step_ends = original  # type: ignore[method-assign]


def check_a_training_that_raised_ends_its_run_and_the_next_has_its_own(
    build_trainer: Any, folder: Path
) -> None:
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ArithmeticError

    trainer = build_trainer("plain", folder, callbacks=[Fails()])
    with pytest.raises(ArithmeticError):
        trainer.train()
    trainer.remove_callback(Fails)
    trainer.train()
    assert um.open_run(folder / "run-2").info["status"] == "failed"
    assert um.open_run(folder / "run-3").info["status"] == "finished"


def test_the_callback_keeps_trainings_and_their_runs_apart(tmp_path):
    spawn(train_with_the_callback, 1, args=[str(tmp_path)], timeout=120)
