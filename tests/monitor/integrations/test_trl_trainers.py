"""The monitor on TRL's trainers: whole models and LoRA, on one process, DDP and DeepSpeed.

A child trains each case twice with one seed, bare and watched, and hands back what it saw; a test
compares one thing in it. The truth is taken beside the monitor: gradients in float64 where the
Trainer clips them, tokens and labels where the model runs with gradients. Whole models are watched
by `attach`, LoRA models by a `MonitorCallback`.
"""

from __future__ import annotations

import math
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ulysses_monitor as um
from tests.support.forget import forget_last_trainer
from tests.support.hf_cases import rank, weights, zero_optimizer
from tests.support.spawn import SpawnError, spawn
from ulysses_monitor.integrations.rewards import bimodality
from ulysses_monitor.store import Location, read_steps

STEPS = 3
CLIP = 0.005
WORDS = [f"w{i}" for i in range(24)]
COLUMNS = {
    "sft": ["prompt", "completion"],
    "dpo": ["prompt", "chosen", "rejected"],
    "kto": ["prompt", "completion"],
    "reward": ["chosen", "rejected"],
    "grpo": ["prompt"],
    "rloo": ["prompt"],
}
HOW: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": {},
    "bf16": {"bf16": True},
    "packed": {"packing": True, "max_length": 16},
    "precomputed": {"precompute_ref_log_probs": True},
    "wide": {"per_device_train_batch_size": 8, "max_steps": 1, "eval_strategy": "no"},
    "reused": {"num_iterations": 2, "steps_per_generation": 4},
}
CASES = [
    *(f"{t}-{e}-{h}" for e in ("plain", "ddp") for t in list(COLUMNS)[:5] for h in list(HOW)[:2]),
    *(f"{t}-zero2-{h}" for t in ("sft", "dpo") for h in ("whole", "lora")),
]
MORE_CASES = [
    *(f"{t}-zero2-{h}" for t in ("kto", "reward", "grpo") for h in ("whole", "lora")),
    *(f"{t}-{e}-bf16" for t in ("sft", "dpo", "grpo") for e in ("plain", "ddp", "zero2")),
    *(f"rloo-{e}-{h}" for e in ("plain", "ddp", "zero2") for h in ("whole", "lora")),
    *("sft-plain-packed", "sft-ddp-packed", "dpo-plain-precomputed", "kto-plain-precomputed"),
    *("grpo-plain-reused", "grpo-ddp-reused"),
]
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(kind: str) -> Any:
    """32 rows of different lengths, so that batches have padding."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)

    def text() -> str:
        length = int(torch.randint(2, 8, (), generator=generator))
        ids = torch.randint(0, len(WORDS), (length,), generator=generator)
        return "".join(f"{WORDS[i]} " for i in ids.tolist())

    rows: list[dict[str, Any]] = [{c: text() for c in COLUMNS[kind]} for _ in range(32)]
    for i, row in enumerate(rows if kind == "kto" else []):
        row["label"] = i % 3 > 0
    return Dataset.from_list(rows)


def spread_of_letters(completions: list[str], **_: Any) -> list[float]:
    return [len(set(completion)) + 0.1 * len(completion) for completion in completions]


def build_model(kind: str, words: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(words),
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    return (LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM)(config)


def build_trainer(case: str, folder: Path, **keywords: Any) -> Any:
    import trl
    from peft import LoraConfig

    kind, engine, how = case.split("-")
    torch.manual_seed(0)
    words = tokenizer()
    settings: dict[str, Any] = {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": ZERO2 if engine == "zero2" else None,
    }
    if kind in ("grpo", "rloo"):
        settings |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}
        keywords["reward_funcs"] = spread_of_letters
    elif kind in ("dpo", "kto") and how != "lora":
        keywords["ref_model"] = build_model(kind, words)
    if how == "lora":
        task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
        keywords["peft_config"] = LoraConfig(r=4, lora_dropout=0.1, task_type=task)
    name, rows = {"reward": "Reward"}.get(kind, kind.upper()), texts(kind)
    return getattr(trl, f"{name}Trainer")(
        model=build_model(kind, words),
        args=getattr(trl, f"{name}Config")(**settings | HOW[how]),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=words,
        **keywords,
    )


# -- the child --------------------------------------------------------------------------------


@contextmanager
def beside_the_monitor(trainer: Any, seen: dict[str, list[float]]) -> Iterator[None]:
    """What the step before clipping really is: gradient norm, and tokens and labels it ran."""
    original, run = trainer.accelerator.clip_grad_norm_, {"tokens_run": 0, "labels_run": 0}

    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        seen["norm_before_clipping"].append(math.sqrt(sum(squares)))
        for name, count in run.items():
            seen[name].append(count)
            run[name] = 0
        return original(parameters, *args, **kwargs)

    def forward(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            mask, labels = inputs.get("attention_mask"), inputs.get("labels")
            run["tokens_run"] += int((inputs["input_ids"] * 0 + 1 if mask is None else mask).sum())
            run["labels_run"] += 0 if labels is None else int(labels[:, 1:].ne(-100).sum())

    trainer.accelerator.clip_grad_norm_ = clip
    hook = trainer.model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        yield
        assert trainer.accelerator.clip_grad_norm_ is clip
    finally:
        del trainer.accelerator.clip_grad_norm_
        hook.remove()


def fingerprint(trainer: Any) -> dict[str, tuple[str, int]]:
    """Attributes, own functions and numbers of hooks of all that the Trainer owns."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    owned = {
        "trainer": trainer,
        "accelerator": trainer.accelerator,
        "optimizer": optimizer,
        "zero": zero_optimizer(trainer),
        "engine": trainer.model_wrapped,
        "model": trainer.model,
    }
    return {
        f"{name}.{key}": (
            value.__qualname__ if isinstance(value, FunctionType | MethodType) else "",
            len(value) if "hooks" in key and hasattr(value, "__len__") else 0,
        )
        for name, instance in owned.items()
        if instance is not None
        for key, value in vars(instance).items()
    }


def train_twice(case: str, folder: Path) -> dict[str, Any]:
    bare = build_trainer(case, folder)
    bare.train()
    forget_last_trainer()
    sink, seen = um.MemorySink(), defaultdict(list)
    monitor = um.Monitor(folder / "run", tensorboard=False, sinks=[sink], sample_every=1)
    lora = case.endswith("lora")
    trainer = build_trainer(case, folder, callbacks=[um.MonitorCallback(monitor)] if lora else [])
    if not lora:
        monitor.attach(trainer)
    with beside_the_monitor(trainer, seen):
        trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    steps = [r for r in sink.records if "grad/norm/total" in r]
    rows = read_steps(Location.of(monitor.run_dir))
    own = [[row for row in rows[step] if row.rank == rank()] for step in sorted(rows)]
    trained, left, was = weights(bare), fingerprint(trainer), fingerprint(bare)
    return dict(seen) | {
        "steps": [r.step for r in steps],
        "records": [dict(zip(r.schema.names, r.values.tolist(), strict=True)) for r in steps],
        "logged": {key: [float(e[key]) for e in logged] for key in ("loss", "grad_norm")},
        "tokens_of_rows": [float(sum(row.length for row in each)) for each in own],
        "labels_of_rows": [float(sum(row.trained or 0 for row in each)) for each in own],
        "has_indices": [all(row.index is not None for row in each) for each in own],
        "changed": [n for n, w in weights(trainer).items() if not torch.equal(w, trained[n])],
        "left": [key for key in left | was if left.get(key) != was.get(key)],
    }


def train_cases(root: str, cases: list[str]) -> dict[str, Any]:
    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    facts: dict[str, Any] = {}
    for case in cases:
        folder = Path(root, case)
        folder.mkdir(exist_ok=True)
        try:
            facts[case] = train_twice(case, folder)
        except Exception:  # noqa: BLE001 - the tests of this case report it
            facts[case] = traceback.format_exc()
        forget_last_trainer()
    return facts


# -- the tests --------------------------------------------------------------------------------

Facts = Callable[[str], list[dict[str, Any]]]
each_case = pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_CASES)]
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What each rank saw of a case; a group of cases is trained when the first of it is asked."""

    @cache
    def of_group(processes: int, more: bool) -> list[dict[str, Any]] | str:
        cases = MORE_CASES if more else CASES
        chosen = [case for case in cases if ("plain" in case) == (processes == 1)]
        root = str(tmp_path_factory.mktemp("trl"))
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            return spawn(train_cases, processes, args=[root, chosen], timeout=240, env=offline)
        except SpawnError as error:
            return str(error)  # for every test of the group, and not tried again for each

    def of(case: str) -> list[dict[str, Any]]:
        group = of_group(1 if "plain" in case else 2, case in MORE_CASES)
        assert not isinstance(group, str), group
        ranks = [seen[case] for seen in group]
        assert not any(isinstance(seen, str) for seen in ranks), ranks
        return ranks

    return of


def recorded(ranks: list[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in ranks[0]["records"]]


def all_ranks(ranks: list[dict[str, Any]], name: str) -> list[float]:
    return torch.tensor([seen[name] for seen in ranks], dtype=torch.float64).sum(0).tolist()


@each_case
def test_every_step_is_recorded_once(facts: Facts, case: str) -> None:
    assert [seen["steps"] for seen in facts(case)] == [[1, 2, 3], []][: len(facts(case))]


@each_case
def test_the_norm_is_of_the_gradients_before_clipping(facts: Facts, case: str) -> None:
    ranks, (kind, engine, how) = facts(case), case.split("-")
    norms = recorded(ranks, "grad/norm/total")
    assert norms == pytest.approx(ranks[0]["logged"]["grad_norm"], rel=1e-4)
    assert recorded(ranks, "grad/clip_coef/total") == pytest.approx([CLIP / n for n in norms], 1e-3)
    assert min(norms) > CLIP
    if engine != "zero2":
        assert norms == pytest.approx(ranks[0]["norm_before_clipping"], rel=1e-6)
    elif kind not in ("grpo", "rloo") and how != "bf16":  # DeepSpeed trains what DDP trains
        ddp = facts(f"{kind}-ddp-{how}")[0]
        assert norms == pytest.approx(ddp["norm_before_clipping"], rel=1e-5)


@each_case
def test_the_loss_is_the_one_that_the_trainer_logs(facts: Facts, case: str) -> None:
    losses = recorded(facts(case), "train/loss/total")
    assert losses == pytest.approx(facts(case)[0]["logged"]["loss"], rel=1e-6, abs=1e-6)


@each_case
def test_tokens_are_those_that_ran_with_gradients_on_all_ranks(facts: Facts, case: str) -> None:
    ranks = facts(case)
    speed = recorded(ranks, "train/tokens_per_second/total")
    seconds = recorded(ranks, "train/step_seconds/total")
    tokens = [a * b for a, b in zip(speed, seconds, strict=True)]
    assert tokens == pytest.approx(all_ranks(ranks, "tokens_run"), rel=1e-9)
    if not case.startswith("reward"):
        labels = recorded(ranks, "train/loss_tokens/total")
        assert labels == all_ranks(ranks, "labels_run")
        assert 0 < sum(labels) < sum(tokens)


@each_case
def test_the_rows_of_each_rank_are_those_that_ran_with_gradients(facts: Facts, case: str) -> None:
    for seen in facts(case):
        assert seen["tokens_of_rows"] == pytest.approx(seen["tokens_run"])
        if not case.startswith("reward"):
            assert seen["labels_of_rows"] == pytest.approx(seen["labels_run"])
        # Rows that are sampled are not in the dataset; packed ones are in the packed dataset.
        assert seen["has_indices"] == [not case.startswith(("grpo", "rloo"))] * STEPS


@each_case
def test_adapters_are_recorded_if_there_are_any(facts: Facts, case: str) -> None:
    for record in facts(case)[0]["records"]:
        assert (record.get("lora/grad_ratio_B_A/total", 0) > 0) == case.endswith("lora")


@each_case
def test_the_weights_are_bit_equal_to_an_unwatched_training(facts: Facts, case: str) -> None:
    assert [seen["changed"] for seen in facts(case)] == [[]] * len(facts(case))


@each_case
def test_nothing_remains_on_what_the_trainer_owns(facts: Facts, case: str) -> None:
    assert [seen["left"] for seen in facts(case)] == [[]] * len(facts(case))


@pytest.mark.parametrize(
    ("batch", "tokens", "labels"),
    [
        ({"attention_mask": [[1, 1, 2], [3, 0, 0]]}, 4, None),  # numbers of packed documents
        ({"attention_mask": [[[[1, 0], [1, 1]]]], "input_ids": [[5, 6]]}, 2, None),
        ({"attention_mask": [[1, 1]], "shift_labels": [[3, 4]], "labels": [[-100, 3]]}, 2, 2),
        ({"attention_mask": [[1, 1]], "completion_mask": [[1, 1]]}, 2, 1),
        ({"chosen_attention_mask": [[1, 1]], "rejected_attention_mask": [[1]]}, 3, None),
        (
            {
                "prompt_mask": [[0, 1]],
                "completion_ids": [[3, 4, 5]],
                "completion_mask": [[1, 1, 0]],
                "tool_mask": [[0, 1, 1]],
            },
            3,
            1,
        ),
        ({"pixels": [[1]]}, 0, None),
    ],
)
def test_tokens_and_labels_of_other_batches(
    batch: dict[str, Any], tokens: int, labels: int | None
) -> None:
    from ulysses_monitor.integrations.batches import label_tokens, row_tokens

    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    assert row_tokens(tensors) == tokens
    assert label_tokens(tensors, shifted=True) == labels


def test_the_rewards_of_answers_are_looked_at_one_by_one(tmp_path: Path) -> None:
    trainer = build_trainer("grpo-plain-wide", tmp_path)
    um.Monitor(tmp_path / "run", tensorboard=False).attach(trainer)
    trainer.train()
    (rewards,) = trainer._logs["rewards"].values()
    assert len(rewards) == 16
    found = um.open_run(tmp_path / "run").metrics("train/reward_bimodality/total")
    assert found.squeeze() == pytest.approx(bimodality(np.array(rewards)))
    forget_last_trainer()
