"""Checkpoints are read as data."""

from __future__ import annotations

import pickle
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ulysses_core.trainers.deepspeed import ALLOWED, safe_load
from ulysses_monitor.common.errors import InputError


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "state.pt"
    torch.save({"weights": torch.ones(2), "more": Evil(ran)}, path)
    with pytest.raises(InputError, match=r"state.pt: it contains \S+, which could run code"):
        safe_load(str(path))
    assert not ran.exists()
    torch.load(path, weights_only=False)  # what would have been
    assert ran.exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "state.pt"
    path.write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(InputError):
        safe_load(str(path))
    assert not ran.exists()


def test_deepspeeds_settings_and_tensors_are_read_back(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    path = tmp_path / "state.pt"
    state = {
        "scaler": LossScaler(4.0),
        "stage": ZeroStageEnum.gradients,
        "place": fragment_address(numel=3, start=1),
        "tensor": torch.arange(3.0),
    }
    torch.save(state, path)
    read = safe_load(str(path), map_location="cpu")
    assert read["scaler"].loss_scale == 4.0
    assert read["stage"] is ZeroStageEnum.gradients
    assert (read["place"].start, read["place"].numel) == (1, 3)
    assert read["tensor"].tolist() == [0, 1, 2]


def test_the_list_lets_no_function_through() -> None:
    for name in ALLOWED:
        assert isinstance(pkgutil.resolve_name(name), type)
