"""Commands to a run that trains: what they may say, and the file that carries them."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.command import Command, parse_words
from ulysses_monitor.store import MirrorSink, RunDirectory
from ulysses_monitor.store.control_file import CONTROL_FILE, ControlFile, send_command

FULL: dict[str, Any] = {
    "id": "0123abcd",
    "who": "ada",
    "why": "The loss jumps.",
    "time": 1.5,
    "modes": {"*": "shadow", "clip": "off"},
    "lr_factors": {"*": 0.5, "1": 2},
    "save": True,
    "stop": False,
}


def command(**changes: Any) -> Command:
    return Command(**{"who": "ada", "save": True, **changes})


def line(**changes: Any) -> str:
    return command(**changes).to_json() + "\n"


def write(path: Path, text: str | bytes, mode: int = 0o600) -> None:
    """Writes the file anew, as the same file where it is there."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)


def all_of(control: ControlFile) -> list[str]:
    ids = []
    while (found := control.poll()) is not None:
        ids.append(found.id)
    return ids


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / CONTROL_FILE


@pytest.fixture
def control(tmp_path: Path) -> ControlFile:
    return ControlFile(tmp_path)


# What a command may say.


def test_a_command_survives_a_round_trip_through_json() -> None:
    given = Command(**FULL)
    assert "\n" not in given.to_json()
    assert Command.from_json(given.to_json()) == given
    assert Command.from_json(json.dumps(FULL)) == given


def test_two_commands_have_different_ids() -> None:
    one, other = command(), command()
    assert one.id != other.id
    assert one.time <= other.time


def test_a_command_is_described_in_plain_words() -> None:
    assert Command(**FULL).describe() == (
        "policies to shadow; policy clip to off; learning rate x 0.5; "
        "learning rate of group 1 x 2; save"
    )
    assert command(save=False, stop=True).describe() == "stop"
    assert command(save=False).describe() == "nothing"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id": ""}, "id is ''"),
        ({"id": "a b"}, "id is 'a b'"),
        ({"id": 7}, "id is 7"),
        ({"who": ""}, "who is ''"),
        ({"who": "x" * 501}, "1 to 500 printable characters"),
        ({"who": None}, "who is None"),
        ({"why": "x" * 501}, "0 to 500 printable characters"),
        ({"why": "a\x1b[2Jb"}, r"why is 'a\x1b[2Jb'"),
        ({"why": "a\nb"}, r"why is 'a\nb'"),
        ({"why": "a\u202eb"}, "why is"),
        ({"why": "\ud800"}, "why is"),
        ({"why": 1}, "why is 1"),
        ({"time": "now"}, "time is 'now'"),
        ({"time": -1}, "time is -1"),
        ({"time": float("nan")}, "time is nan"),
        ({"time": float("inf")}, "time is inf"),
        ({"time": 10**400}, "time is 1000"),
        ({"time": True}, "time is True"),
        ({"modes": ["off"]}, "modes is ['off']"),
        ({"modes": {"*": "on"}}, "the mode of policies is 'on'; allowed: off, shadow, active"),
        ({"modes": {"a": ["off"]}}, "the mode of policy a is ['off']"),
        ({"modes": {"": "off"}}, "a policy's name is ''"),
        ({"modes": {"a\n": "off"}}, "a policy's name is"),
        ({"lr_factors": 0.5}, "lr_factors is 0.5"),
        ({"lr_factors": {"*": -0.1}}, "lr_factor is -0.1; expected 0 to 10"),
        ({"lr_factors": {"1": 10.1}}, "lr_factor.1 is 10.1"),
        ({"lr_factors": {"1": float("nan")}}, "lr_factor.1 is nan"),
        ({"lr_factors": {"1": float("inf")}}, "lr_factor.1 is inf"),
        ({"lr_factors": {"1": True}}, "lr_factor.1 is True"),
        ({"lr_factors": {"1": "0.5"}}, "lr_factor.1 is '0.5'"),
        ({"lr_factors": {"01": 1}}, "a group of lr_factor is '01'"),
        ({"lr_factors": {"first": 1}}, "a group of lr_factor is 'first'"),
        ({"lr_factors": {"-1": 1}}, "a group of lr_factor is '-1'"),
        ({"save": 1}, "save is 1; allowed: true, false"),
        ({"stop": None}, "stop is None"),
        ({"sav": True}, "a key is 'sav'"),
        ({"sav": True}, "did you mean 'save'?"),
    ],
)
def test_a_wrong_field_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Command.from_json(json.dumps(FULL | changes))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["id", "who", "time"])
def test_a_missing_field_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is missing"):
        Command.from_json(json.dumps({k: v for k, v in FULL.items() if k != name}))


@pytest.mark.parametrize("text", ["", "save", "[]", "3", "{", "[" * 60_000, "9" * 5_000])
def test_anything_but_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Command.from_json(text)


@pytest.mark.parametrize("factor", [0, 0.0, 10, 10.0])
def test_the_bounds_of_a_factor_are_allowed(factor: float) -> None:
    assert command(lr_factors={"0": factor}).lr_factors["0"] == factor


# Words.


def test_words_become_fields() -> None:
    words = "policy=shadow policy.my.clip=off lr_factor=0.5 lr_factor.1=2e-1 save stop"
    fields = parse_words(words.split())
    assert fields == {
        "modes": {"*": "shadow", "my.clip": "off"},
        "lr_factors": {"*": 0.5, "1": 0.2},
        "save": True,
        "stop": True,
    }
    assert command(**fields).stop
    assert not command(**parse_words(["policy=off"])).save


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "the command is empty; allowed: policy=off|shadow|active"),
        ("polcy=off", "the command has 'polcy=off' (did you mean 'policy'?); allowed: policy="),
        ("lr=0.5", "the command has 'lr=0.5'"),
        ("policy", "the command has 'policy'"),
        ("save=true", "the command has 'save=true' (did you mean 'save'?)"),
        ("stop.now", "the command has 'stop.now'"),
        ("policy=on", "the mode of policies is 'on'; allowed: off, shadow, active"),
        ("policy.=off", "a policy's name is ''"),
        ("lr_factor=", "lr_factor is ''; expected 0 to 10"),
        ("lr_factor.1=half", "lr_factor.1 is 'half'"),
        ("lr_factor=nan", "lr_factor is nan"),
        ("lr_factor=11", "lr_factor is 11.0; expected 0 to 10"),
        ("lr_factor.all=1", "a group of lr_factor is 'all'"),
        ("save stop save", "'save' sets the same thing as an earlier word"),
        ("policy=off policy=active", "'policy=active' sets the same thing as an"),
        ("policy=off policy.*=off", "'policy.*=off' sets the same thing as an"),
        ("lr_factor.1=1 lr_factor.1=1", "'lr_factor.1=1' sets the same thing as an"),
    ],
)
def test_wrong_words_are_refused(words: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_words(words.split())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# From one process to the other.


def test_commands_arrive_in_order_and_once(tmp_path: Path, control: ControlFile) -> None:
    assert control.poll() is None
    sent = [command(why=str(i)) for i in range(3)]
    for each in sent[:2]:
        send_command(tmp_path, each)
    assert [control.poll(), control.poll(), control.poll()] == [*sent[:2], None]
    send_command(tmp_path, sent[2])
    assert [control.poll(), control.poll()] == [sent[2], None]
    assert control.problems() == []


def test_only_its_owner_can_read_and_write_the_file(tmp_path: Path, path: Path) -> None:
    before = os.umask(0)
    try:
        send_command(tmp_path, command())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_command_with_a_known_id_is_not_obeyed_again(path: Path, control: ControlFile) -> None:
    write(path, line(id="a") + line(id="a", stop=True) + line(id="b"))
    assert all_of(control) == ["a", "b"]
    write(path, line(id="b") + line(id="c"))
    assert all_of(control) == ["c"]
    assert control.problems() == []


def test_an_incomplete_line_waits_for_its_rest(path: Path, control: ControlFile) -> None:
    text = line(id="a")
    write(path, text[:20])
    assert control.poll() is None
    write(path, text[:-1])
    assert control.poll() is None
    write(path, text)
    assert all_of(control) == ["a"]
    assert control.problems() == []


def test_a_command_after_an_incomplete_line_is_complete(
    tmp_path: Path, path: Path, control: ControlFile
) -> None:
    write(path, line()[:20])
    send_command(tmp_path, command(id="a"))
    assert all_of(control) == ["a"]
    (problem,) = control.problems()
    assert "line 1" in problem


def test_a_truncated_replaced_or_removed_file_is_read_from_its_start(
    tmp_path: Path, path: Path, control: ControlFile
) -> None:
    write(path, line(id="a", why="long" * 20) + line(id="b"))
    assert all_of(control) == ["a", "b"]
    write(path, line(id="c"))
    assert all_of(control) == ["c"]
    write(path, line(id="d", why="longer" * 50))
    assert all_of(control) == ["d"]
    write(tmp_path / "other", line(id="e", why="longer" * 50))
    (tmp_path / "other").rename(path)
    assert all_of(control) == ["e"]
    path.unlink()
    assert all_of(control) == []
    send_command(tmp_path, command(id="f"))
    assert all_of(control) == ["f"]
    assert control.problems() == []


def test_commands_for_an_earlier_start_are_removed(tmp_path: Path, path: Path) -> None:
    send_command(tmp_path, command(id="a"))
    control = ControlFile(tmp_path)
    assert not path.exists()
    assert control.poll() is None


def test_a_link_left_by_an_earlier_start_is_removed_and_its_target_kept(
    tmp_path: Path, path: Path
) -> None:
    write(tmp_path / "target", line())
    path.symlink_to(tmp_path / "target")
    assert ControlFile(tmp_path).poll() is None
    assert not path.is_symlink()
    assert (tmp_path / "target").read_text()


@pytest.fixture
def fixed() -> Iterator[Path]:
    """A directory where this user may not remove files; root becomes another user for it."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, CONTROL_FILE)
        write(path, line(id="old"))
        if root:
            os.chown(path, 65534, 65534)
        Path(name).chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)
            Path(name).chmod(0o700)


def test_commands_that_an_earlier_start_left_unremovable_are_not_obeyed(fixed: Path) -> None:
    control = ControlFile(fixed)
    assert all_of(control) == []
    send_command(fixed, command(id="new"))
    assert all_of(control) == ["new"]
    write(fixed / CONTROL_FILE, "")
    assert all_of(control) == []
    send_command(fixed, command(id="first-of-the-new"))
    send_command(fixed, command(id="second-of-the-new"))
    assert all_of(control) == ["first-of-the-new", "second-of-the-new"]
    assert control.problems() == []


# Files and lines that are not obeyed.


def open_to_others(path: Path) -> None:
    write(path, line(), 0o620)


def readable_by_others(path: Path) -> None:
    write(path, line(), 0o604)


def of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may change the owner of a file")
    write(path, line())
    os.chown(path, 65534, -1)


def symbolic_link(path: Path) -> None:
    write(path.with_name("target"), line())
    path.symlink_to(path.with_name("target"))


def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def hard_link(path: Path) -> None:
    write(path, line())
    path.with_name("second").hardlink_to(path)


def too_large(path: Path) -> None:
    write(path, line() + "\n" * (1 << 20))


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    "make",
    [
        open_to_others,
        readable_by_others,
        of_another_user,
        symbolic_link,
        dangling_link,
        hard_link,
        too_large,
        folder,
        pipe,
        unix_socket,
    ],
)
def test_an_unsafe_file_is_neither_obeyed_nor_written(
    make: Callable[[Path], None], path: Path, control: ControlFile
) -> None:
    make(path)
    before = sorted((p.name, p.lstat().st_size) for p in path.parent.iterdir())
    with pytest.raises(InputError, match="expected a file of your own"):
        send_command(path.parent, command())
    assert sorted((p.name, p.lstat().st_size) for p in path.parent.iterdir()) == before
    assert [control.poll() for _ in range(3)] == [None] * 3
    (problem,) = control.problems()
    assert str(path) in problem
    assert control.problems() == []


def test_a_file_is_obeyed_once_it_is_safe(path: Path, control: ControlFile) -> None:
    write(path, line(id="a"), 0o644)
    assert control.poll() is None
    path.chmod(0o600)
    assert all_of(control) == ["a"]


def test_invalid_lines_are_reported_once_and_the_others_obeyed(
    path: Path, control: ControlFile, caplog: pytest.LogCaptureFixture
) -> None:
    bad = ["junk", '{"id": "x"}', "[" * 50_000, json.dumps(FULL | {"sav": 1})]
    long = json.dumps(FULL | {"modes": {f"p{i}": "off" for i in range(9000)}})
    text = "\n".join([*bad, long, "", line(id="good")])
    with caplog.at_level(logging.WARNING):
        write(path, text.encode() + b"\xff\xfe\n" + b"\x00\x80junk" + b"\n")
        assert all_of(control) == ["good"]
        problems = control.problems()
        write(path, text + line(id="better"))
        assert all_of(control) == ["better"]
    assert control.problems() == []
    lines = [problem.removeprefix(f"{path}, line ").partition(":")[0] for problem in problems]
    assert lines == ["1", "2", "3", "4", "5", "8", "9"]
    assert "its size is" in problems[4]
    assert len(caplog.records) == len(problems)


def test_an_invalid_line_is_shown_without_its_escape_codes(
    path: Path, control: ControlFile
) -> None:
    write(path, json.dumps(FULL | {"who": "\x1b[31m" * 200}) + "\n")
    assert control.poll() is None
    (problem,) = control.problems()
    assert problem.isprintable()
    assert len(problem) < len(str(path)) + 200


def test_reports_of_invalid_lines_are_limited(path: Path, control: ControlFile) -> None:
    write(path, "".join(f"{i} junk\n" for i in range(5000)) + line(id="good"))
    assert all_of(control) == ["good"]
    assert len(control.problems()) == 100


def test_a_lost_run_directory_is_reported_once_and_may_come_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    control = ControlFile(run)
    run.rename(tmp_path / "away")
    assert control.poll() is None
    run.write_text("a file")
    assert [control.poll(), control.poll()] == [None, None]
    assert len(control.problems()) == 1
    run.unlink()
    (tmp_path / "away").rename(run)
    send_command(run, command(id="a"))
    assert all_of(control) == ["a"]


def test_a_command_that_no_run_would_read_is_not_sent(tmp_path: Path, path: Path) -> None:
    with pytest.raises(InputError, match="the command's size is"):
        send_command(tmp_path, command(modes={f"policy {i}": "off" for i in range(9000)}))
    assert not path.exists()
    write(path, "\n" * ((1 << 20) - 10))
    with pytest.raises(InputError, match=r"is full; .* remove it"):
        send_command(tmp_path, command())


def test_nothing_is_written_through_a_link(tmp_path: Path, path: Path) -> None:
    dangling_link(path)
    with pytest.raises(InputError):
        send_command(tmp_path, command())
    assert not (tmp_path / "nowhere").exists()


# The file and the rest of the run directory.


def test_a_run_that_overwrites_another_removes_its_commands(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    send_command(directory.path, command())
    directory.finish("stopped")
    RunDirectory(tmp_path / "run", "overwrite").release()
    assert not (tmp_path / "run" / CONTROL_FILE).exists()


def test_commands_are_not_mirrored(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    (directory.path / "events.jsonl").write_text("{}\n")
    send_command(directory.path, command())
    mirror = MirrorSink(directory.path, str(tmp_path / "copy"), every_seconds=0)
    mirror.flush()
    mirror.close()
    directory.release()
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["events.jsonl", "run.json"]
