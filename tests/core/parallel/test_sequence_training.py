"""Training with sequence parallelism against the same training on one process, in float64.

Weights are compared after two SGD steps, for each parameter relative to its norm. Adam would hide
a wrong scale, and an absolute tolerance would hide a wrong small parameter.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.support.spawn import spawn

VOCAB = 61
WINDOWED = {"sliding_window": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", WINDOWED),
    "phi3": ("Phi3", {"original_max_position_embeddings": 64}),
    "olmo2": ("Olmo2", {}),
    "gemma": ("Gemma", {}),
    # It caps scores and logits and has a sliding window in every other layer. transformers chooses
    # eager attention, which gives NaN in float64 for padding that sees no token within 5.
    "gemma2": ("Gemma2", {"sliding_window": 12, "attn_logit_softcapping": 0.5}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "experts_implementation": "eager",  # the others do not support float64
        },
    ),
}
"""Prefixes of transformers' class names, and the models' own settings."""
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training. `rows` is the micro-batch of a whole sequence group."""

    size: int = 2
    groups: int = 1
    zero: int | None = None
    """DeepSpeed's stage; None for DDP."""
    model: str = "llama"
    heads: int = 4
    key_heads: int = 2
    accumulate: int = 1
    rows: int = 3
    data: str = "ragged"
    checkpointing: bool = False
    evaluated: int = 7
    """Rows to evaluate. With several groups they must fill every batch, as on one process."""
    has_policy: bool = False
    """Whether a policy changes gradients and the learning rate."""

    @property
    def label(self) -> str:
        engine = "ddp" if self.zero is None else f"zero{self.zero}"
        heads = f"h{self.heads}k{self.key_heads}"
        extra = "-checkpointing" * self.checkpointing + "-policy" * self.has_policy
        return (
            f"{self.model}-{heads}-{engine}-sp{self.size}x{self.groups}-ga{self.accumulate}"
            f"-rows{self.rows}-{self.data}{extra}-eval{self.evaluated}"
        )

    @property
    def alone(self) -> Case:
        """The same training on one process."""
        rows = self.rows * self.groups
        settings = vars(self) | {"size": 1, "groups": 1, "zero": None, "rows": rows}
        return Case(**settings)


# -- what is trained --------------------------------------------------------------------------


def build_model(case: Case, **more: Any) -> Any:
    import transformers

    settings = {
        "hidden_size": 8 * case.heads,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.key_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    name, own = MODELS[case.model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | own | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # Stage 0 cannot reduce float64 gradients.
    return model.float() if case.zero == 0 else model.double()


def examples(kind: str) -> list[dict[str, Tensor]]:
    """Returns twelve rows; the length of a batch is rarely a multiple of the number of ranks."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(7 if kind == "short_epoch" else 12):
        length = int(torch.randint(9, 22, (1,), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, length, (1,), generator=generator))] = IGNORE
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(kind: str) -> Any:
    def pad(values: Tensor, size: int, value: int) -> Tensor:
        missing = size - len(values)
        return F.pad(values, (missing, 0) if kind == "left" else (0, missing), value=value)

    def make(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        size = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.stack([pad(row["input_ids"], size, 0) for row in rows]),
            "labels": torch.stack([pad(row["labels"], size, IGNORE) for row in rows]),
        }
        mask = torch.stack([pad(torch.ones_like(row["input_ids"]), size, 0) for row in rows])
        if kind == "packed":  # documents of 4 tokens and what remains, one row after the other
            at = torch.arange(size)
            batch["position_ids"] = torch.where(at < 4, at, at - 4).repeat(len(rows), 1)
            batch["labels"][:, 4] = IGNORE
        else:
            batch["attention_mask"] = mask
        half = -(-size // 2)  # tokens in a slice of two
        if kind == "no_label_in_a_slice":
            batch["labels"][:, half:] = IGNORE
            batch["labels"][:, 1] = batch["input_ids"][:, 1]
        if kind == "label_on_the_edge":
            batch["labels"][:] = IGNORE
            here = mask[:, half] == 1
            batch["labels"][here, half] = batch["input_ids"][here, half]
        return batch

    return make


def build_trainer(case: Case, *, model: Any = None, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    deepspeed = {
        "zero_optimization": {"stage": case.zero or 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="sequence-"),
        "per_device_train_batch_size": case.rows,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": case.accumulate,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": case.checkpointing,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "deepspeed": None if case.zero is None else deepspeed,
    }
    keywords = {k: more.pop(k) for k in ("train_dataset", "compute_metrics") if k in more}
    data = examples(case.data)
    return Trainer(
        build_model(case) if model is None else model,
        TrainingArguments(**settings | more),
        train_dataset=keywords.get("train_dataset", data),
        eval_dataset=data[: case.evaluated],
        data_collator=collate(case.data),
        compute_metrics=keywords.get("compute_metrics"),
    )


def forget_last_trainer() -> None:
    """Resets accelerate, which keeps the first Trainer's engine for the life of the process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        del os.environ[name]


def fingerprint(prediction: Any) -> dict[str, float]:
    """Returns sums that depend on every label, every logit of a labelled token, and their order."""
    labels = torch.as_tensor(prediction.label_ids)
    logits = torch.as_tensor(prediction.predictions)[labels.ne(IGNORE)]
    return {"logits": weighted(logits), "labels": weighted(labels.double())}


def weighted(values: Tensor) -> float:
    places = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64)
    return float(values.flatten().double() @ places)


def every_action(history: Any) -> list[Any]:
    """Asks for every kind of action that edits gradients, and for a learning rate factor."""
    import ulysses_monitor as um

    norm = history[-1]["grad/norm/total"]
    return [
        um.Action(kind="centralize", targets=("*mlp*",)),
        um.Action(kind="add_noise", values={"std": 1e-3}),
        um.Action(kind="clip_rows", values={"ratio": 0.5}, targets=("*self_attn*",)),
        um.Action(kind="scale_each", values={"lm_head.weight": 0.5}),
        um.Action(kind="clip_each", values={"model.norm.weight": 1e-3}),
        um.Action(kind="clip_value", values={"limit": 0.01}, targets=("*embed*",)),
        um.Action(kind="freeze", targets=("*layers.0*layernorm*",)),
        um.Action(kind="clip_norm", values={"max_norm": 0.5 * norm}),
        um.Action(kind="lr_factor", values={"factor": 1.5}),
    ]


def train(case: Case) -> dict[str, Any]:
    import ulysses_core as uc
    import ulysses_monitor as um

    trainer = build_trainer(case, compute_metrics=fingerprint)
    sink = um.MemorySink()
    folder = tempfile.mkdtemp(prefix="sequence-run-")
    policies = [every_action] if case.has_policy else []
    monitor = um.Monitor(
        folder,
        tensorboard=False,
        sinks=[sink],
        if_exists="overwrite",
        rules=[],
        policies=policies,
    )
    monitor.attach(trainer)
    uc.sequence_parallel(trainer, case.size)
    trainer.train()
    evaluation = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "weights": weights_of(model),
        "losses": [entry["loss"] for entry in logged],
        "metrics": [r.to_dict() for r in sink.records if "train/loss/total" in r],
        "eval": {k: float(evaluation[k]) for k in ("eval_loss", "eval_logits", "eval_labels")},
    }


def weights_of(model: Any) -> dict[str, Tensor]:
    """Returns whole weights, also under ZeRO-3."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    gathered: Any = nullcontext()
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    with gathered:
        return {n: p.detach().double().clone() for n, p in model.state_dict().items()}


def train_all(cases: list[dict]) -> dict[str, Any]:
    """Trains every case in a child; a case that fails on all ranks does not stop the others."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results = {}
    for settings in cases:
        case = Case(**settings)
        try:
            results[case.label] = train(case)
        except Exception:  # noqa: BLE001 - the test of this case reports it
            results[case.label] = {"error": traceback.format_exc()}
        forget_last_trainer()
    return results


# -- the comparison ---------------------------------------------------------------------------

TWO = [
    Case(),
    Case(heads=3, key_heads=3),
    Case(key_heads=1, accumulate=3, rows=1),
    Case(rows=7, data="short_epoch"),
    Case(rows=2, accumulate=3, data="short_epoch"),
    Case(data="no_label_in_a_slice"),
    Case(data="label_on_the_edge"),
    Case(data="left"),
    Case(data="packed"),
    Case(checkpointing=True),
    *(Case(model=m) for m in ("qwen2", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "qwen3_moe")),
    Case(model="gemma2", data="packed"),
    Case(heads=6, key_heads=3, data="packed"),
    Case(model="mistral"),
    Case(model="mistral", data="packed"),
    Case(zero=0),
    Case(zero=1),
    Case(zero=1, accumulate=3, rows=1, data="packed"),
    Case(zero=2),
    Case(zero=2, accumulate=3, rows=2, data="short_epoch"),
    Case(zero=3),
    Case(zero=3, accumulate=3, rows=1, key_heads=4, data="packed"),
    Case(has_policy=True),
    Case(has_policy=True, zero=1),
    Case(has_policy=True, zero=2),
    Case(has_policy=True, zero=3),
]
FOUR = [
    Case(size=2, groups=2, rows=2, evaluated=6, has_policy=True),
    Case(size=2, groups=2, rows=2, evaluated=6),
    Case(size=4, groups=1),
    Case(size=2, groups=2, rows=1, accumulate=3, zero=2, evaluated=6),
]


def grid(size: int, zero: int | None) -> list[Case]:
    """Returns the cases on four ranks: heads, accumulation and packing."""
    return [
        Case(
            size=size,
            groups=4 // size,
            rows=1,
            zero=zero,
            heads=heads,
            key_heads=key_heads,
            accumulate=accumulate,
            evaluated=6 if size > 1 else 12,
            data=data,
        )
        for heads, key_heads in ((4, 4), (4, 2), (4, 1), (6, 3), (3, 3), (6, 6))
        for accumulate in (1, 3)
        for data in ("ragged", "packed")
    ]


def settings_of(cases: list[Case]) -> list[dict]:
    return [vars(case) for case in cases]


def alone(cases: list[Case]) -> dict[str, Any]:
    unique = {case.alone.label: case.alone for case in cases}
    return spawn(train_all, 1, args=[settings_of(list(unique.values()))], timeout=200)[0]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return alone([*TWO, *FOUR])


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return spawn(train_all, 2, args=[settings_of(TWO)], timeout=200)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return spawn(train_all, 4, args=[settings_of(FOUR)], timeout=200)


def assert_same_training(results: list[dict], one: dict[str, Any], case: Case) -> None:
    truth = one[case.alone.label]
    assert "error" not in truth, truth["error"]
    # ZeRO keeps its master weights in float32, and Gemma computes norms and softmax in it.
    bound = 1e-6 if case.zero is not None or case.model.startswith("gemma") else 1e-12
    start = build_model(case).state_dict()
    for result in (each[case.label] for each in results):
        assert "error" not in result, result["error"]
        moved = 0.0
        for name, weight in truth["weights"].items():
            error = float((result["weights"][name] - weight).norm() / weight.norm())
            assert error <= bound, f"{name}: relative error {error}"
            moved = max(moved, float((weight - start[name]).norm() / weight.norm()))
        assert moved > 1e-4  # otherwise there is nothing to compare
        assert result["losses"] == pytest.approx(truth["losses"], rel=1e-4)
        for name, value in truth["eval"].items():
            # Without sequence parallelism, transformers' own evaluation weighs the batches of
            # several ranks by their tokens, but gives all batches of one process the same weight.
            if name == "eval_loss" and case.size == 1:
                continue
            assert result["eval"][name] == pytest.approx(value, rel=1e-5), name
    assert_same_metrics(results[0][case.label]["metrics"], truth["metrics"])


def assert_same_metrics(records: list[dict], truths: list[dict]) -> None:
    """Compares loss and gradient norms, which show a wrong scale of the gradients directly."""
    assert len(records) == len(truths) == 2
    for record, truth in zip(records, truths, strict=True):
        assert record["train/loss_tokens/total"] == truth["train/loss_tokens/total"]
        assert record["train/loss/total"] == pytest.approx(truth["train/loss/total"], rel=1e-5)
        for name in (n for n in truth if n.startswith("grad/norm/")):
            assert record[name] == pytest.approx(truth[name], rel=1e-5, abs=1e-12), name


@pytest.mark.parametrize("case", TWO, ids=lambda c: c.label)
def test_training_on_two_ranks_equals_one_process(
    two: list[dict], one: dict[str, Any], case: Case
) -> None:
    assert_same_training(two, one, case)


@pytest.mark.parametrize("case", FOUR, ids=lambda c: c.label)
def test_training_on_four_ranks_equals_one_process(
    four: list[dict], one: dict[str, Any], case: Case
) -> None:
    assert_same_training(four, one, case)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_grid_on_four_ranks_equals_one_process(size: int, zero: int | None) -> None:
    cases = grid(size, zero)
    truth = alone(cases)
    results = spawn(train_all, 4, args=[settings_of(cases)], timeout=400)
    for case in cases:
        assert_same_training(results, truth, case)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_eight_ranks_with_fewer_heads_equal_one_process() -> None:
    cases = [Case(size=8), Case(size=8, heads=6, key_heads=3, data="packed", zero=2)]
    truth = alone(cases)
    for case in cases:
        assert_same_training(
            spawn(train_all, 8, args=[settings_of(cases)], timeout=200), truth, case
        )
