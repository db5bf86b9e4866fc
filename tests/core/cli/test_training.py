"""`ulysses train` from start to end, with real processes, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest

import ulysses_monitor as um

pytestmark = [pytest.mark.usefixtures("compiled_deepspeed"), pytest.mark.timeout(600)]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SFT = {
    "stage": "sft",
    "finetuning_type": "lora",
    "model_config": None,
    "tokenizer_name_or_path": None,
    "model_name_or_path": "runs/pt",
    "dataset": "pairs",
    "output_dir": None,
}


@pytest.fixture(scope="module")
def trained(make_world):
    """A world with a model that `ulysses train` pre-trained on two processes."""
    world = make_world()
    world.config()
    done = world.run("train", "pt.yaml")
    assert done.returncode == 0, done.stderr
    world.result = done
    return world


def test_two_processes_leave_a_run_directory_a_model_and_a_report(trained):
    run_dir = trained.path / "runs/pt"
    for name in ("run.json", "events.jsonl", "report.html", "config.json", "model.safetensors"):
        assert (run_dir / name).is_file(), name
    assert list((run_dir / "tensorboard").iterdir())
    assert [p.name for p in (run_dir / "metrics").iterdir()] == ["metrics.parquet"]
    run = um.open_run(run_dir)
    assert run.info["engine"] == "deepspeed-zero2"
    assert run.info["world_size"] == 2
    assert run.info["status"] == "finished"
    frame = run.metrics("grad/norm/*", "train/*", "eval/*")
    assert list(frame.index) == [0, 1, 2, 3, 4]  # 0: the evaluation before training
    steps = frame.loc[1:]
    assert steps["grad/norm/total"].gt(0).all()
    layers = steps.filter(like="grad/norm/layer/")
    assert list(layers.columns) == ["grad/norm/layer/0", "grad/norm/layer/1"]
    # One row of 32 tokens is on both ranks: 4 rows x 32 tokens, each but a row's first predicted.
    assert steps["train/loss_tokens/total"].eq(4 * 31).all()
    assert frame["eval/loss/total"].notna().sum() == 2


def test_the_table_says_before_and_after(trained):
    out = trained.result.stdout
    for label in (
        "held-out loss",
        "gradient norm",
        "tokens per second",
        "alerts",
        "time in the monitor",
    ):
        assert label in out
    assert "runs/pt/report.html" in out


def test_lora_on_one_process_and_saving_memory_on_torchrun_give_the_same_losses(trained):
    trained.config("sft.yaml", **SFT)
    one = trained.run(
        "train", "sft.yaml", "sequence_parallel_size=1", "output_dir=runs/one", "--nproc", "1"
    )
    assert one.returncode == 0, one.stderr
    saving = (
        "loss_chunk=8",
        "mlp_chunk=8",
        "gradient_checkpointing=true",
        "offload_checkpoints=true",
    )
    two = trained.run("-m", "ulysses_core.cli", "train", "sft.yaml", "output_dir=runs/two",
                      *saving, program=(*TORCHRUN, "2"))  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert (trained.path / "runs/two/adapter_model.safetensors").is_file()
    names = ("train/loss/total", "grad/norm/total", "eval/loss/total", "lora/grad_ratio_B_A/total")
    frames = [um.open_run(trained.path / "runs" / n).metrics(*names) for n in ("one", "two")]
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-3, check_like=True)


def test_without_output_dir_two_runs_get_directories_of_their_own(trained):
    trained.config("sft2.yaml", **SFT)
    short = ("max_steps=1", "val_size=0", "sequence_parallel_size=1", "deepspeed=null")
    for _ in range(2):
        done = trained.run("train", "sft2.yaml", *short)
        assert done.returncode == 0, done.stderr
    assert len(list((trained.path / "runs").glob("sft2-*/run.json"))) == 2


@pytest.mark.parametrize(
    "changes", [{"deepspeed": None, "sequence_parallel_size": 1}, {}], ids=["alone", "zero2-sp2"]
)
def test_resuming_continues_the_run_directory(trained, changes, request):
    changes |= {"output_dir": f"runs/{request.node.callspec.id}"}
    trained.config("resume.yaml", save_strategy="steps", save_steps=2, **changes)
    assert trained.run("train", "resume.yaml", "max_steps=2").returncode == 0
    done = trained.run("train", "resume.yaml", "max_steps=4", "resume_from_checkpoint=true")
    assert done.returncode == 0, done.stderr
    run = um.open_run(trained.path / changes["output_dir"])
    assert list(run.metrics("train/loss/total").index) == [1, 2, 3, 4]
    assert len(run.info["starts"]) == 2
    assert list(run.events("start")["step"]) == [0, 2]


def test_a_run_that_is_killed_opens_and_leaves_no_process(trained):
    trained.config("killed.yaml", output_dir="runs/killed", max_steps=100_000, val_size=0)
    command = [sys.executable, "-m", "ulysses_core.cli", "train", "killed.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=trained.path, env=env, stderr=subprocess.DEVNULL
    ) as launcher:
        children: list[psutil.Process] = []
        try:
            frame = _wait_for_steps(trained.path / "runs/killed", 5)
            children = psutil.Process(launcher.pid).children(recursive=True)
            assert len(children) >= 2
            refused = trained.run("train", "killed.yaml", "overwrite_output_dir=true")
            assert refused.returncode == 2
            assert "in use" in refused.stderr
            ranks = [c for c in children if "ulysses_core.cli" in " ".join(c.cmdline())]
            ranks[0].send_signal(signal.SIGKILL)
            assert launcher.wait(60) == 1
        finally:
            launcher.kill()
            for child in children:
                if child.is_running():
                    child.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    run = um.open_run(trained.path / "runs/killed")
    assert run.info["status"] in ("crashed", "failed", "stopped")
    after = run.metrics("train/loss/total")
    assert len(after) >= len(frame)
    assert list(after.index) == list(range(1, len(after) + 1))


def _wait_for_steps(run_dir, steps: int) -> pd.DataFrame:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (run_dir / "run.json").exists():
            frame = um.open_run(run_dir).metrics("train/loss/total")
            if len(frame) >= steps:
                return frame
        time.sleep(0.5)
    raise AssertionError("the run recorded nothing in 90 s")


def test_interrupting_the_launcher_stops_the_ranks_and_says_so(trained):
    trained.config("interrupted.yaml", output_dir="runs/interrupted", max_steps=100_000, val_size=0)
    command = [sys.executable, "-m", "ulysses_core.cli", "train", "interrupted.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=trained.path, env=env, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            _wait_for_steps(trained.path / "runs/interrupted", 3)
            children = psutil.Process(launcher.pid).children(recursive=True)
            launcher.send_signal(signal.SIGINT)
            _, error = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert launcher.returncode == 1
    assert "stopped by SIGINT; the recorded steps are kept" in error
    assert "Traceback" not in error
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert um.open_run(trained.path / "runs/interrupted").info["status"] == "stopped"


def test_a_run_without_the_monitor_trains_and_leaves_a_model(trained):
    trained.config("bare.yaml", output_dir="runs/bare", deepspeed="zero3", monitor=False)
    done = trained.run("train", "bare.yaml")
    assert done.returncode == 0, done.stderr
    assert (trained.path / "runs/bare/model.safetensors").is_file()
    assert not (trained.path / "runs/bare/run.json").exists()


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3-offload"])
def test_the_manager_trains_from_python(trained, deepspeed):
    run_dir = f"runs/manager-{deepspeed}"
    trained.config("manager.yaml", output_dir=run_dir, deepspeed=deepspeed)
    script = (
        "import ulysses_core as uc\n"
        "overrides = ['sequence_parallel_size=1', 'max_steps=2']\n"
        "with uc.UlyssesTrainingManager('manager.yaml', overrides) as manager:\n"
        "    print(manager.get_status()['state'])\n"
        "    status = manager.run_training()\n"
        "print(status['state'], status['step'], status['max_steps'])\n"
    )
    done = trained.run(program=("-c", script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ready", "finished 2 2"]
    info = um.open_run(trained.path / run_dir).info
    assert info["status"] == "finished"
    assert info["engine"] == ("plain" if deepspeed is None else f"deepspeed-{deepspeed}")


def test_the_manager_cleans_up_after_an_exception(trained):
    trained.config("raising.yaml", output_dir="runs/raising", deepspeed=None)
    script = (
        "import sys\n"
        "import ulysses_core as uc\n"
        "overrides = ['sequence_parallel_size=1', 'loss_chunk=8']\n"
        "manager = uc.UlyssesTrainingManager('raising.yaml', overrides)\n"
        "manager.initialize()\n"
        "model, step = manager.trainer.model, manager.trainer.training_step\n"
        "def fails(*args, **kwargs):\n"
        "    if manager.trainer.state.global_step == 2:\n"
        "        sys.stderr.write('token=abcdef123456 was used\\n')\n"
        "        raise RuntimeError('out of memory')\n"
        "    return step(*args, **kwargs)\n"
        "manager.trainer.training_step = fails\n"
        "assert 'forward' in vars(model.lm_head)\n"
        "try:\n"
        "    with manager:\n"
        "        manager.run_training()\n"
        "except RuntimeError as error:\n"
        "    print(error, manager.get_status()['state'])\n"
        "print('forward' in vars(model), 'forward' in vars(model.lm_head))\n"
        "print('_prepare_deepspeed' in vars(manager.trainer.accelerator))\n"
    )
    done = trained.run(program=("-c", script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["out of memory failed", "False False", "False"]
    run = um.open_run(trained.path / "runs/raising")
    assert run.info["status"] == "failed"
    assert run.info["error"] == "RuntimeError: out of memory"
    assert run.event_list("stop")[0]["log"][-1] == "token=*** was used"
    assert list(run.metrics("train/loss/total").index) == [1, 2]


def test_a_policy_of_the_config_acts_and_may_stop_the_training(make_world):
    world = make_world()
    (world.path / "mine.py").write_text(
        "import ulysses_monitor as um\n"
        "def enough(history):\n"
        "    if history[-1].step == 3:\n"
        "        return [um.Action(kind='stop', reason='good enough'), um.Action(kind='save')]\n"
    )
    world.config(
        monitor={"policies": ["mine:enough", {"clip_threshold": {"above": 1e-9}}]}, max_steps=6
    )
    done = world.run("train", "pt.yaml")
    assert done.returncode == 3, done.stderr
    assert "ulysses: stopped: enough: good enough" in done.stderr
    assert "clip_threshold: clip_norm at 3 steps (active)" in done.stdout
    assert (world.path / "runs/pt/model.safetensors").is_file()
    assert (world.path / "runs/pt/checkpoint-3/ulysses_policies_0.npz").is_file()
    run = um.open_run(world.path / "runs/pt")
    assert run.info["status"] == "stopped"
    assert set(run.events("action")["policy"]) == {"enough", "clip_threshold"}
    assert "Interventions" in (world.path / "runs/pt/report.html").read_text()
