"""TRL's trainers on small models, trained with sequence parallelism or on one process."""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.support.forget import forget_last_trainer
from tests.support.sequence_cases import VOCAB, weights_of

__all__ = [
    "PAIRS",
    "SAMPLING",
    "StageCase",
    "build_ppo_trainer",
    "build_stage_model",
    "build_stage_trainer",
    "build_words",
    "preferences",
    "reward_small_words",
    "train_stages",
]


SAMPLING = ("grpo", "rloo", "ppo")
"""Stages whose trainers sample answers."""


PAIRS = ("orpo", "cpo")
"""Stages of TRL's trainers that compute their loss from logits."""


@dataclass(frozen=True, kw_only=True)
class StageCase:
    """One training of two steps. `rows` is the micro-batch of a whole sequence group."""

    stage: str
    size: int = 2
    groups: int = 1
    zero: int | None = None
    """DeepSpeed's stage; None for DDP."""
    heads: int = 4
    key_heads: int = 2
    adapters: bool = False
    rows: int = 4
    accumulate: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    """More arguments of the trainer's config."""
    replays: bool = False
    """Whether a sampling trainer gets fixed answers: the groups' random numbers differ."""

    @property
    def label(self) -> str:
        engine = "ddp" if self.zero is None else f"zero{self.zero}"
        kind = "lora" if self.adapters else "full"
        more = "".join(f"-{key}={value}" for key, value in self.settings)
        more += "-replayed" if self.replays else ""
        heads = f"h{self.heads}k{self.key_heads}"
        return (
            f"{self.stage}-{kind}-{heads}-{engine}-sp{self.size}x{self.groups}"
            f"-rows{self.rows}-ga{self.accumulate}{more}"
        )

    @property
    def alone(self) -> StageCase:
        """The same training on one process."""
        return replace(self, size=1, groups=1, zero=None, rows=self.rows * self.groups)


def build_words() -> Any:
    """Returns a tokenizer of the words w2, w3, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    model = Tokenizer(models.WordLevel(vocabulary, "<eos>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def preferences() -> list[dict[str, str]]:
    """Twelve prompts with two answers; the lengths seldom divide by the number of ranks."""
    generator = torch.Generator().manual_seed(1)

    def text(least: int, most: int) -> str:
        length = int(torch.randint(least, most, (1,), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator)
        return " ".join(f"w{int(i)}" for i in ids)

    return [
        {"prompt": text(2, 8), "chosen": " " + text(3, 12), "rejected": " " + text(3, 12)}
        for _ in range(12)
    ]


def build_stage_model(case: StageCase, seed: int = 0) -> Any:
    """Returns a small Llama in float64, with a score head for stage rm."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=8 * case.heads,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    if case.stage == "rm":
        config.num_labels = 1
        return LlamaForSequenceClassification(config).double()
    return LlamaForCausalLM(config).double()


def common_settings(case: StageCase) -> dict[str, Any]:
    deepspeed = {
        "zero_optimization": {"stage": case.zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return {
        "output_dir": tempfile.mkdtemp(prefix="stage-"),
        "per_device_train_batch_size": case.rows,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": case.accumulate,
        "max_steps": 2,
        # The step must not be so long that rounding grows in the next one.
        "learning_rate": 0.02 if case.adapters else 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": None if case.zero is None else deepspeed,
    }


def stage_classes(stage: str) -> tuple[Any, Any]:
    """Returns TRL's trainer of a stage, and the class of its arguments."""
    import importlib

    name = "Reward" if stage == "rm" else stage.upper()
    module = importlib.import_module(f"trl.experimental.{stage}" if stage in PAIRS else "trl")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def build_stage_trainer(case: StageCase) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    if case.stage == "ppo":
        return build_ppo_trainer(case)
    settings = common_settings(case)
    if case.stage in ("dpo", "kto", *PAIRS):
        settings["disable_dropout"] = False
    if case.stage in SAMPLING:
        settings |= {"num_generations": 2, "max_completion_length": 6, "shuffle_dataset": False}
        settings |= {"beta": 0.1}
        del settings["train_sampling_strategy"]
    rows = _rows(case.stage)
    torch.manual_seed(0)
    task = "SEQ_CLS" if case.stage == "rm" else "CAUSAL_LM"
    # Not the reference from the start, whose differences would be nothing but rounding.
    adapters = LoraConfig(r=2, target_modules="all-linear", task_type=task, init_lora_weights=False)
    more: dict[str, Any] = {}
    model = build_stage_model(case)
    if case.stage in ("dpo", "kto") and not case.adapters:
        more["ref_model"] = build_stage_model(case, seed=1)
    if case.stage in SAMPLING:
        more["reward_funcs"] = [reward_small_words, reward_length]
        if not case.adapters:  # TRL loads the reference by the model's name
            model.config._name_or_path = save_reference(case)
    kind, make_args = stage_classes(case.stage)
    trainer = kind(
        model=model,
        args=make_args(**settings | dict(case.settings)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=build_words(),
        peft_config=adapters if case.adapters else None,
        **more,
    )
    for param in trainer.model.parameters():  # PEFT makes adapters in float32
        param.data = param.data.double()
    if case.replays:
        answer_by_prompt(trainer)
    return trainer


def build_ppo_trainer(case: StageCase, rewards: Any = None, **numbers: Any) -> Any:
    """Returns the trainer of stage ppo.

    Args:
        case: the training.
        rewards: reward functions. None for a reward model in full, and two functions for adapters.
        numbers: other values for `PPOSettings`.
    """
    from types import SimpleNamespace

    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from ulysses_core.config import FinetuningConfig
    from ulysses_core.data import DatasetPair
    from ulysses_core.rewards import make_rewards
    from ulysses_core.trainers.ppo.config import PPOConfig
    from ulysses_core.trainers.ppo.trainer import PPOSettings, PPOTrainer
    from ulysses_core.trainers.ppo.value_head import add_value_head
    from ulysses_core.trainers.stage import NoKeys, Parts

    model, tokenizer = build_stage_model(case), build_words()
    # Before DeepSpeed's settings exist, with which transformers would make models in shards.
    reference = build_stage_model(case, seed=1)
    if rewards is None and case.adapters:
        rewards = [reward_small_words, {"tests.support.stage_cases:reward_length": {"weight": 0.5}}]
    reward_model = None if rewards else build_stage_model(replace(case, stage="rm"), seed=3)
    add_value_head(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so that values differ and matter
        model.v_head.weight.normal_(std=0.3, generator=generator)
    if case.adapters:
        torch.manual_seed(0)
        adapters = LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, modules_to_save=["v_head"]
        )
        model = get_peft_model(model, adapters).double()
    settings = common_settings(case) | {"max_completion_length": 6, "shuffle_dataset": False}
    del settings["train_sampling_strategy"]
    settings |= {"num_iterations": 2, "beta": 0.2, "steps_per_generation": case.accumulate}
    scorers = make_rewards(rewards) if rewards else []
    settings["reward_weights"] = [each.weight for each in scorers] or [1.0]
    rows = [
        {"prompt": tokenizer(p["prompt"])["input_ids"], "question": "", "answer": None, "where": ""}
        for p in preferences()
    ]
    parts: Any = SimpleNamespace(
        config=SimpleNamespace(
            data=SimpleNamespace(template=None),
            finetuning=FinetuningConfig(finetuning_type="lora" if case.adapters else "full"),
            stage_keys=NoKeys(),
        ),
        args=PPOConfig(**settings | dict(case.settings)),
        model=model,
        tokenizer=tokenizer,
        data=DatasetPair(Dataset.from_list(rows), Dataset.from_list(rows[:8]), {}),
        make_reference=lambda: reference,
    )
    assert set(Parts.__annotations__) == set(vars(parts))
    defaults: dict[str, Any] = {"init_kl_coef": 0.2, "target": 0.5, "horizon": 100.0}
    defaults |= {"gamma": 0.9, "lam": 0.8, "cliprange": 0.05, "cliprange_value": 0.1}
    defaults |= {"vf_coef": 0.5, "score_norm": True, "whiten_rewards": True}
    trainer = PPOTrainer(scorers, parts, PPOSettings(**defaults | numbers), reward_model)
    if case.replays:
        answer_by_prompt(trainer)
    return trainer


def save_reference(case: StageCase) -> str:
    """Writes a reference model on every rank; `save_pretrained` does so on one."""
    from safetensors.torch import save_file

    folder = tempfile.mkdtemp(prefix="reference-")
    model = build_stage_model(case, seed=1)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
    return folder


def reward_small_words(completions: list[str], **_: Any) -> list[float]:
    """Returns the share of words w2 to w20; it is seldom the same for two answers."""
    words = [text.split() for text in completions]
    return [sum(int(w[1:]) <= 20 for w in row) / (1 + len(row)) for row in words]


def reward_length(completions: list[str], **_: Any) -> list[float]:
    return [len(text) / 50 for text in completions]


def answer_by_prompt(trainer: Any) -> None:
    """Replaces sampling, whose random numbers differ between groups, by answers to each prompt."""

    def answer(prompts: list[list[int]], *_: Any) -> tuple[list[list[int]], Any]:
        answers = []
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(sum(prompt) * 2 + index % 2)
            length = int(torch.randint(2, 7, (1,), generator=generator))
            answers.append(torch.randint(2, VOCAB, (length,), generator=generator).tolist())
        log_probs = [[-4.0] * len(answer) for answer in answers]
        return answers, log_probs if hasattr(trainer, "reward_model") else None

    trainer._generate_single_turn = answer


def _rows(stage: str) -> list[dict[str, Any]]:
    pairs = preferences()
    if stage in SAMPLING:
        return [{"prompt": p["prompt"]} for p in pairs]
    if stage == "sft":
        return [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
    if stage == "kto":
        sides = [("chosen", True), ("rejected", False)]
        return [
            {
                "prompt": pair["prompt"],
                "completion": pair[sides[i % 2][0]],
                "label": sides[i % 2][1],
            }
            for i, pair in enumerate(pairs)
        ]
    return pairs


def train_stage(case: StageCase) -> dict[str, Any]:
    import ulysses_core as uc

    trainer = build_stage_trainer(case)
    uc.sequence_parallel(trainer, case.size)
    trainer.train()
    evaluation = trainer.evaluate()
    timing = ("runtime", "second", "epoch", "flos", "step_time")
    logged = [
        {k: float(v) for k, v in entry.items() if not any(word in k for word in timing)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {
        "weights": weights_of(trainer.accelerator.unwrap_model(trainer.model)),
        "logged": logged,
        "eval": {
            k: float(v) for k, v in evaluation.items() if not any(word in k for word in timing)
        },
    }


def train_stages(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The child: every case in turn; a case that fails on all ranks does not stop the others."""
    import torch.distributed as dist

    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results = {}
    for settings in cases:
        case = StageCase(**settings)
        try:
            results[case.label] = train_stage(case)
        except Exception:  # noqa: BLE001 - the test of this case reports it
            results[case.label] = {"error": traceback.format_exc()}
        forget_last_trainer()
    return results
