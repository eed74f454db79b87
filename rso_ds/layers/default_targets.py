"""The linear layers of the blocks of known model types, by the ends of their names.

A model need not have all that its type may have (a gated or a plain MLP). Heads, poolers and routers are left dense
whatever they are called (``rso_ds.layers.left_dense``).
"""

from __future__ import annotations

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA = (*_ATTENTION, *_GATED)
_FUSED_GATE = (*_ATTENTION, "gate_up_proj", "down_proj")
_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
_FALCON = ("query_key_value", "self_attention.dense", "attention.dense", "dense_h_to_4h", "dense_4h_to_h")
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_VIT = (*_ATTENTION, "fc1", "fc2")
_SPEECH = ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense")
_LOW_RANK = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *_LLAMA)  # DeepSeek's latent attention

_FAMILIES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    # decoders
    (_LLAMA, (
        "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
        "gemma3_text", "gpt_oss", "olmo", "olmo2", "olmo3", "olmoe", "cohere", "cohere2", "stablelm", "granite",
        "granitemoe", "smollm3", "glm4_moe", "nemotron", "seed_oss", "ernie4_5", "exaone4", "hunyuan_v1_dense",
        "llama4_text", "eurobert", "nomic_bert",
    )),
    (_FUSED_GATE, ("glm", "glm4")),
    (_LOW_RANK, ("deepseek_v2", "deepseek_v3")),
    (("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ("phi3",)),
    (("q_proj", "k_proj", "v_proj", "self_attn.dense", "fc1", "fc2"), ("phi",)),
    ((*_ATTENTION, "c_fc", "c_proj"), ("starcoder2",)),
    (_VIT, ("nanochat",)),
    (("c_attn", "c_proj", "c_fc"), ("gpt2", "gpt_bigcode")),
    (("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"), ("gpt_neo",)),
    (("q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj", "fc_in", "fc_out"), ("gptj", "codegen")),
    (_FALCON, ("falcon", "gpt_neox", "bloom")),
    (("Wqkv", "out_proj", "up_proj", "down_proj"), ("mpt",)),
    # encoders and decoders
    (_BART, (
        "opt", "xglm", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small", "nllb-moe",
        "whisper", "clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model",
        "siglip_vision_model", "siglip2",
    )),
    ((*_BART, "query", "key", "value", "self_attn.output"), ("led",)),
    (_T5, ("t5", "mt5", "umt5", "longt5", "switch_transformers")),
    # encoders
    (_BERT, (
        "bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "ernie", "esm", "big_bird",
        "longformer", "roformer", "megatron-bert", "data2vec-text", "roberta-prelayernorm", "layoutlm",
    )),
    ((*_BERT, "conv_kernel_layer", "conv_out_layer"), ("convbert",)),
    (("query", "key", "value", "attention.dense", "ffn", "ffn_output"), ("albert",)),
    (("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), ("distilbert",)),
    (("in_proj", "pos_proj", "pos_q_proj", *_BERT[3:]), ("deberta",)),
    (("query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj", *_BERT[3:]), ("deberta-v2",)),
    (("attn.q", "attn.k", "attn.v", "attn.o", *_BERT[4:]), ("mpnet",)),
    (("q_head", "k_head", "v_head", "post_proj", "linear_1", "linear_2"), ("funnel",)),
    (("Wqkv", "attn.Wo", "Wi", "mlp.Wo"), ("modernbert",)),
    # images and sound
    (_VIT, ("vit", "deit", "beit", "ijepa", "swin", "audio-spectrogram-transformer")),
    ((*_VIT, *_GATED), ("dinov2", "dinov2_with_registers", "dinov3_vit")),
    (_SPEECH, ("wav2vec2", "hubert")),
    (_SPEECH[4:], ("wavlm",)),  # hands the weights of its attention to torch
    # text with images: both towers
    ((*_LLAMA, "out_proj", "fc1", "fc2"), ("gemma3", "paligemma", "llava")),
    ((*_LLAMA, "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), ("qwen2_vl", "qwen2_5_vl")),
    ((*_LLAMA, "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"), ("qwen3_vl",)),
]  # fmt: skip

# By Hugging Face's ``config.model_type``.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    model_type: patterns for patterns, types in _FAMILIES for model_type in types
}
