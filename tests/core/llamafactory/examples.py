"""Configs that set the keys which LLaMA-Factory 0.9.5 sets in its examples, file by file.

They are written from its documentation; the values are ours. `LLAMAFACTORY_EXAMPLES=<folder>` makes
the tests read the examples themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

__all__ = ["examples", "find_checkout"]

TRAIN: dict[str, Any] = {
    "model_name_or_path": "owner/model",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 512,
    "max_samples": 100,
    "preprocessing_num_workers": 4,
    "dataloader_num_workers": 2,
    "output_dir": "saves/model",
    "logging_steps": 5,
    "save_steps": 100,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "num_train_epochs": 2.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
RESUME = {"resume_from_checkpoint": None}
LORA = {"lora_rank": 4, "lora_target": "all"}
OLD = {"overwrite_cache": True}
FULL = {"finetuning_type": "full"}
STEPS = (
    "logging_steps",
    "save_steps",
    "plot_loss",
    "save_only_model",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_ratio",
)


def _without(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys)


QWEN = {"template": "qwen3_nothink"}
QOFT = {"finetuning_type": "oft", "oft_block_size": 8, "oft_target": "all", **OLD}
OFT = {**QOFT, **RESUME}
VISION = {
    "model_name_or_path": "owner/model-vl",
    "template": "qwen3_vl_nothink",
    "dataset": "mllm_demo,identity",
}
PIXELS = {"image_max_pixels": 4096, "video_max_pixels": 1024}
NPU = {
    **FULL,
    **RESUME,
    **OLD,
    "max_steps": 5,
    "num_train_epochs": None,
    "flash_attn": "fa2",
    "use_v1_kernels": True,
    "template": "qwen3",
}
SEEDED = {"seed": 7, "max_samples": None, "disable_gradient_checkpointing": False}
MEGATRON = {
    **_without(
        "dataloader_num_workers",
        "ddp_timeout",
        "max_samples",
        "overwrite_output_dir",
        "plot_loss",
        "report_to",
        "save_only_model",
        "trust_remote_code",
        "warmup_ratio",
    ),
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "use_distributed_optimizer": True,
}
V1 = {
    "model": "owner/model",
    "model_class": "llm",
    "template": "qwen3_nothink",
    "dist_config": {"name": "fsdp2", "dcp_path": None},
    "train_dataset": "data/rows.yaml",
    "micro_batch_size": 1,
    "cutoff_len": 512,
    "max_steps": 5,
    "learning_rate": 1e-4,
    "output_dir": "saves/model",
}
SAMPLED = {"kernel_config": {"name": "auto"}, "sample_backend": "hf", "max_new_tokens": 16}
BATCHES = {**SAMPLED, "quant_config": "none", "batching_strategy": "normal"}
PACKED = {**BATCHES, "batching_strategy": "padding_free", "flash_attn": "flash_attention2"}
MERGE = {
    "model_name_or_path": "owner/model",
    "template": "qwen3_nothink",
    "trust_remote_code": True,
    "export_dir": "saves/merged",
    "export_size": 2,
    "export_device": "cpu",
    "export_legacy_format": False,
}

_TRAINING: dict[str, dict[str, Any]] = {
    "train_full/qwen3_full_sft.yaml": {
        **FULL,
        **RESUME,
        **QWEN,
        "deepspeed": "examples/deepspeed/ds_z3_config.json",
    },
    "train_full/qwen3vl_full_sft.yaml": {
        **FULL,
        **RESUME,
        **VISION,
        **PIXELS,
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "freeze_language_model": False,
        "deepspeed": "examples/deepspeed/ds_z3_config.json",
    },
    "train_lora/qwen3_lora_sft.yaml": {**LORA, **RESUME, **QWEN},
    "train_lora/qwen3_lora_sft_ds3.yaml": {
        **LORA,
        **RESUME,
        **QWEN,
        "deepspeed": "examples/deepspeed/ds_z3_config.json",
    },
    "train_lora/qwen3_lora_sft_ray.yaml": {
        **LORA,
        **RESUME,
        **QWEN,
        "dataset_dir": "REMOTE:owner/data",
        "ray_num_workers": 2,
    },
    "train_lora/qwen3_lora_pretrain.yaml": {
        **LORA,
        **RESUME,
        "stage": "pt",
        "dataset": "c4_demo",
        "template": None,
    },
    "train_lora/qwen3_lora_reward.yaml": {
        **LORA,
        **RESUME,
        **QWEN,
        "stage": "rm",
        "dataset": "dpo_en_demo",
    },
    "train_lora/qwen3_lora_dpo.yaml": {
        **LORA,
        **RESUME,
        **QWEN,
        "stage": "dpo",
        "dataset": "dpo_en_demo",
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
    },
    "train_lora/qwen3_lora_kto.yaml": {
        **LORA,
        **QWEN,
        "stage": "kto",
        "dataset": "kto_en_demo",
        "save_only_model": None,
        "pref_beta": 0.1,
    },
    "train_lora/qwen3_preprocess.yaml": {
        **LORA,
        **QWEN,
        **_without(*STEPS, "dataloader_num_workers", "ddp_timeout", "bf16", "report_to"),
        "tokenized_path": "saves/tokens",
    },
    "train_lora/qwen3vl_lora_sft.yaml": {**LORA, **RESUME, **VISION, **PIXELS},
    "train_lora/qwen3vl_lora_dpo.yaml": {
        **LORA,
        **RESUME,
        **VISION,
        **PIXELS,
        "stage": "dpo",
        "dataset": "rlhf_v",
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
    },
    "train_qlora/llama3_lora_sft_aqlm.yaml": LORA,
    "train_qlora/llama3_lora_sft_awq.yaml": LORA,
    "train_qlora/llama3_lora_sft_gptq.yaml": LORA,
    "train_qlora/qwen3_lora_sft_bnb_npu.yaml": {
        **LORA,
        **QWEN,
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "double_quantization": False,
    },
    "train_qlora/qwen3_lora_sft_otfq.yaml": {
        **LORA,
        **QWEN,
        "quantization_bit": 4,
        "quantization_method": "bnb",
    },
    "extras/adam_mini/qwen2_full_sft.yaml": {
        **FULL,
        **OLD,
        "template": "qwen",
        "use_adam_mini": True,
    },
    "extras/apollo/llama3_full_sft.yaml": {
        **FULL,
        **OLD,
        "use_apollo": True,
        "apollo_layerwise": True,
        "apollo_target": "all",
        "apollo_rank": 8,
        "apollo_scale": 2.0,
        "apollo_scale_type": "channel",
        "bf16": None,
        "pure_bf16": True,
    },
    "extras/asft/llama2_full_asft.yaml": {
        **FULL,
        **OLD,
        "template": "llama2",
        "dataset": "med",
        "deepspeed": "examples/deepspeed/ds_z0_config.json",
        "use_asft_loss": True,
        "asft_alpha": 0.1,
    },
    "extras/asft/qwen2_full_asft.yaml": {
        **FULL,
        **OLD,
        "template": "qwen",
        "dataset": "math",
        "deepspeed": "examples/deepspeed/ds_z0_config.json",
        "use_asft_loss": True,
        "asft_alpha": 0.1,
    },
    "extras/badam/llama3_full_sft.yaml": {
        **FULL,
        **OLD,
        "use_badam": True,
        "badam_mode": "layer",
        "badam_switch_mode": "ascending",
        "badam_switch_interval": 10,
        "badam_verbose": 1,
        **_without("bf16", "ddp_timeout"),
    },
    "extras/dft/qwen2_full_sft.yaml": {**FULL, **OLD, "template": "qwen", "use_dft_loss": True},
    "extras/eaft/qwen25_05b_eaft_full.yaml": {
        **FULL,
        **OLD,
        "template": "qwen",
        "use_eaft_loss": True,
    },
    "extras/fp8/llama3_fp8_deepspeed_sft.yaml": {
        **FULL,
        **OLD,
        **_without("dataloader_num_workers", "ddp_timeout", "save_only_model"),
        "fp8": True,
        "fp8_backend": "torchao",
        "fp8_enable_fsdp_float8_all_gather": False,
        "deepspeed": "examples/deepspeed/ds_z3_fp8_config.json",
        "report_to": "wandb",
        "run_name": "run",
    },
    "extras/fp8/llama3_fp8_fsdp_sft.yaml": {
        **FULL,
        **OLD,
        **_without("dataloader_num_workers", "ddp_timeout", "save_only_model"),
        "fp8": True,
        "fp8_backend": "torchao",
        "fp8_enable_fsdp_float8_all_gather": True,
        "fsdp": ["full_shard", "auto_wrap"],
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "report_to": "wandb",
        "run_name": "run",
    },
    "extras/fsdp_qlora/llama3_lora_sft.yaml": {**LORA, **OLD, "quantization_bit": 4},
    "extras/galore/llama3_full_sft.yaml": {
        **FULL,
        **OLD,
        "use_galore": True,
        "galore_layerwise": True,
        "galore_target": "all",
        "galore_rank": 8,
        "galore_scale": 1.0,
        "bf16": None,
        "pure_bf16": True,
    },
    "extras/llama_pro/llama3_freeze_sft.yaml": {
        **OLD,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 8,
        "freeze_trainable_modules": "all",
        "use_llama_pro": True,
    },
    "extras/loraplus/llama3_lora_sft.yaml": {**LORA, **OLD, "loraplus_lr_ratio": 8.0},
    "extras/mod/llama3_full_sft.yaml": {
        **FULL,
        **OLD,
        "mixture_of_depths": "convert",
        "optim": "paged_adamw_8bit",
        "bf16": None,
        "pure_bf16": True,
    },
    "extras/muon/qwen2_full_sft.yaml": {**FULL, **OLD, "template": "qwen", "use_muon": True},
    "extras/nlg_eval/llama3_lora_predict.yaml": {
        **OLD,
        "adapter_name_or_path": "saves/adapter",
        "do_train": None,
        "do_predict": True,
        "dataset": None,
        "eval_dataset": "identity,alpaca_en_demo",
        "per_device_eval_batch_size": 1,
        "predict_with_generate": True,
        **_without(*STEPS, "bf16"),
    },
    "extras/oft/llama3_oft_sft.yaml": OFT,
    "extras/oft/qwen2_5vl_oft_sft.yaml": {**OFT, **VISION, **PIXELS},
    "extras/pissa/llama3_lora_sft.yaml": {
        **LORA,
        **OLD,
        "pissa_init": True,
        "pissa_iter": 4,
        "pissa_convert": True,
    },
    "extras/qoft/llama3_oft_sft_awq.yaml": QOFT,
    "extras/qoft/llama3_oft_sft_bnb_npu.yaml": {
        **QOFT,
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "double_quantization": False,
    },
    "extras/qoft/llama3_oft_sft_gptq.yaml": QOFT,
    "ascend/qwen3_5_full_sft_fsdp2.yaml": NPU,
    "ascend/qwen3_full_sft_fsdp2.yaml": NPU,
    "ascend/qwen3moe_full_sft_fsdp.yaml": {**NPU, **SEEDED},
    "ascend/qwen3vlmoe_full_sft_fsdp2.yaml": {**NPU, **SEEDED, **VISION, **PIXELS},
    "ascend/qwen3vlmoe_lora_sft_fsdp.yaml": {
        **LORA,
        **RESUME,
        **OLD,
        **SEEDED,
        **VISION,
        **PIXELS,
        "flash_attn": "disabled",
        "use_v1_kernels": True,
        "num_train_epochs": None,
        "save_steps": None,
    },
    "ktransformers/train_lora/deepseek_v2_lora_sft_kt.yaml": {
        **LORA,
        **OLD,
        **RESUME,
        "use_kt": True,
    },
    "ktransformers/train_lora/deepseek_v3_lora_sft_kt.yaml": {
        **LORA,
        **OLD,
        **RESUME,
        "use_kt": True,
    },
    "ktransformers/train_lora/qwen3_5moe_lora_sft_kt.yaml": {
        **LORA,
        **OLD,
        **RESUME,
        "use_kt": True,
    },
    "ktransformers/train_lora/qwen3moe_lora_sft_kt.yaml": {**LORA, **OLD, **RESUME, "use_kt": True},
    "megatron/qwen2_vl_full.yaml": {**FULL, **VISION, **PIXELS, **MEGATRON},
    "megatron/qwen3_moe_full.yaml": {
        **FULL,
        **MEGATRON,
        "template": "qwen3_nothink",
        "expert_model_parallel_size": 2,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "recompute_granularity": "full",
    },
}
_V1: dict[str, dict[str, Any]] = {
    "v1/train_batching_strategy/train_full_fsdp2_batching_normal.yaml": BATCHES,
    "v1/train_batching_strategy/train_full_fsdp2_dynamic_batching.yaml": BATCHES,
    "v1/train_batching_strategy/train_full_fsdp2_dynamic_padding_free.yaml": PACKED,
    "v1/train_batching_strategy/train_full_fsdp2_padding_free.yaml": PACKED,
    "v1/train_freeze/train_freeze_sft.yaml": {
        **SAMPLED,
        "peft_config": {"name": "freeze"},
        "global_batch_size": 4,
    },
    "v1/train_full/train_full_deepspeed.yaml": {"kernel_config": {"name": "auto"}},
    "v1/train_full/train_full_fsdp2.yaml": {**SAMPLED, "quant_config": "none"},
    "v1/train_full/train_full_liger_kernel.yaml": {**SAMPLED, "quant_config": "none"},
    "v1/train_full/train_full_ulysses_cp.yaml": {"trust_remote_code": True, "bf16": False},
    "v1/train_lora/export_lora.yaml": {
        "peft_config": {"name": "lora", "export_dir": "merged"},
        **_without(*(key for key in V1 if key != "model")),
    },
    "v1/train_lora/train_lora_sft.yaml": {**SAMPLED, "peft_config": {"name": "lora"}},
    "v1/train_lora/train_lora_sft_rank0.yaml": {
        **SAMPLED,
        "peft_config": {"name": "lora"},
        "init_config": {"name": "init_on_rank0"},
        "bf16": True,
    },
    "v1/train_qlora/quantization.yaml": {
        **SAMPLED,
        "peft_config": {"name": "lora"},
        "quant_config": {"name": "bnb"},
    },
}
_EXPORTS: dict[str, dict[str, Any]] = {
    "merge_lora/qwen3_full_sft.yaml": {},
    "merge_lora/qwen3_gptq.yaml": {
        "export_quantization_bit": 4,
        "export_quantization_dataset": "data/rows.json",
    },
    "merge_lora/qwen3_lora_sft.yaml": {"adapter_name_or_path": "saves/adapter"},
    "merge_lora/qwen3vl_lora_sft.yaml": {
        "model_name_or_path": "owner/model-vl",
        "adapter_name_or_path": "saves/adapter",
        "template": "qwen3_vl_nothink",
    },
}
_OTHERS = ("accelerate", "inference", "multi_tokens", "megatron_bridge")
"""Folders of files that are for accelerate, for chatting, a list of tokens, or a later version."""


def find_checkout() -> Path | None:
    """Returns LLaMA-Factory's own `examples` folder, if the environment names one."""
    folder = os.environ.get("LLAMAFACTORY_EXAMPLES")
    return Path(folder) if folder else None


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the names and keys of the examples: ours, or LLaMA-Factory's own."""
    checkout = find_checkout()
    if checkout is None:
        yield from _ours()
        return
    for path in sorted(checkout.rglob("*.yaml")):
        if not set(_OTHERS) & set(path.parts):
            yield str(path.relative_to(checkout)), yaml.safe_load(path.read_text("utf-8"))


def _ours() -> Iterator[tuple[str, dict[str, Any]]]:
    for base, cases in ((TRAIN, _TRAINING), (V1, _V1), (MERGE, _EXPORTS)):
        for name, changes in sorted(cases.items()):
            values = {**base, **changes}
            yield name, {k: v for k, v in values.items() if v is not None or k in RESUME}
