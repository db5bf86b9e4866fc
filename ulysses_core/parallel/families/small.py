"""Small models of a family: its own config, with few layers, narrow, and short windows.

A family is a `model_type` of transformers. An option is a setting of its config that changes what
the model computes: a switch, a feature that may be absent, a kind of RoPE, a kind of layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

__all__ = [
    "ROPES",
    "VOCABULARY",
    "field_defaults",
    "keep_options",
    "list_options",
    "name_options",
    "small_config",
]

VOCABULARY = 61
POSITIONS = 64

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), POSITIONS),
    **dict.fromkeys(("max_seq_len", "context_length", "max_target_positions"), POSITIONS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "lru_width", "dim_model_base"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim", "dim_head", "qk_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("attention_head_size", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "indexer_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "d_inner"), 48),
    **dict.fromkeys(("prefix_dense_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size",), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("topk_group", "num_nextn_predict_layers", "num_mtp_layers"), 1),
    "n_group": 2,
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "local_attention", "sliding_window_size"), 6),
    **dict.fromkeys(("attention_chunk_size", "window_size", "attention_window_size"), 6),
    **dict.fromkeys(("keep_window_size", "index_topk", "local_attention_window_len"), 6),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "max_window_layers"), 2),
    **dict.fromkeys(("global_attn_every_n_layers", "sliding_window_pattern"), 2),
    **dict.fromkeys(("no_rope_layer_interval", "attn_layer_period", "mamba_n_groups"), 2),
    **dict.fromkeys(("attn_layer_offset", "num_kv_shared_layers"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "n_groups"), 2),
    **dict.fromkeys(("mamba_d_ssm", "mamba_num_heads"), 32),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    # Not what the classes have, which is 1 and hides a factor.
    "attention_multiplier": 0.7,
    "query_pre_attn_scalar": 5,
    "logit_scale": 0.5,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "original_max_position_embeddings": 16,
    "floor_scale": 8,
    "log_scaling_n_floor": 8,
    "block_multiple_of": 8,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "sep_token_id": 1,
    "cls_token_id": 1,
    "is_decoder": True,
}
"""Settings by which every family becomes small; a family takes those that its config has."""

_ZEROED = ("dropout", "pdrop", "layerdrop", "jitter_noise", "dropout_prob", "dropout_p")
"""Endings of settings that draw random numbers."""

_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "rwkv": {"attention_hidden_size": 32},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "mpt": {"max_seq_len": POSITIONS},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "mamba": {"time_step_rank": 4},
    "falcon_mamba": {"time_step_rank": 4},
    "jamba": {"mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "phimoe": {"sliding_window": None},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
}
"""What a family needs besides."""

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16},
}
"""Kinds of RoPE besides the default, and their settings."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "sliding_window": (6, None),
    "attn_logit_softcapping": (0.5, None),
    "final_logit_softcapping": (1.0, None),
    "clip_qkv": (0.1, None),
    "q_lora_rank": (16, None),
    "position_embedding_type": ("rope", "nope"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
    "use_bidirectional_attention": (True,),
}
"""Values of settings that may be absent, or name one of several ways."""

_LAYER_KINDS = ("sliding_attention", "chunked_attention", "linear_attention", "conv")

# fmt: off
_NO_OPTIONS = frozenset((
    "use_cache", "return_dict", "is_encoder_decoder", "output_hidden_states",
    "output_attentions", "is_decoder", "output_router_logits", "add_cross_attention",
    "rescale_prenorm_residual", "summary_use_proj", "summary_proj_to_labels",
    "classifier_bias", "mtp_hidden_states_first", "chain_hidden_post_norm", "use_mambapy",
    "use_mamba_kernels", "use_associative_scan", "reorder_and_upcast_attn",
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "enable_moe_fp32_combine",
    "residual_in_fp32",
))
# fmt: on
"""Switches that change nothing in the training of a causal language model, or its precision."""


def field_defaults(kind: type[Any]) -> dict[str, Any]:
    """Returns the settings of a config class and their defaults."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
        if not field.name.startswith("_")
    }


def small_config(kind: type[Any], option: tuple[str, Any] | None = None, **entries: Any) -> Any:
    """Makes a small config of a family, with one option.

    Args:
        kind: the config class.
        option: name and value of a setting.
        **entries: settings of a user's own config, see `keep_options`.

    Raises:
        Exception: the class refuses the combination, each in its own way.
    """
    defaults = field_defaults(kind)
    values = {name: size for name, size in _SIZES.items() if name in defaults}
    values |= {name: 0.0 for name in defaults if name.endswith(_ZEROED)}
    if "qk_rope_head_dim" in defaults:  # latent attention: the widths follow, all heads have keys
        values = {k: v for k, v in values.items() if k not in ("head_dim", "qk_head_dim")}
        values["num_key_value_heads"] = 4
    values["experts_implementation"] = "eager"  # the others have no float64
    values |= _FAMILIES.get(kind.model_type, {}) | entries
    base = kind(**values)
    layers = getattr(base, "layer_types", None)
    if layers and "layer_types" in defaults and "full_attention" not in layers:
        # The default has it in a deeper layer.
        values["layer_types"] = [layers[0], "full_attention"] * 2
    if option is None:
        return kind(**values)
    return kind(**values | option_value(*option, kind(**values)))


def option_value(name: str, value: Any, base: Any) -> dict[str, Any]:
    """Returns the settings that switch an option on in a small config `base`."""
    if name == "layer_types":
        return {"layer_types": [value, "full_attention"] * 2}
    if name not in ("rope_type", "partial_rotary_factor"):
        return {name: value}
    if name == "partial_rotary_factor":
        rope = {"rope_type": "default", "rope_theta": 10000.0, name: value}
    else:
        rope = {"rope_type": value, "rope_theta": 10000.0, **ROPES[value]}
        if value == "longrope":
            pairs = _count_rotated(base) // 2
            rope |= {"short_factor": [1.5] * pairs, "long_factor": [3.0] * pairs}
    before = base.rope_parameters or {}
    if "full_attention" in before:  # each kind of layer has its own
        return {"rope_parameters": before | {"full_attention": rope}}
    # A dynamic RoPE changes in rows that are longer than the model.
    return {"rope_parameters": rope} | (
        {"max_position_embeddings": 16} if value == "dynamic" else {}
    )


def _count_rotated(config: Any) -> int:
    """Returns the width of the part of a head that is rotated."""
    if hasattr(config, "qk_rope_head_dim"):
        return int(config.qk_rope_head_dim)
    entries = config.to_dict()  # head_dim is not readable where layers differ in it
    width = entries.get("head_dim") or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return int(width * rope.get("partial_rotary_factor", 1.0))


def list_options(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yields every option of a family that its small config does not have, as name and value."""
    base = small_config(kind)
    defaults = field_defaults(kind)
    for name, default in sorted(defaults.items()):
        if isinstance(default, bool) and name not in _NO_OPTIONS:
            yield name, not default
        elif name in _CHOICES and not isinstance(default, bool):
            yield from ((name, v) for v in _CHOICES[name] if v != getattr(base, name, None))
    if "rope_parameters" in defaults:
        yield from (("rope_type", rope) for rope in ROPES)
        yield "partial_rotary_factor", 0.5
    if "layer_types" in defaults:
        kinds = base.layer_types or ("full_attention",)
        yield from (("layer_types", layer) for layer in _LAYER_KINDS if layer not in kinds)


def keep_options(config: Any) -> dict[str, Any]:
    """Returns the settings of a user's config that are options, with values for a small model."""
    kept = {
        name: getattr(config, name, None)
        for name, default in field_defaults(type(config)).items()
        if isinstance(default, bool) and name not in _NO_OPTIONS
    }
    for name in _CHOICES.keys() & field_defaults(type(config)).keys():
        value = getattr(config, name, None)
        is_size = isinstance(value, int | float) and not isinstance(value, bool)
        kept[name] = _CHOICES[name][0] if is_size else value
    layers = list(getattr(config, "layer_types", None) or ())
    if layers and "layer_types" in field_defaults(type(config)):
        kinds = list(dict.fromkeys(layers))
        kept["layer_types"] = (kinds * 4)[:4]
    return kept


def name_options(config: Any) -> set[str]:
    """Returns the settings of a config that count as options, as `name=value`.

    A number that may be absent is named without its value.
    """
    names = set()
    for name, default in field_defaults(type(config)).items():
        if name in _NO_OPTIONS or not (isinstance(default, bool) or name in _CHOICES):
            continue
        value = getattr(config, name, None)
        if isinstance(default, bool) or value is None or value is True:
            names.add(f"{name}={value}")
        else:
            names.add(f"{name}={value}" if isinstance(value, str) else name)
    names |= {f"layer_types={layer}" for layer in getattr(config, "layer_types", None) or ()}
    return names | _name_ropes(getattr(config, "rope_parameters", None) or {})


def _name_ropes(rope: dict[str, Any]) -> set[str]:
    """Names the kinds of RoPE of all kinds of layers."""
    ropes = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    names = {f"rope_type={each.get('rope_type', 'default')}" for each in ropes}
    partial = {each.get("partial_rotary_factor", 1.0) for each in ropes} - {1.0}
    return names | ({"partial_rotary_factor"} if partial else set())
