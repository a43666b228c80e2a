"""Tiny configs of text models that transformers offers, by model type, and what their mixtures of experts hold."""

from __future__ import annotations

from typing import Any

V, H = 96, 64
BASE = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def tiny(leave: str = "", **more: Any) -> dict[str, Any]:
    """The common fields but those named in ``leave``, and more."""
    return {key: value for key, value in BASE.items() if key not in leave.split()} | more


MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_4 = {
    **SLIDING, "global_head_dim": 16, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
}  # fmt: skip
ALONE = "intermediate_size num_key_value_heads head_dim max_position_embeddings"

TINY: dict[str, dict[str, Any]] = {
    "llama": tiny(),
    "apertus": tiny("head_dim"),
    "arcee": tiny(),
    "bamba": tiny("head_dim", attn_layer_indices=[1], **MAMBA),
    "bloom": {"vocab_size": V, "hidden_size": H, "n_layer": 2, "n_head": 4},
    "cohere": tiny("head_dim"),
    "cohere2": tiny(**SLIDING),
    "cwm": tiny(**SLIDING),
    "diffllama": tiny(),
    "exaone4": tiny("head_dim", **SLIDING),
    "falcon": tiny(ALONE, multi_query=True, parallel_attn=True, bias=False, alibi=False),
    "falcon_h1": tiny(mamba_d_ssm=128, **MAMBA),
    "falcon_mamba": {"vocab_size": V, "hidden_size": H, "state_size": 8, "num_hidden_layers": 2},
    "gemma": tiny(),
    "gemma2": tiny(**SLIDING),
    "gemma3_text": tiny(**SLIDING),
    "gemma3n_text": tiny(
        vocab_size_per_layer_input=V, hidden_size_per_layer_input=16, num_kv_shared_layers=0, altup_num_inputs=2,
        laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0], **{**SLIDING, "intermediate_size": [96, 112]},
    ),
    "gemma4_text": tiny(**GEMMA_4),
    "glm": tiny(),
    "glm4": tiny(),
    "gpt2": {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": tiny("num_key_value_heads head_dim"),
    "granite": tiny("head_dim"),
    "helium": tiny(),
    "hunyuan_v1_dense": tiny(),
    "lfm2": tiny("head_dim", layer_types=["conv", "full_attention"]),
    "mamba": {"vocab_size": V, "hidden_size": H, "state_size": 8, "num_hidden_layers": 2},
    "mamba2": {
        "vocab_size": V, "hidden_size": H, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1,
        "num_hidden_layers": 2, "chunk_size": 32,
    },
    "ministral3": tiny(),
    "mistral": tiny(),
    "nanochat": tiny("head_dim"),
    "nemotron": tiny(),
    "olmo": tiny("head_dim"),
    "olmo2": tiny("head_dim"),
    "olmo3": tiny("head_dim", **SLIDING),
    "opt": {
        "vocab_size": V, "hidden_size": H, "ffn_dim": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": H,
    },
    "persimmon": tiny("num_key_value_heads head_dim"),
    "phi": tiny("num_key_value_heads head_dim"),
    "phi3": tiny("head_dim"),
    "qwen2": tiny("head_dim"),
    "qwen3": tiny(),
    "qwen3_5_text": tiny(**LINEAR),
    "recurrent_gemma": tiny("max_position_embeddings", num_hidden_layers=3, lru_width=H, attention_window_size=32),
    "rwkv": {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "context_length": 32},
    "seed_oss": tiny(),
    "smollm3": tiny("head_dim"),
    "stablelm": tiny("head_dim"),
    "starcoder2": tiny("head_dim"),
    "zamba2": tiny(
        "num_hidden_layers", num_hidden_layers=4, layers_block_type=["mamba", "mamba", "hybrid", "mamba"],
        num_mem_blocks=1, mamba_d_state=16, n_mamba_heads=4, mamba_ngroups=1, mamba_headdim=32,
        use_shared_mlp_adapter=True, use_shared_attention_adapter=False, adapter_rank=4, hybrid_layer_ids=[2],
    ),
}  # fmt: skip

# what a token is sent to: (blocks with experts, experts, of them chosen, inner width, matrices of an expert,
# inner width of shared experts and MLPs beside them)
SPARSE: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int, int]]] = {
    "afmoe": (tiny(**MOE, num_shared_experts=1, num_dense_layers=1, **SLIDING), (1, 8, 2, 24, 3, 24)),
    "aria_text": (tiny(moe_num_experts=4, moe_topk=3, moe_num_shared_experts=1), (2, 4, 3, 112, 3, 112)),
    "deepseek_v2": (tiny("head_dim", **ROUTED, **MLA), (1, 8, 2, 24, 3, 24)),
    "deepseek_v3": (tiny("head_dim", **ROUTED, **MLA), (1, 8, 2, 24, 3, 24)),
    "ernie4_5_moe": (
        tiny("head_dim", moe_num_experts=8, moe_k=3, moe_intermediate_size=24, moe_num_shared_experts=1,
             moe_layer_start_index=1, moe_layer_end_index=1),
        (1, 8, 3, 24, 3, 24),
    ),
    "flex_olmo": (tiny("head_dim", num_experts=4, num_experts_per_tok=3), (2, 4, 3, 112, 3, 0)),
    "gemma4_text": (
        tiny(**GEMMA_4, enable_moe_block=True, num_experts=8, top_k_experts=3, moe_intermediate_size=24),
        (2, 8, 3, 24, 3, 112),
    ),
    "glm4_moe": (tiny(**ROUTED, first_k_dense_replace=1, n_group=1, topk_group=1), (1, 8, 2, 24, 3, 24)),
    "gpt_oss": (tiny(**LOCAL, **SLIDING), (2, 8, 2, 112, 3, 0)),
    "granitemoe": (tiny("head_dim", **LOCAL), (2, 8, 2, 112, 3, 0)),
    "granitemoehybrid": (
        tiny("head_dim", **LOCAL, **MAMBA, shared_intermediate_size=40, layer_types=["mamba", "attention"]),
        (2, 8, 2, 112, 3, 40),
    ),
    "hunyuan_v1_moe": (tiny(num_experts=8, moe_topk=[3, 3]), (2, 8, 3, 112, 3, 112)),
    "jamba": (
        tiny("head_dim", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
             expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8),
        (1, 4, 2, 112, 3, 0),
    ),
    "lfm2_moe": (
        tiny("head_dim", **MOE, num_dense_layers=1, layer_types=["conv", "full_attention"]), (1, 8, 2, 24, 3, 0),
    ),
    "llama4_text": (
        tiny(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=112, interleave_moe_layer_step=1),
        (2, 4, 1, 112, 3, 112),
    ),
    "minimax": (tiny(**LOCAL, layer_types=["linear_attention", "full_attention"]), (2, 8, 2, 112, 3, 0)),
    "mixtral": (tiny(**LOCAL), (2, 8, 2, 112, 3, 0)),
    "nemotron_h": (
        tiny(
            **ROUTED, moe_shared_expert_intermediate_size=40, layers_block_type=["mamba", "moe", "attention", "moe"],
            mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=32,
        ),
        (2, 8, 2, 24, 2, 40),
    ),
    "olmoe": (tiny("head_dim", num_experts=8, num_experts_per_tok=2), (2, 8, 2, 112, 3, 0)),
    "phimoe": (tiny("head_dim", **LOCAL), (2, 8, 2, 112, 3, 0)),
    "qwen2_moe": (
        tiny("head_dim", **MOE, shared_expert_intermediate_size=40, mlp_only_layers=[1]), (1, 8, 2, 24, 3, 40),
    ),
    "qwen3_moe": (tiny(**MOE, decoder_sparse_step=2), (1, 8, 2, 24, 3, 0)),
    "qwen3_next": (tiny(**MOE, **LINEAR, shared_expert_intermediate_size=40), (2, 8, 2, 24, 3, 40)),
    "qwen3_5_moe_text": (tiny(**MOE, **LINEAR, shared_expert_intermediate_size=40), (2, 8, 2, 24, 3, 40)),
}  # fmt: skip
