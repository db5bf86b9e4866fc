"""One seed and one config give one set of initial weights, however the training is distributed."""

from __future__ import annotations

import functools
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.forget import forget_last_trainer
from tests.support.spawn import spawn
from ulysses_monitor.common.errors import InputError

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    },
    "tied": {  # biases, learned positions, weights of a class of their own; embedding tied
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "tie_word_embeddings": True,
    },
    "experts": {  # parameters that are no module's weight, and a buffer
        "model_type": "deepseek_v3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
LORA = {"finetuning_type": "lora", "lora_rank": 2}
OFFLOAD = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    },
    "zero_force_ds_cpu_optimizer": False,  # which DeepSpeed first compiles
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "zero3-offload": {"deepspeed": OFFLOAD},
    "fsdp2": {"fsdp": "full_shard", "fsdp_config": {"version": 2}},
    "zero3-sp2": {"deepspeed": "zero3", "sequence_parallel_size": 2},
    "ddp-sp2": {"sequence_parallel_size": 2},
}


ROWS = [{"input_ids": [(3 + i * i + 7 * i * j + j) % 31 for j in range(12)]} for i in range(8)]
"""What initialisations look at."""


class Words:
    """What `build_model` asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 31


def start(folder: str, name: str, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The child: builds model and Trainer as `ulysses train` does; the weights at the start."""
    from transformers import Trainer, TrainerCallback

    from ulysses_core.parallel import sequence_parallel
    from ulysses_core.trainers.arguments import build_training_arguments
    from ulysses_core.trainers.build import build_model
    from ulysses_core.trainers.deepspeed import prepare_environment
    from ulysses_core.trainers.stage import find_stage, load_config

    path = Path(folder, f"{name}.yaml")
    path.write_text(yaml.safe_dump({"stage": "pt", "dataset": "none", **values}))
    config = load_config(path)
    prepare_environment(uses_deepspeed=config.deepspeed is not None)
    args = build_training_arguments(config, *find_stage("pt").make_arguments(config))
    args.output_dir = f"{folder}/{name}"
    args.save_strategy = "no"
    model: Any = build_model(config, Words(), "causal", args.device, ROWS)
    held = {"state/random": torch.get_rng_state().clone()}

    class Looks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            held.update(gather(trainer))

    rows = [{"input_ids": [3] * 8, "labels": [3] * 8, "attention_mask": [1] * 8}] * 8
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Looks()])
    sequence_parallel(trainer, config.settings.sequence_parallel_size)
    trainer.train()
    forget_last_trainer()
    return held


def gather(trainer: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, whole."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_fsdp_wrapped_module.", ""): whole(value) for name, value in named}


def whole(value: Any) -> torch.Tensor:
    if hasattr(value, "ds_tensor"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([value]):
            return value.detach().cpu().clone()
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().clone()


def settings(model: str, more: dict[str, Any]) -> dict[str, Any]:
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "seed": 7}
    kind = {"finetuning_type": "full", "model_config": MODELS[model]}
    values = {**kind, "tokenizer_name_or_path": "none", **training, **more}
    return {name: value for name, value in values.items() if value is not None}


@functools.cache
def alone(model: str, more: str, folder: str) -> dict[str, torch.Tensor]:
    (held,) = spawn(start, 1, args=[folder, "alone", settings(model, json.loads(more))])
    return held


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_those_of_one_process(model: str, engine: str, tmp_path: Path) -> None:
    compare(model, engine, {}, tmp_path)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_they_are_in_bf16_too(engine: str, tmp_path: Path) -> None:
    held = compare("tied", engine, {"bf16": True}, tmp_path)
    assert held["transformer.wte.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_so_are_the_adapters(engine: str, tmp_path: Path) -> None:
    held = compare("llama", engine, LORA, tmp_path)
    for side in ("lora_A", "lora_B"):
        assert any(side in name for name in held)


INITS: list[Any] = [
    pytest.param({"lora_init": "orthogonal_small"}, id="orthogonal_small"),
    pytest.param({"lora_init": "pissa_niter_4"}, id="pissa_niter"),
    *(
        pytest.param({"lora_init": name}, id=name, marks=pytest.mark.full)
        for name in ("gaussian", "orthogonal", "mica", "olora", "pissa")
    ),
    pytest.param({"use_dora": True}, id="dora", marks=pytest.mark.full),
    pytest.param({"finetuning_type": "oft", "oft_block_size": 4}, id="oft", marks=pytest.mark.full),
]


@pytest.mark.parametrize("engine", ["zero3", pytest.param("ddp", marks=pytest.mark.full)])
@pytest.mark.parametrize("init", INITS)
def test_so_they_are_under_every_initialisation_and_so_is_the_base(
    init: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    compare("llama", engine, {**LORA, **init}, tmp_path)


IN_DEFAULT_RUN = (("eva", "ddp"), ("corda", "zero2"), ("lora_ga", "fsdp2"))
FROM_ROWS = [
    pytest.param(*case, marks=() if case in IN_DEFAULT_RUN else pytest.mark.full)
    for case in product(("eva", "corda", "lora_ga"), ("ddp", "zero2", "fsdp2", "ddp-sp2"))
]


@pytest.mark.parametrize(("init", "engine"), FROM_ROWS)
def test_so_they_are_if_rank_0_looked_at_rows(init: str, engine: str, tmp_path: Path) -> None:
    compare("llama", engine, {**LORA, "lora_init": init}, tmp_path)


@pytest.mark.parametrize("engine", ["zero3", pytest.param("ddp", marks=pytest.mark.full)])
def test_so_is_the_base_after_adapters_are_merged(engine: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**MODELS["llama"], "vocab_size": 31}))
    model.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    loaded = {"model_config": None, "model_name_or_path": str(tmp_path / "base")}
    both = {"adapter_name_or_path": f"{tmp_path / 'adapter'}, {tmp_path / 'adapter'}"}
    held = compare("llama", engine, {**LORA, **loaded, **both}, tmp_path)
    name = "model.layers.0.self_attn.q_proj.base_layer.weight"
    kept = next(value for key, value in held.items() if key.endswith(name))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(kept, base.model.layers[0].self_attn.q_proj.weight, atol=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_so_are_the_adapters_of_a_loaded_model(engine: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**MODELS["llama"], "vocab_size": 31})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    loaded = {"model_config": None, "model_name_or_path": str(tmp_path / "base")}
    compare("llama", engine, {**LORA, **loaded}, tmp_path)


def compare(model: str, engine: str, more: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    reference = alone(model, json.dumps(more), str(folder))
    distributed = settings(model, {**more, **ENGINES[engine]})
    for held in spawn(start, 2, args=[str(folder), engine, distributed]):
        assert held.keys() == reference.keys()
        different = [name for name in held if not torch.equal(held[name], reference[name])]
        assert not different
    return reference


def refuse(folder: str) -> str:
    """The child: what a model says that cannot be built."""
    try:
        start(folder, "refused", settings("llama", {**ENGINES["zero3"], "flash_attn": "fa2"}))
    except InputError as error:
        return str(error)
    return ""


def test_a_model_that_cannot_be_built_is_refused_on_each_rank(tmp_path: Path) -> None:
    first, second = spawn(refuse, 2, args=[str(tmp_path)])
    assert first.startswith("model_config: cannot build a model: ")
    assert "flash" in first.lower()
    assert (
        second == "model_config: cannot build a model: rank 0 could not build it; see its message"
    )
