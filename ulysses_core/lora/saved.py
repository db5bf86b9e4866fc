"""Adapters in folders: which can be loaded onto the original base, and how others are converted.

An initialisation that takes B0 A0 from the base W trains on W - s B0 A0, which nobody saves. What
the training adds to W is s (B A - B0 A0): an adapter of twice the rank, with A over A0 and B beside
-B0, as PEFT converts PiSSA. A run keeps A0 and B0 in `initial_adapter`.

Legend: r rank, s scale, A [r, in], B [out, r].
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ulysses_core.lora.inits import changes_base
from ulysses_monitor.common.errors import InputError

__all__ = ["INITIAL", "convert_adapter", "find_initial", "mark_adapter", "read_adapter_config"]

INITIAL = "initial_adapter"
"""Folder in the run directory with the adapter from which training started."""

_REFUSED_BY_PEFT = {"lora_ga": "lora_ga_on_its_own_base"}
"""What a checkpoint calls an initialisation that PEFT takes without changing the base."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Reads `adapter_config.json`.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the folder of an adapter") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(f"{path}: it has no peft_type; expected the folder of an adapter")
    return config


def mark_adapter(folder: Path, init: str) -> None:
    """Writes into a checkpoint that its adapter is for a changed base.

    PEFT then repeats `pissa` and `olora` on the original base, and refuses the others.
    """
    config = read_adapter_config(folder)
    config["init_lora_weights"] = _REFUSED_BY_PEFT.get(init, init)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def find_initial(folder: Path) -> Path | None:
    """Returns where the adapter is from which the training of the one in `folder` started.

    None if the adapter in `folder` is for the original base, or a run did not keep its start.
    """
    init = read_adapter_config(folder).get("init_lora_weights")
    is_refused = init in _REFUSED_BY_PEFT.values()
    if not isinstance(init, str) or not (is_refused or changes_base(init)):
        return None
    return next((p / INITIAL for p in (folder, folder.parent) if (p / INITIAL).is_dir()), None)


def convert_adapter(folder: Path, initial: Path, target: Path) -> None:
    """Writes an adapter for the original base.

    Args:
        folder: the trained adapter.
        initial: the one from which its training started.
        target: the folder to write to; may be `folder`.
    """
    from safetensors.torch import load_file, save_file

    trained, start = (load_file(place / _WEIGHTS) for place in (folder, initial))
    tensors = {name: _join(name, tensor, start) for name, tensor in trained.items()}
    config = read_adapter_config(folder)
    growth = 2**0.5 if config.get("use_rslora") else 2  # the scale stays
    config |= {
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": growth * config["lora_alpha"],
    }
    target.mkdir(parents=True, exist_ok=True)
    if target != folder:
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=_keep_tokenizer_only)
    save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
    (target / _CONFIG).write_text(json.dumps(config, indent=2))


def _join(name: str, tensor: Any, start: dict[str, Any]) -> Any:
    import torch

    if name.endswith("lora_A.weight"):
        return torch.cat([tensor, start[name].to(tensor.dtype)], dim=0)
    if name.endswith("lora_B.weight"):
        return torch.cat([tensor, -start[name].to(tensor.dtype)], dim=1)
    return tensor


def _keep_tokenizer_only(_: str, names: list[str]) -> set[str]:
    return {name for name in names if "token" not in name and name != "chat_template.jinja"}
