"""The monitor around a plain loop, on one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ulysses_monitor as um
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Event
from ulysses_monitor.session.training_step import TrainingStep


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, **hooks: Any) -> float:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = model(x).square().mean()
    if "loss" in hooks:
        hooks["loss"](loss)
    loss.backward()
    norm = float(
        torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    )
    if "clip" in hooks:
        hooks["clip"]()
    optimizer.step()
    return norm


def test_every_optimizer_step_is_a_record_with_its_loss_tokens_and_rate(tmp_path: Path) -> None:
    model, optimizer = build()
    monitor, losses, norms = um.Monitor(tmp_path / "run", tensorboard=False), [], []
    with monitor.watch(model, optimizer):
        for seed in range(5):

            def observe(loss: torch.Tensor) -> None:
                losses.append(loss.item())
                monitor.observe(loss=loss / 2, tokens=8, loss_tokens=torch.tensor(3))
                monitor.observe(loss=loss / 2, tokens=8, loss_tokens=torch.tensor(3))

            norms.append(step_once(model, optimizer, seed, loss=observe))
    frame = um.open_run(tmp_path / "run").metrics()
    assert frame.index.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(frame["train/loss/total"], losses, rtol=1e-6)
    np.testing.assert_allclose(frame["grad/norm/total"], norms, rtol=1e-6)
    assert frame["train/loss_tokens/total"].tolist() == [6.0] * 5
    np.testing.assert_allclose(frame["optim/lr/0"], 0.01, rtol=1e-6)
    speed = frame["train/tokens_per_second/total"] * frame["train/step_seconds/total"]
    np.testing.assert_allclose(speed, 16.0, rtol=1e-5)
    assert (frame["monitor/overhead_seconds/total"] > 0).all()


def test_before_clip_reads_the_gradient_before_the_loops_own_clipping(tmp_path: Path) -> None:
    model, optimizer = build()
    monitor, norms = um.Monitor(tmp_path / "run", tensorboard=False), []

    def clip() -> None:
        monitor.before_clip()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    with monitor.watch(model, optimizer):
        norms += [step_once(model, optimizer, seed, clip=clip) for seed in range(3)]
    recorded = um.open_run(tmp_path / "run").metrics()["grad/norm/total"]
    np.testing.assert_allclose(recorded, norms, rtol=1e-6)
    assert (recorded > 0.01).all()


def test_the_weights_are_bit_equal_with_and_without_the_monitor(tmp_path: Path) -> None:
    results = []
    for watched in (False, True):
        model, optimizer = build()
        monitor = um.Monitor(tmp_path / "run", tensorboard=False, sample_every=1)
        if watched:
            with monitor.watch(model, optimizer):
                for seed in range(5):
                    step_once(model, optimizer, seed)
        else:
            for seed in range(5):
                step_once(model, optimizer, seed)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_after_the_loop_no_hook_remains_on_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = build()
    before = {k: repr(v) for k, v in vars(optimizer).items() if "hook" in k}
    sink = um.MemorySink()
    with um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink]).watch(model, optimizer):
        step_once(model, optimizer, 0)
    assert {k: repr(v) for k, v in vars(optimizer).items() if "hook" in k} == before
    step_once(model, optimizer, 1)
    assert len(sink.records) == 1


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "stopped")]
)
def test_a_loop_that_raises_closes_the_run(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    model, optimizer = build()

    def loop() -> None:
        with um.Monitor(tmp_path / "run").watch(model, optimizer):
            step_once(model, optimizer, 0)
            raise error

    with pytest.raises(error):
        loop()
    run = um.open_run(tmp_path / "run")
    assert run.info["status"] == status
    assert len(run.metrics()) == 1
    assert run.events("stop")["status"].tolist() == [status]


def test_a_bad_gradient_is_an_alert_that_names_the_parameter(tmp_path: Path) -> None:
    model, optimizer = build()

    def spoil() -> None:
        model[2].weight.grad[0, 3] = float("nan")

    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer):
        step_once(model, optimizer, 0, clip=spoil)
    run = um.open_run(tmp_path / "run")
    frame = run.metrics("grad/*")
    assert frame.loc[1, "grad/nonfinite/param/2.weight"] == 1.0
    assert frame.loc[1, "grad/nonfinite/total"] == 1.0
    assert np.isfinite(frame.loc[1, "grad/norm/total"])
    (message,) = run.events("alert")["message"]
    assert "2.weight" in message
    assert "0.weight" not in message


class RaisingSink:
    """Always fails."""

    def write(self, item: Any) -> None:
        raise OSError("disk full")

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class RaisingRule:
    name = "raising"

    def check(self, history: Any) -> list[um.Alert]:
        raise RuntimeError("broken")


def test_failing_sinks_and_rules_harm_neither_the_training_nor_the_run(tmp_path: Path) -> None:
    model, optimizer = build()
    monitor = um.Monitor(
        tmp_path / "run", tensorboard=False, sinks=[RaisingSink()], rules=[RaisingRule()]
    )
    with monitor.watch(model, optimizer):
        for seed in range(10):
            step_once(model, optimizer, seed)
    assert len(um.open_run(tmp_path / "run").metrics()) == 10


def test_a_rule_and_a_policy_that_keep_failing_are_switched_off_with_an_event_and_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(history: Any) -> list[um.Action]:
        raise ValueError("no such key")

    model, optimizer = build()
    monitor = um.Monitor(
        tmp_path / "run", tensorboard=False, rules=[RaisingRule()], policies=[broken]
    )
    with monitor.watch(model, optimizer):
        for seed in range(5):
            step_once(model, optimizer, seed)
    events = um.open_run(tmp_path / "run").event_list("monitor")
    for part, error in (
        ("rule raising", "RuntimeError: broken"),
        ("policy broken", "ValueError: no such key"),
    ):
        own = [event for event in events if event["part"] == part]
        assert [(e["state"], e["error"]) for e in own] == [("failed", error), ("off", error)]
        assert caplog.text.count(f"monitor: {part} is switched off: {error}") == 1


def test_a_rule_and_a_policy_may_return_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def silent(history: Any) -> None:
        return None

    model, optimizer = build()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, rules=[silent], policies=[silent])
    with monitor.watch(model, optimizer):
        step_once(model, optimizer, 0)
    kinds = [event["kind"] for event in um.open_run(tmp_path / "run").event_list()]
    assert kinds == ["start", "stop"]
    assert "failed" not in caplog.text


def test_one_schema_serves_all_records_with_the_same_names(tmp_path: Path) -> None:
    model, optimizer = build()
    sink = um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink], sample_every=3)
    with monitor.watch(model, optimizer):
        for seed in range(9):
            step_once(model, optimizer, seed)
            monitor.log({"eval/loss/total": 1.0})
    # Each schema is an open file of the store: the first step has no optimizer state; then
    # there are sampled steps, what those did, the others, and evaluations.
    assert len({record.schema for record in sink.records}) == 5


def test_the_scope_of_a_logged_metric_may_be_left_out(tmp_path: Path) -> None:
    model, optimizer = build()
    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer) as monitor:
        step_once(model, optimizer, 0)
        monitor.log({"my/metric": 1.0, "my/other/layer/3": 2.0})
    found = um.open_run(tmp_path / "run").metrics("my/*")
    assert found.to_dict("list") == {"my/metric/total": [1.0], "my/other/layer/3": [2.0]}


def test_logging_a_metric_with_a_wrong_name_is_refused(tmp_path: Path) -> None:
    model, optimizer = build()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    with monitor.watch(model, optimizer), pytest.raises(um.InputError, match="eval_loss"):
        monitor.log({"eval_loss": 1.0})


def test_wrong_arguments_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    model, optimizer = build()
    with pytest.raises(um.InputError, match="sample_every is 0"):
        um.Monitor(tmp_path, sample_every=0)
    with pytest.raises(um.InputError, match="an object of type object is not a sink"):
        um.Monitor(tmp_path, sinks=[object()])  # type: ignore[list-item]
    with pytest.raises(
        um.InputError, match=r"'none' is not a rule.*allowed: .*the presets default"
    ):
        um.Monitor(tmp_path, rules="none")
    with pytest.raises(
        um.InputError, match=r"an object of type object is not a rule; .*check\(history\)"
    ):
        um.Monitor(tmp_path, rules=[object()])
    with pytest.raises(um.InputError, match="attach\\(\\) got a Linear"):
        um.Monitor(tmp_path / "run").attach(nn.Linear(1, 1))
    (tmp_path / "file").touch()
    with (
        pytest.raises(um.InputError, match="is a file"),
        um.Monitor(tmp_path / "file").watch(model, optimizer),
    ):
        pass


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model, optimizer = build()
    with (
        pytest.raises(um.InputError, match="file is a file; expected a directory"),
        um.Monitor(tmp_path / "file" / "run").watch(model, optimizer),
    ):
        pass


def test_what_a_user_puts_in_the_config_is_in_run_json_without_its_secrets(tmp_path: Path) -> None:
    model, optimizer = build()
    config = {"learning_rate": 0.01, "hub_token": "hf_abc"}
    with um.Monitor(tmp_path / "run", tensorboard=False, config=config).watch(model, optimizer):
        pass
    info = um.open_run(tmp_path / "run").info
    assert info["config"] == {"learning_rate": 0.01, "hub_token": "***"}
    assert (info["engine"], info["world_size"], info["status"]) == ("plain", 1, "finished")
    assert info["model"]["parameters"] == info["model"]["trainable_parameters"] == 49
    assert info["metric_schema_version"] == 1


IMPORTS = """
import sys
import ulysses_monitor
from ulysses_monitor import Alert, Event, InputError, MemorySink, Metric, Monitor, Rule, RunReader
from ulysses_monitor import Sink, StepRecord, UlyssesError, open_run
heavy = {"transformers", "deepspeed", "matplotlib", "peft", "accelerate", "tensorboard"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_importing_the_package_imports_no_optional_dependency() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=250
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in um.__all__:
        assert getattr(um, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        um.no_such_name  # noqa: B018


def test_an_event_is_published_at_the_current_step(tmp_path: Path) -> None:
    model, optimizer = build()
    sink = um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink])
    with monitor.watch(model, optimizer):
        step_once(model, optimizer, 0)
        session = monitor.session
        assert session is not None
        session.event("note", {"text": "here"})
    session.event("note", {"text": "nobody listens any more"})
    notes = [e for e in sink.events if e.kind == "note"]
    assert [(e.step, dict(e.data)) for e in notes] == [(1, {"text": "here"})]
    assert isinstance(notes[0], Event)


def test_a_loss_of_several_elements_is_refused_at_once(tmp_path: Path) -> None:
    model, optimizer = build()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    refusal = pytest.raises(InputError, match=r"shape \[3\] on cpu; expected a real number")
    with monitor.watch(model, optimizer), refusal:
        monitor.observe(loss=torch.zeros(3))


def test_a_defect_that_persists_costs_the_records_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    with monitor.watch(model, optimizer):
        for step in range(7):
            if step == 2:
                monkeypatch.setattr(TrainingStep, "metrics", lambda *_: 1 / 0)
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    run = um.open_run(tmp_path / "run")
    assert list(run.metrics("optim/lr/0").index) == [1, 2]
    assert list(run.metrics("grad/norm/total").index) == [1, 2, 3, 4]
    told = [(e["part"], e["state"], e["step"]) for e in run.event_list() if "part" in e]
    assert told == [("recording", "failed", 2), ("recording", "off", 4)]


def test_adapters_that_cannot_be_read_cost_only_their_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model

    def other_peft(*args: Any) -> None:
        raise AttributeError("scaling")

    monkeypatch.setattr("ulysses_monitor.probes.assembly.AdapterProbe", other_peft)
    model: Any = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(3, 1)), LoraConfig(target_modules=["0"])
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    names = um.open_run(tmp_path / "run").metrics("*").columns
    assert "lora/grad_ratio_B_A/total" in names
    assert not any(name.startswith("lora/delta_ratio") for name in names)
    assert "the LoRA adapters could not be read" in caplog.text
