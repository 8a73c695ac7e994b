"""A tiny random configuration of any causal language model family of the installed transformers."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 320
POSITIONS = 256
EOS = 2

# Sizes by the names that families give them; a name counts only where the family's own configuration has it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("dim", "dim_model", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("feed_forward_size", "decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "kv_channels", "dim_head", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts_total"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts", "moe_top_k"), 2
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "expert_dim"), 32),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts", "moe_layer_freq"), 1
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "o_lora_rank", "index_head_dim"), 8),
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "index_n_heads": 2,
    "index_topk": 512,  # of fewer tokens it takes all: random indexers hold ties
    "sliding_window": 8,
    "attention_chunk_size": 64,
    "local_attention": 8,
    **dict.fromkeys(("mamba_d_ssm", "lru_width", "d_inner"), 32),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_headdim", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "attention_window": 8,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "decoder_start_token_id": 1,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "initializer_factor": 1.0,
}


LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # one kind a layer

# What a few families need besides, or otherwise.
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_expand": 1},
    "falcon_h1": {"mamba_expand": 1},
    "mamba2": {"expand": 1, "num_heads": 4, "head_dim": 8},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        **{"mamba_expand": 1, "num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_expand": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {
        **{"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
        **{"attention_head_size": 8, "feed_forward_size": 64},
    },
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": None},
    "xmod": {"default_language": "en_XX"},
}


def tiny_settings(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments for `config_class`, and for the configurations inside it."""
    default = config_class()
    known = {**default.to_dict(), **dict.fromkeys(default.attribute_map)}
    own = {name: value for name, value in SIZES.items() if name in known}
    own = {name: value for name, value in own.items() if name not in default.attribute_map}
    lists = {name: list(dict.fromkeys(known[name])) for name in LAYER_LISTS if isinstance(known.get(name), list)}
    depth = max([2, *map(len, lists.values())])
    own |= {name: (kinds * depth)[:depth] for name, kinds in lists.items()}
    own |= {name: depth for name in ("num_hidden_layers", "n_layer", "num_layers") if name in own}
    if "qk_rope_head_dim" in known:  # multi-head latent attention: as many keys as queries, with widths of their own
        own |= {name: 4 for name in ("num_key_value_heads",) if name in own}
        own.pop("head_dim", None)
    own |= {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            own[name] = tiny_settings(type(inner))
    return own | EXTRA.get(default.model_type, {})


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Random causal language model of a model_type, float32, with weights large enough that everything in it matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**tiny_settings(CONFIG_MAPPING[family])))
    for parameter in model.float().parameters():
        if parameter.dim() > 1 and 0 < parameter.std() < 0.05:
            parameter.data.mul_(0.1 / parameter.std())
    head = model.get_output_embeddings()
    if head is not None:  # uneven probabilities, EOS likely at some positions: replies of many lengths
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            spread = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.std()
        head.weight.data *= 3 / spread
        head.weight.data[EOS] *= 4
    return model.requires_grad_(False).eval()
