"""A Trainer that trains several times: each training is a run, and none fails for the directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import ulysses_monitor as um
from tests.support.forget import forget_last_trainer
from tests.support.hf_cases import build_trainer


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget_last_trainer()


def recorded(folder: Path) -> dict[str, tuple[str, int]]:
    """Returns status and last step of each run, by name."""
    infos = {path.name: um.open_run(path).info for path in sorted(folder.glob("run*"))}
    return {name: (info["status"], info["last_step"]) for name, info in infos.items()}


def watched(folder: Path, **more: Any) -> tuple[Any, um.Monitor]:
    trainer = build_trainer("plain", folder, **more)
    monitor = um.Monitor(folder / "run", tensorboard=False)
    monitor.attach(trainer)
    return trainer, monitor


def test_a_second_training_is_a_second_run_and_a_resumed_one_continues_it(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.train()
    assert recorded(tmp_path) == {"run": ("finished", 4), "run-2": ("finished", 4)}
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    assert recorded(tmp_path) == {"run": ("finished", 4), "run-2": ("finished", 6)}


def test_the_retry_of_auto_find_batch_size_is_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = watched(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True)
    compute_loss, sizes = trainer.compute_loss, []

    def run_out_of_memory(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) > 3 and sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", run_out_of_memory)
    trainer.train()
    assert max(sizes) == 4
    assert sizes[-1] < 4
    assert recorded(tmp_path) == {
        "run": ("failed", 1),
        "run-2": ("failed", 0),  # the batch size was 3
        "run-3": ("finished", 4),
    }
    for name in ("run", "run-2"):
        assert um.open_run(tmp_path / name).info["error"] == "RuntimeError: CUDA out of memory."
    assert "error" not in um.open_run(tmp_path / "run-3").info


def test_each_trial_of_a_hyperparameter_search_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import hyperparameter_search
    from transformers import trainer as trainer_module
    from transformers.trainer_utils import HPSearchBackend

    class Trial:
        def __init__(self, number: int) -> None:
            self.number, self.params = number, dict[str, Any]()

    class Search:
        """As optuna's backend does it, without the search."""

        def ensure_available(self) -> None:
            pass

        def default_hp_space(self, trial: Any) -> dict[str, float]:
            return {"learning_rate": 0.01 * (1 + trial.number)}

        def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> int:
            for number in range(n_trials):
                trainer.train(trial=Trial(number))
            return n_trials

    backends = {HPSearchBackend.OPTUNA: Search}
    for module in (hyperparameter_search, trainer_module):
        if hasattr(module, "ALL_HYPERPARAMETER_SEARCH_BACKENDS"):
            monkeypatch.setattr(module, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer, _ = watched(tmp_path, max_steps=2)
    model = trainer.model
    trainer.model_init = lambda: model
    assert trainer.hyperparameter_search(n_trials=3, backend="optuna", direction="minimize") == 3
    names = ("run", "run-2", "run-3")
    assert recorded(tmp_path) == dict.fromkeys(names, ("finished", 2))
    rates = [um.open_run(tmp_path / name).metrics("optim/lr/0").iloc[0, 0] for name in names]
    assert rates == pytest.approx([0.01, 0.02, 0.03])


def test_the_cells_of_a_notebook_run_again_after_an_interrupt(tmp_path: Path) -> None:
    def cell(interrupt: bool, **train: Any) -> um.Monitor:
        trainer, monitor = watched(tmp_path, save_strategy="steps", save_steps=2)
        if interrupt:
            compute_loss, calls = trainer.compute_loss, []

            def loss(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) == 6:
                    raise KeyboardInterrupt
                return compute_loss(*args, **kwargs)

            trainer.compute_loss = loss
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            return monitor
        trainer.train(**train)
        return monitor

    first = cell(interrupt=True)
    assert first.session is None
    assert cell(interrupt=False).run_dir == tmp_path / "run-2"
    assert cell(interrupt=False, resume_from_checkpoint=True).run_dir == tmp_path / "run-2"
    assert recorded(tmp_path)["run"] == ("stopped", 2)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("out of order")


class FailingCallback(TrainerCallback):
    on_step_end = fail


FAILURES: dict[str, Callable[[Any], object]] = {
    "loss": lambda trainer: setattr(trainer, "compute_loss", fail),
    "data": lambda trainer: setattr(trainer, "data_collator", fail),
    "evaluation": lambda trainer: setattr(trainer, "evaluate", fail),
    "callback": lambda trainer: trainer.add_callback(FailingCallback()),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("way", ["attach", "add_callback"])
def test_the_run_of_a_training_that_raises_ends_at_once(
    way: str, failure: str, tmp_path: Path
) -> None:
    trainer = build_trainer("plain", tmp_path, eval_strategy="steps", eval_steps=1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    if way == "attach":
        monitor.attach(trainer)
    else:
        trainer.add_callback(um.MonitorCallback(monitor))
    FAILURES[failure](trainer)
    with pytest.raises(ValueError, match="out of order"):
        trainer.train()
    info = um.open_run(tmp_path / "run").info
    assert (info["status"], info["error"]) == ("failed", "ValueError: out of order")
    assert monitor.session is None
    assert not {"training_step", "_run_epoch", "get_batch_samples"} & vars(trainer).keys()
