"""What `ulysses train` checks before it starts anything: cheap checks, and a rehearsal.

`check` reads the config, the data and the run directory; every start runs it. `rehearse` does in
this process what a rank does before it loads a model, and keeps only the tokenised rows;
``--dry-run`` adds it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ulysses_core.cli.limits import check_attention, check_modality, check_packages
from ulysses_core.config import RunConfig
from ulysses_core.data import DataStats
from ulysses_core.trainers.answering import check_answers
from ulysses_core.trainers.stage import StageKeys, find_stage
from ulysses_monitor.common.errors import InputError

__all__ = ["build_meta_model", "check", "check_models", "ranks_path", "rehearse"]


def check(config: RunConfig, processes: int) -> None:
    """Checks everything that can be checked without importing transformers and reading all rows.

    Raises:
        InputError: the first error found.
    """
    from ulysses_core.data import check_sources
    from ulysses_core.parallel.groups import check_size

    check_size(config.settings.sequence_parallel_size, processes)
    check_models(config)
    check_modality(config)
    check_attention(config)
    _check_positions(config)
    tokenised = config.data.tokenized_path
    has_rows = tokenised is not None and tokenised.is_dir()
    if config.settings.do_train and not config.data.dataset and not has_rows:
        raise InputError("dataset is not set; set it to a name in dataset_info.json")
    _check_evaluation(config)
    check_answers(config)
    _check_output_dir(config)
    _check_policies(config)
    if not has_rows:
        check_sources(config.data, find_stage(config.finetuning.stage))


def rehearse(config: RunConfig, processes: int) -> dict[str, DataStats]:
    """Makes what a rank makes before it loads a model, and the model without its weights.

    Args:
        config: the config.
        processes: how many ranks the training will have.

    Returns:
        Statistics of the tokenised rows by split; empty for a stream.

    Raises:
        InputError: the first error found.
    """
    from ulysses_core.data import load_datasets
    from ulysses_core.parallel.families.allowed import check_family
    from ulysses_core.trainers.arguments import check_training_arguments
    from ulysses_core.trainers.build import build_tokenizer
    from ulysses_core.trainers.deepspeed import check_settings

    if config.deepspeed is not None:
        check_settings(config.deepspeed)
    stage = find_stage(config.finetuning.stage)
    check_packages(config)
    with ranks_path():
        groups = processes // config.settings.sequence_parallel_size
        check_training_arguments(config, *stage.make_arguments(config), groups)
        if config.settings.monitor.enabled:
            config.settings.monitor.make_parts()
    tokenizer = build_tokenizer(config.model)
    seed = config.training.get("data_seed") or config.training.get("seed", 42)
    data = load_datasets(config.data, stage, tokenizer, seed)
    model = build_meta_model(config)
    if config.settings.sequence_parallel_size > 1 and config.settings.check_family:
        check_family(model.config)
    return data.stats


def build_meta_model(config: RunConfig) -> Any:
    """Builds the model and its adapters on the meta device, without memory for weights.

    Raises:
        InputError: the model cannot be built, or a LoRA target matches no module.
    """
    import torch

    from ulysses_core.trainers.adapters import rehearse_adapters
    from ulysses_core.trainers.build import build_tokenizer, load_architecture, model_class
    from ulysses_core.trainers.quantised import check_quantised

    model = config.model
    task = find_stage(config.finetuning.stage).task
    name = model.model_name_or_path
    try:
        architecture = load_architecture(model, build_tokenizer(model))
        check_quantised(config, architecture)
        with torch.device("meta"):
            built = model_class(task).from_config(
                architecture, trust_remote_code=model.trust_remote_code
            )
            return rehearse_adapters(built, config, task)
    except InputError:
        raise
    except Exception as error:
        where = f"model {name}" if name else "model_config"
        line = str(error).strip().split("\n", 1)[0]
        raise InputError(f"{where}: cannot build the model: {line}") from error


def check_models(config: RunConfig) -> None:
    """Refuses models, tokenizers and references whose folder does not exist.

    Raises:
        InputError: there is no such folder.
    """
    names = {
        key: getattr(config.model, key) for key in ("model_name_or_path", "tokenizer_name_or_path")
    }
    names["ref_model"] = getattr(config.stage_keys, "ref_model", None)
    for key, name in names.items():
        if name is None or Path(name).is_dir():
            continue
        # A hub name is owner/model. Anything else, or a name that looks like a path, is a folder.
        is_path = name.count("/") != 1 or name.startswith((".", "/", "runs/", "data/"))
        if is_path or Path(name).parent.is_dir():
            is_example = name.startswith(("runs/", "data/stdlib/"))
            hint = " (make train creates it)" if is_example else ""
            content = "tokenizer" if key == "tokenizer_name_or_path" else "model"
            raise InputError(
                f"{key} is {name!r}, but there is no such folder{hint}; "
                f"expected a folder with a {content}"
            )


def _check_positions(config: RunConfig) -> None:
    """Refuses rows that are longer than the model has positions.

    With `neat_packing` positions restart at each document, whose lengths are not known yet.
    """
    architecture = config.model.architecture
    if architecture is None:
        path = Path(config.model.model_name_or_path or "") / "config.json"
        try:
            architecture = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # a model of the hub, or a damaged folder, about which loading gives an error
    positions, length = architecture.get("max_position_embeddings"), config.data.cutoff_len
    assert isinstance(config.stage_keys, StageKeys)  # noqa: S101 - the config was read with them
    more = config.stage_keys.generated_tokens
    if isinstance(positions, int) and length + more > positions and not config.data.neat_packing:
        answers = f" and answers have up to {more} tokens" if more else ""
        raise InputError(
            f"cutoff_len is {length}{answers}, but the model has {positions} positions; set "
            f"cutoff_len={positions - more}, or raise the model's max_position_embeddings"
        )


def _check_resume(resume: bool | str | None, output_dir: Path) -> None:
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise InputError(
            f"resume_from_checkpoint is {resume!r}, but there is no such folder; "
            "expected a checkpoint folder, or true for the newest one"
        )
    if resume is True and not any(output_dir.glob("checkpoint-*")):
        raise InputError(
            f"resume_from_checkpoint is true, but {output_dir} has no checkpoints; remove it, or "
            "set output_dir to the run to resume"
        )


@contextmanager
def ranks_path() -> Iterator[None]:
    """Finds the user's modules in the working directory, as ``python -m`` does on the ranks."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _check_output_dir(config: RunConfig) -> None:
    from ulysses_monitor.store import check_available, check_writable

    path = config.settings.output_dir
    if path is None:
        check_writable(Path("runs"), where="output_dir")
        return
    resume = config.training.get("resume_from_checkpoint")
    overwrite = config.settings.overwrite_output_dir
    check_available(path, "resume" if resume else "overwrite" if overwrite else "refuse")
    _check_resume(resume, path)


def _check_evaluation(config: RunConfig) -> None:
    """Refuses to evaluate without data; transformers would notice after loading the model."""
    strategy = config.training.get("eval_strategy", "no")
    strategy = getattr(strategy, "value", strategy)
    data = config.data
    has_rows = bool(data.eval_dataset or data.val_size or data.tokenized_path)
    if strategy != "no" and not has_rows:
        raise InputError(
            f"eval_strategy is {strategy}, but there is no data to evaluate on; set eval_dataset "
            "or val_size, or remove eval_strategy"
        )


def _check_policies(config: RunConfig) -> None:
    """Refuses policies that contradict one another or the schedule of the learning rate."""
    from ulysses_monitor.policies import PolicySet, check_conflicts, make_policies

    monitor = config.settings.monitor
    if not monitor.enabled or monitor.mode == "off":
        return
    kind = config.training.get("lr_scheduler_type", "linear")
    with ranks_path():
        policies = PolicySet(make_policies(monitor.policies), monitor.mode)
    check_conflicts(policies.enabled, str(getattr(kind, "value", kind)))
