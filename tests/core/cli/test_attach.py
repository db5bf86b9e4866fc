"""`ulysses attach` with real commands: output, exit codes and recorded runs."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import ulysses_monitor as um
from ulysses_core.cli import main

ULYSSES = (sys.executable, "-m", "ulysses_core.cli", "attach")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu")

TINY = '''
"""A tiny Trainer, as somebody's own script makes it."""
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments


def make(trainer_class=None, output_dir="output", callbacks=None, **more):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, vocab_size=31, max_position_embeddings=32)
    rows = [torch.randint(0, 31, (9,)) for _ in range(32)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none",
                "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **more}
    return (trainer_class or transformers.Trainer)(
        LlamaForCausalLM(config), TrainingArguments(output_dir, **settings), callbacks=callbacks,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows])
'''

SEVERAL = """
import os
import ulysses_monitor as um
from tiny import make
from transformers import Trainer

class AttachesItself(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made = "whole"

    def train(self, *args, **kwargs):
        um.Monitor("own/late").attach(self)
        return super().train(*args, **kwargs)

class Subclass(Trainer):
    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)

first = make(save_strategy="steps", save_steps=2, max_steps=4)
first.train()
make(callbacks=[um.MonitorCallback(um.Monitor("own/early"))]).train()
make(AttachesItself).train()
os.makedirs("elsewhere")
os.chdir("elsewhere")  # run directories do not move with it
make(Subclass, output_dir="../second").train()
os.chdir("..")
first.args.max_steps = 6
first.train(resume_from_checkpoint="output/checkpoint-4")
print("the end")
"""

# The first engine is one that the monitor does not know, the second is fine.
UNSUPPORTED = """
import os
import ulysses_monitor as um
from tiny import make
from ulysses_monitor.integrations import callback

original = callback.engine_of
def engine_of(trainer):
    raise um.InputError("engine of the future: not supported")
callback.engine_of = engine_of
make().train()
callback.engine_of = original
make().train()
print(f"rank {os.environ['RANK']} trained")
"""

FAILS = """
import sys
from tiny import make
from transformers import Trainer

class Fails(Trainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 3:
            print("about to leave", file=sys.stderr)
            sys.exit(3)
        return super().compute_loss(*args, **kwargs)

make(Fails, max_steps=9).train()
"""

SFT = """
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = ["<pad>", "<eos>", *"abcdef"]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, vocab_size=8, max_position_embeddings=32)
SFTTrainer(
    LlamaForCausalLM(config),
    args=SFTConfig("output", max_steps=2, report_to="none", use_cpu=True, bf16=False),
    train_dataset=Dataset.from_dict({"text": ["a b c d e f"] * 8}),
    processing_class=PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
).train()
"""

LOOP = """
from accelerate import Accelerator

accelerator = Accelerator(cpu=True, log_with="ulysses")
accelerator.init_trackers("project", config={"lr": 0.1})
accelerator.log({"loss": 2.0}, step=5)
accelerator.end_training()
"""

ENDLESS = "from tiny import make\nmake(max_steps=10**6, logging_steps=10**6).train()\n"


@dataclass
class Desk:
    """A folder with somebody's scripts, and `ulysses attach` in it."""

    path: Path

    def script(self, text: str, name: str = "script.py") -> str:
        (self.path / "tiny.py").write_text(TINY)
        (self.path / name).write_text(text)
        return name

    @contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
        with subprocess.Popen(
            [*ULYSSES, *arguments],
            cwd=self.path,
            env=env | {"GLOO_SOCKET_IFNAME": "lo", "HF_DATASETS_CACHE": str(self.path / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # no terminal, so no signal counts as typed there
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:  # something went wrong: leave nothing running
                    for left in psutil.Process(process.pid).children(recursive=True):
                        left.kill()
                    process.kill()

    def run(
        self, *arguments: str, given: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(given, timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def steps(self, run: str) -> list[int]:
        return list(um.open_run(self.path / run).metrics("grad/norm/total").index)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def own_lines(error: str) -> list[str]:
    """Returns the lines that `ulysses` itself printed."""
    return [line for line in error.splitlines() if line.startswith("ulysses: ")]


# -- what is recorded -------------------------------------------------------------------------


@pytest.mark.timeout(150)
def test_each_training_of_a_script_gets_a_run_unless_it_has_a_monitor(desk):
    script = desk.script(SEVERAL)
    arguments = ("--run-dir", "runs/demo", "--sample-every", "2", "--no-tensorboard")
    done = desk.run(*arguments, "--", sys.executable, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the end"
    assert own_lines(done.stderr) == [
        "ulysses: attached; Trainers are recorded to runs/demo",
        "ulysses: recorded runs/demo; to see it, run: ulysses report runs/demo",
        "ulysses: skipped a Trainer that has its own monitor",
        "ulysses: recorded runs/demo-2; to see it, run: ulysses report runs/demo-2",
    ]
    assert sorted(p.name for p in (desk.path / "runs").iterdir()) == ["demo", "demo-2"]
    assert desk.steps("runs/demo") == [1, 2, 3, 4, 5, 6]  # gone on with from its checkpoint
    assert desk.steps("runs/demo-2") == desk.steps("own/early") == desk.steps("own/late")
    run = um.open_run(desk.path / "runs/demo-2")
    assert (run.info["trainer"], run.info["status"]) == ("Subclass", "finished")
    assert list(run.metrics("param/norm/total").dropna().index) == [1, 3]
    assert not (desk.path / "runs/demo/tensorboard").exists()


@pytest.mark.timeout(150)
def test_all_ranks_of_torchrun_are_recorded_and_training_continues_without_support(desk):
    script = desk.script(UNSUPPORTED)
    # Each rank's output goes to files of its own: in one stream, lines of two ranks get mixed.
    apart = ("--redirects", "3", "--log-dir", "logs")
    done = desk.run("--run-dir", "runs/two", "--", *TORCHRUN, *apart, script)
    assert done.returncode == 0, done.stderr
    reason = "engine of the future: not supported"
    expected = [[f"ulysses: training continues without the monitor: {reason}"], []]
    for rank in (0, 1):
        (folder,) = desk.path.glob(f"logs/*/attempt_0/{rank}")
        assert f"rank {rank} trained" in (folder / "stdout.log").read_text().splitlines()
        assert own_lines((folder / "stderr.log").read_text()) == expected[rank]
    assert own_lines(done.stderr)[1:] == [
        f"ulysses: not recorded: {reason}",
        "ulysses: recorded runs/two; to see it, run: ulysses report runs/two",
    ]
    run = um.open_run(desk.path / "runs/two")
    assert (run.info["engine"], run.info["world_size"]) == ("ddp", 2)
    assert desk.steps("runs/two") == [1, 2, 3]
    # 2 ranks x 2 rows x 9 tokens, of which 8 are predicted
    assert run.metrics("train/loss_tokens/total")["train/loss_tokens/total"].eq(32).all()


@pytest.mark.timeout(150)
def test_a_trl_trainer_under_accelerate_launch_is_watched(desk):
    done = desk.run("--", *ACCELERATE, desk.script(SFT, "my sft.py"))
    assert done.returncode == 0, done.stderr
    (run,) = (desk.path / "runs").iterdir()
    assert run.name.startswith("my-sft-")
    assert f"ulysses: recorded runs/{run.name}; to see it" in own_lines(done.stderr)[-1]
    assert um.open_run(run).info["trainer"] == "SFTTrainer"
    assert desk.steps(str(run)) == [1, 2]


@pytest.mark.timeout(150)
def test_the_name_ulysses_is_known_to_trainers_and_accelerators(desk):
    reports = "from tiny import make\nmake(report_to='ulysses').train()\n"
    scripts = [desk.script(reports, "reports.py"), desk.script(LOOP, "loop.py")]
    both = " && ".join(f"{sys.executable} {script}" for script in scripts)
    done = desk.run("--run-dir", "runs/x", "--", "bash", "-c", both)
    assert done.returncode == 0, done.stderr
    assert [line.partition(";")[0] for line in own_lines(done.stderr)[1:]] == [
        "ulysses: recorded runs/x",
        "ulysses: recorded runs/x-2",
    ]
    assert desk.steps("runs/x") == [1, 2, 3]
    assert not list(desk.path.glob("output/ulysses*"))
    logged = um.open_run(desk.path / "runs/x-2")
    assert logged.metrics("train/loss/total")["train/loss/total"].to_dict() == {5: 2.0}
    assert (logged.info["config"], logged.info["status"]) == ({"lr": 0.1}, "finished")


@pytest.mark.timeout(150)
def test_several_scripts_get_their_own_runs_and_a_failure_keeps_its_exit_code(desk):
    good = desk.script("from tiny import make\nmake().train()\n", "good.py")
    fails = desk.script(FAILS, "fails.py")
    both = f"{sys.executable} {good} && {sys.executable} {fails}"
    done = desk.run("--run-dir", "runs/x", "--", "bash", "-c", both)
    assert done.returncode == 3, done.stderr
    assert [line.partition(";")[0] for line in own_lines(done.stderr)[1:]] == [
        "ulysses: recorded runs/x",
        "ulysses: recorded runs/x-2",
    ]
    assert um.open_run(desk.path / "runs/x").info["status"] == "finished"
    failed = um.open_run(desk.path / "runs/x-2")
    assert failed.info["status"] == "failed"
    assert failed.event_list("stop")[0]["log"][-1] == "about to leave"
    assert desk.steps("runs/x") == desk.steps("runs/x-2") == [1, 2, 3]


# -- input, output and signals pass through ---------------------------------------------------


@pytest.mark.timeout(60)
def test_a_command_without_a_trainer_runs_unchanged_and_gets_a_hint(desk):
    (desk.path / "sitecustomize.py").write_text("import sys\nsys.own = __file__\n")
    code = (
        "import sys\n"
        "heavy = [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]\n"
        "print(sys.stdin.read(), sys.argv[1:], heavy)\n"
        "print(sys.own, sys.modules['sitecustomize'].__file__, file=sys.stderr)\n"
    )
    own = str(desk.path / "sitecustomize.py")
    path = os.pathsep.join([str(desk.path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    wrapped = ("env", f"PYTHONPATH={path}", *ULYSSES)
    arguments = ("--", sys.executable, "-c", code, "--", "--help", "--local_rank=1")
    done = desk.run("--", *wrapped, *arguments, given="typed")  # attached twice: no harm
    assert done.returncode == 0
    assert done.stdout == "typed ['--', '--help', '--local_rank=1'] []\n"
    assert f"{own} {own}" in done.stderr.splitlines()
    inner, outer = own_lines(done.stderr)[-2:]
    assert "created no transformers or TRL Trainer" in inner
    assert "monitor.watch(model, optimizer)" in inner
    assert "let it inherit PYTHONPATH" in outer  # which `env` replaced
    assert not (desk.path / "runs").exists()


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        ((), "", "the command created no transformers or TRL Trainer; to record your own loop"),
        ((), "import lightning", "the command imported lightning and created no transformers or "
         "TRL Trainer; to record it, add um.LightningCallback(monitor) to its"),
        ((), "import ray, accelerate", "the command imported ray, accelerate and created no "
         "transformers or TRL Trainer; to record it, attach a monitor in the function that trains"),
        ((), "import swift, sys; sys.exit(4)",
         "the command imported swift and created no Trainer before it exited with 4"),
        (("-I",), "", "no Python process of the command could be attached; start Python without "
         "-I, -E and -S, and let it inherit PYTHONPATH"),
    ],
)  # fmt: skip
def test_the_closing_line_says_why_nothing_was_recorded(desk, flags, code, expected):
    for name in ("lightning", "ray", "accelerate", "swift"):
        (desk.path / f"{name}.py").touch()
    done = desk.run("--", sys.executable, *flags, "-c", code)
    assert own_lines(done.stderr)[-1].startswith(f"ulysses: nothing recorded: {expected}")


@pytest.mark.timeout(90)
def test_a_trainer_that_never_trains_is_told(desk):
    done = desk.run("--", sys.executable, desk.script("from tiny import make\nmake()\n"))
    assert done.returncode == 0, done.stderr
    line = own_lines(done.stderr)[-1]
    assert line.startswith("ulysses: nothing recorded: the command imported ")
    assert line.endswith("transformers and created a Trainer, but train() was never called")


@pytest.mark.timeout(60)
def test_a_taken_run_directory_sends_the_runs_beside_it_and_says_so(desk):
    (desk.path / "taken").mkdir()
    (desk.path / "taken/run.json").write_text("{}")
    done = desk.run("--run-dir", "taken", "--", "true")
    assert done.returncode == 0
    assert own_lines(done.stderr)[0] == (
        "ulysses: attached; taken is taken, so Trainers are recorded to taken-2"
    )
    assert not (desk.path / "taken-2").exists()


@pytest.mark.timeout(60)
def test_the_exit_code_after_a_signal_is_128_and_its_number(desk):
    done = desk.run("--", "bash", "-c", "kill -KILL $$")
    assert done.returncode == 137
    assert own_lines(done.stderr)[-1].endswith(
        "the command created no Trainer before it exited with 137"
    )


@pytest.mark.timeout(150)
def test_sigterm_ends_every_rank_and_the_run_can_be_opened(desk):
    script = desk.script(ENDLESS)
    with desk.start("--run-dir", "runs/stopped", "--", *TORCHRUN, script) as process:
        wait_for(lambda: (desk.path / "runs/stopped/events.jsonl").exists())
        wait_for(lambda: len(desk.steps("runs/stopped")) > 2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # torchrun and two ranks
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert "ulysses: recorded runs/stopped" in error
    assert len(desk.steps("runs/stopped")) > 2


@pytest.mark.timeout(90)
def test_processes_that_a_launcher_leaves_running_are_ended(desk):
    sleeper = desk.script("import time\nopen('started', 'w')\ntime.sleep(1000)\n")
    with desk.start("--", "bash", "-c", f"{sys.executable} {sleeper}; true") as process:
        wait_for(lambda: (desk.path / "started").exists())
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)  # bash ends at once, and its child does not
        assert process.wait(30) == 143
    assert not psutil.wait_procs(family, timeout=5)[1]


@pytest.mark.timeout(60)
def test_ctrl_c_at_a_terminal_reaches_the_command_once(desk):
    script = desk.script(
        "import signal, sys, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "print('ready', flush=True)\n"
        "deadline = time.monotonic() + 20\n"
        "while not seen and time.monotonic() < deadline:\n"
        "    time.sleep(0.05)\n"
        "time.sleep(1)\n"
        "print('got', len(seen), sys.stdin.isatty(), flush=True)\n"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(desk.path)
        os.execv(sys.executable, [*ULYSSES, "--", sys.executable, script])  # noqa: S606
    said = b""
    while b"got" not in said:
        said += os.read(terminal, 1000)
        if b"ready" in said:
            os.write(terminal, b"\x03")
            said = said.replace(b"ready", b"")
    while b"True" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    os.waitpid(process, 0)
    assert b"got 1 True" in said


def wait_for(condition, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


# -- wrong input ------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs `ulysses attach` in this process; it must refuse without starting anything."""

    def must_not_start(*_: object) -> int:
        raise AssertionError("the command was started")

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["ulysses", "attach", *arguments])
        monkeypatch.setattr("ulysses_core.cli.attach.run_child", must_not_start)
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert caught.value.code == 2
        assert said.out == ""
        assert said.err.count("\n") == 1
        return said.err

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no command; add it after --, as in ulysses attach -- python train.py"),
        (["--"], "no command"),
        (["--", "no-such-program", "--x"], "command no-such-program is not on PATH"),
        (["--", "./none.py"], "command ./none.py: no such file"),
        (["--", "./train.py"], "command ./train.py is not executable; try python ./train.py"),
        (["--", "folder"], "command folder is a folder; expected a program"),
        (["--bogus", "--", "true"], "No such option: --bogus"),
        (["--sample-every", "0", "--", "true"], "greater than or equal to 1"),
        (["--if-exists", "ask", "--", "true"], "not one of 'new', 'refuse', 'resume'"),
        (["--run-dir", "train.py", "--", "true"], "--run-dir: train.py is a file"),
        (["--run-dir", "train.py/x", "--", "true"], "train.py is a file; expected a directory"),
        (
            ["--run-dir", "taken", "--if-exists", "refuse", "--", "true"],
            "--run-dir: taken already holds a run; choose",
        ),
    ],
)
def test_wrong_input_is_one_line_and_starts_nothing(tmp_path, refused, arguments, expected):
    (tmp_path / "train.py").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/run.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert expected in refused(*arguments)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken/run.json").read_text() == "{}"


@pytest.mark.parametrize("if_exists", ["refuse", "resume", "overwrite"])
def test_a_run_directory_in_use_is_refused(tmp_path, refused, if_exists):
    from ulysses_monitor.store import RunDirectory

    used = RunDirectory(tmp_path / "used")
    used.start({})
    error = refused("--run-dir", "used", "--if-exists", if_exists, "--", "true")
    assert "--run-dir: used is in use by a running training" in error
    used.finish("finished")


def test_the_error_about_a_program_that_cannot_start_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").write_text("no first line that says how\n")
    (tmp_path / "broken").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ulysses", "attach", "--", "./broken"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "command ./broken: Exec format error" in capsys.readouterr().err
