"""`ulysses attach` sees every Trainer, whatever a framework does to its callbacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ulysses_monitor as um
from tests.support.spawn import spawn
from ulysses_monitor.integrations.auto import AttachSettings
from ulysses_monitor.session.settings import MonitorSettings

CASES = {
    "replaces the default callbacks": "Trainer",
    "builds a handler of its own": "OwnHandler",
    "has a class of handlers of its own": "OwnHandlerClass",
    "takes callbacks out before training": "TakesOutBefore",
    "takes callbacks out while training": "TakesOutDuring",
    "skips the constructor": "SkipsConstructor",
}


def train_each(root: str) -> None:
    import transformers.trainer

    from tests.support import odd_trainers
    from tests.support.hf_cases import build_trainer
    from ulysses_monitor.integrations.auto.callback import install

    transformers.trainer.DEFAULT_CALLBACKS = [odd_trainers.DefaultFlowCallback]
    for case, name in CASES.items():
        folder = Path(root, case)
        folder.mkdir()
        settings = AttachSettings(
            run_dir=folder / "run", command_id="x", monitor=MonitorSettings(tensorboard=False)
        )
        os.environ.update(settings.environment({}))
        undo = install(transformers.trainer)
        build_trainer("plain", folder, trainer_class=getattr(odd_trainers, name)).train()
        undo()
    folder = Path(root, "undone")
    build_trainer("plain", folder).train()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every")
    spawn(train_each, 1, args=[str(folder)], timeout=120)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_is_recorded_that(case: str, root: Path) -> None:
    runs = sorted(p.name for p in (root / case).glob("run*"))
    assert runs == ["run"]
    run = um.open_run(root / case / "run")
    assert run.metrics("grad/norm/total").index.tolist() == [1, 2, 3, 4]
    assert run.metrics("train/loss/total").index.tolist() == [1, 2, 3, 4]
    assert run.info["status"] == "finished"


def test_nothing_is_recorded_once_it_is_undone(root: Path) -> None:
    assert [p.name for p in (root / "undone").iterdir()] == ["output"]
