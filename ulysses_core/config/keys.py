"""LLaMA-Factory's keys that are not settings here: what each means, or why it is refused.

A key that is served is a field of a section of the config, and in no list of this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ulysses_core.config.export import ExportConfig
from ulysses_core.config.schema import RunConfig
from ulysses_monitor.common.errors import InputError

__all__ = ["REFUSED", "WITHOUT_EFFECT", "AcceptedKeys", "explain_accepted", "refuse_key"]


class AcceptedKeys(BaseModel):
    """Keys that change nothing here. The docstring of each says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    plot_loss: bool = False
    """the report always has the plot"""
    preprocessing_num_workers: int | None = None
    """not used: the tokenizer has threads of its own"""
    reserved_label_len: int | None = None
    """not used: answers are cut by cutoff_len alone"""
    use_fast_tokenizer: bool = True
    """the tokenizer is the one that transformers chooses, a fast one where there is one"""
    low_cpu_mem_usage: bool = True
    """always on: transformers loads weights one at a time"""
    use_reentrant_gc: bool = True
    """gradient_checkpointing_kwargs says how to recompute; the gradients are the same"""
    disable_gradient_checkpointing: bool = False
    """gradient checkpointing is off unless gradient_checkpointing is true"""
    upcast_lmhead_output: bool = False
    """always on: the loss is computed in float32"""
    print_param_status: bool = False
    """not printed: the metrics param/* and grad/* show every parameter that is trained"""
    include_effective_tokens_per_second: bool = False
    """always on: train/tokens_per_second is recorded"""
    use_v1_kernels: bool | str | None = False
    """kernels of NPUs are not used; the results are the same"""
    infer_backend: Literal["huggingface", "vllm", "sglang", "ktransformers"] = "huggingface"
    """for chatting with a model, which training does not do"""
    offload_folder: str = "offload"
    """for chatting with a model, which training does not do"""
    use_kv_cache: bool = True
    """for chatting with a model, which training does not do"""
    vllm_maxlen: int = 4096
    """for vLLM, which is not used"""
    vllm_gpu_util: float = 0.7
    """for vLLM, which is not used"""
    vllm_enforce_eager: bool = False
    """for vLLM, which is not used"""
    vllm_max_lora_rank: int = 32
    """for vLLM, which is not used"""
    vllm_config: dict[str, Any] | str | None = None
    """for vLLM, which is not used"""
    sglang_maxlen: int = 4096
    """for SGLang, which is not used"""
    sglang_mem_fraction: float = 0.7
    """for SGLang, which is not used"""
    sglang_tp_size: int = -1
    """for SGLang, which is not used"""
    sglang_config: dict[str, Any] | str | None = None
    """for SGLang, which is not used"""
    sglang_lora_backend: Literal["triton", "flashinfer"] = "triton"
    """for SGLang, which is not used"""
    ray_num_workers: int = 1
    """Ray is not used; --nproc sets the number of processes, torchrun starts several nodes"""
    ray_init_kwargs: dict[str, Any] | str | None = None
    """Ray is not used; --nproc sets the number of processes, torchrun starts several nodes"""
    master_addr: str | None = None
    """for Ray, which is not used; torchrun has --rdzv-endpoint"""
    master_port: int | str | None = None
    """for Ray, which is not used; torchrun has --rdzv-endpoint"""
    eval_num_beams: int | None = None
    """how answers are decoded, which the held-out loss does not need"""
    do_sample: bool = True
    """how answers are decoded, which this stage does not do"""
    temperature: float = 0.95
    """how answers are decoded, which this stage does not do"""
    top_p: float = 0.7
    """how answers are decoded, which this stage does not do"""
    top_k: int = 50
    """how answers are decoded, which this stage does not do"""
    num_beams: int = 1
    """how answers are decoded, which this stage does not do"""
    max_length: int = 1024
    """how answers are decoded, which this stage does not do"""
    repetition_penalty: float = 1.0
    """how answers are decoded, which this stage does not do"""
    length_penalty: float = 1.0
    """how answers are decoded, which this stage does not do"""
    skip_special_tokens: bool = True
    """how answers are decoded, which this stage does not do"""


def explain_accepted(config: RunConfig) -> dict[str, str]:
    """Returns what each key of a config means that changes nothing."""
    meanings = {name: str(field.description) for name, field in AcceptedKeys.model_fields.items()}
    meanings |= dict.fromkeys(ExportConfig.model_fields, "for ulysses export")
    served = type(config.stage_keys).model_fields
    return {key: meanings[key] for key in config.raw if key in meanings and key not in served}


def _spread(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REFUSED: Mapping[str, str] = {
    "use_galore": "transformers has GaLore: set optim: galore_adamw and optim_target_modules",
    "use_apollo": "transformers has APOLLO: set optim: apollo_adamw and optim_target_modules",
    "use_badam": "BAdam's optimizer changes which parameters are trained, which DDP and ZeRO do "
    "not follow; use finetuning_type: freeze or lora",
    "use_adam_mini": "Adam-mini's optimizer cuts parameters by head, which ZeRO's shards do not "
    "keep; use optim: adafactor or adamw_torch_8bit to save memory",
    "use_muon": "Muon's step needs whole matrices, which ZeRO and FSDP2 cut; use optim: "
    "adamw_torch",
    "use_asft_loss": "ASFT's divergence needs the whole distribution of each token, and full "
    "logits never exist here; use_dft_loss needs none",
    "use_eaft_loss": "EAFT's weight needs the largest logits of each token, and full logits "
    "never exist here; use_dft_loss needs none",
    "use_unsloth": "Unsloth replaces the model's forward pass, in which sequence parallelism and "
    "the monitor work; loss_chunk, mlp_chunk and offload_checkpoints save memory",
    "use_unsloth_gc": "set gradient_checkpointing and offload_checkpoints, which do the same",
    "use_kt": "KTransformers needs its own builds of transformers and accelerate; remove it",
    "enable_liger_kernel": "Liger replaces layers and loss of the model, on GPUs; loss_chunk and "
    "mlp_chunk save that memory, and use_liger_kernel is transformers' own key",
    "shift_attn": "shifted short attention changes what a token sees; sequence_parallel_size makes "
    "full attention fit",
    "mixture_of_depths": "it makes another model, with the package mixture-of-depth; convert the "
    "model beforehand",
    "moe_aux_loss_coef": "the routers' loss needs their logits of whole rows, which are not "
    "gathered; set router_aux_loss_coef in model_config for one process",
    "rope_scaling": "set rope_scaling in the model's config.json, or in model_config",
    "upcast_layernorm": "all parameters have one dtype; leave bf16 out to train in float32",
    "compute_accuracy": "evaluation keeps no logits; it records the held-out loss, so remove it",
    "pref_bco_weight": "TRL's DPO loss has no BCO term; remove it",
    "fp8": "it needs torchao and a GPU of Hopper or newer, on which this project was not tried; "
    "use bf16",
    "fsdp_transformer_layer_cls_to_wrap": "write transformer_layer_cls_to_wrap into fsdp_config",
    "use_swanlab": "set report_to: swanlab, which transformers serves, or a sink of the monitor",
    "enable_torch_profiler": "torch's profiler does not run here; the monitor records the "
    "times of a step, so remove it",
    "profile_modules": "torch's profiler does not run here; the monitor records the times of a "
    "step, so remove it",
    "use_hyper_parallel": "HyperParallel is another training engine; set sequence_parallel_size, "
    "deepspeed or fsdp",
    "export_quantization_bit": "quantising to GPTQ needs a GPU and gptqmodel; export without it, "
    "and quantise the folder",
    "export_hub_model_id": "nothing leaves this machine; upload the exported folder yourself",
    **_spread(
        "models come from a folder or Hugging Face's hub, so remove it", "ms_hub_token om_hub_token"
    ),
    **_spread(
        "a key of Megatron, which is another training engine; set sequence_parallel_size, "
        "deepspeed or fsdp",
        "use_mca tensor_model_parallel_size pipeline_model_parallel_size "
        "expert_model_parallel_size sequence_parallel",
    ),
    **_spread(
        "a key of LLaMA-Factory's v1 (USE_V1=1), whose files have another form; write "
        "model_name_or_path, finetuning_type, dataset and TrainingArguments' names",
        "model model_class peft_config kernel_config quant_config dist_config init_config "
        "train_dataset micro_batch_size global_batch_size batching_strategy sample_backend",
    ),
    **_spread(
        "the vocabulary is the tokenizer's; add the tokens and resize the model beforehand",
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config split_special_tokens",
    ),
    **_spread(
        "images, video and audio are not trained on; use a text model",
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate media_dir freeze_vision_tower freeze_multi_modal_projector "
        "freeze_language_model",
    ),
    "reward_model_adapters": "merge them into the reward model with ulysses export, and name its "
    "folder",
    "reward_model_quantization_bit": "the reward model is loaded as it is stored, so remove it",
}
"""Why a key is refused, unless its value switches it off."""

_DETAILS = {
    "use_galore": "galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
    "galore_layerwise",
    "use_apollo": "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
    "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front",
    "use_badam": "badam_mode badam_start_block badam_switch_mode badam_switch_interval "
    "badam_update_ratio badam_mask_mode badam_verbose",
    "use_asft_loss": "asft_alpha",
    "use_eaft_loss": "eaft_alpha",
    "use_kt": "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
    "kt_lora_expert_intermediate_size",
    "fp8": "fp8_backend fp8_enable_fsdp_float8_all_gather",
    "use_swanlab": "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
    "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
    "enable_torch_profiler": "profiler_output_dir profiler_wait_steps profiler_warmup_steps "
    "profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory "
    "profiler_with_stack",
    "use_hyper_parallel": "hyper_parallel_args",
    "add_special_tokens": "init_special_tokens",
    "export_quantization_bit": "export_quantization_dataset export_quantization_nsamples "
    "export_quantization_maxlen",
    "use_mca": "bias_activation_fusion apply_rope_fusion use_distributed_optimizer "
    "overlap_param_gather overlap_grad_reduce moe_grouped_gemm moe_token_dispatcher_type "
    "recompute_granularity",
}

WITHOUT_EFFECT: Mapping[str, str] = {
    key: switch for switch, names in _DETAILS.items() for key in names.split()
}
"""Keys that mean something only with another one, which is refused."""


def refuse_key(key: str, value: Any, where: str) -> None:
    """Refuses a key for its reason; values that switch it off pass.

    Raises:
        InputError: the key is set.
    """
    if value is None or value is False:
        return
    shown = "set" if isinstance(value, dict | list) else repr(value)
    raise InputError(f"{where}: {key} is {shown}; {REFUSED[key]}")
