"""Tiny random models of the types in ``DEFAULT_TARGETS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as t
from torch import nn

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SIZES, **IDS, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}  # as many keys as queries
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
ROUTED = {
    **MOE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **DECODER, **ROUTED, "num_hidden_layers": 2, "head_dim": 4, "num_key_value_heads": 2, "kv_lora_rank": 8,
    "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
GEMMA3 = {**DECODER, "sliding_window": 8, "query_pre_attn_scalar": 8}
ENCODER = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
    "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WHISPER = {
    **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, **IDS, "eos_token_id": 3, "num_mel_bins": 8,
    "max_source_positions": 10, "max_target_positions": 40,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
CLASSES = {**IMAGE, "num_labels": 3}
DINO = {**{k: v for k, v in CLASSES.items() if k != "intermediate_size"}, "mlp_ratio": 2}
SOUND = {
    **SIZES, "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "layerdrop": 0.0,
    "mask_time_prob": 0.0, "ctc_loss_reduction": "mean",
}  # fmt: skip
TOWERS = {"text_config": {**ENCODER, **IDS, "projection_size": 16}, "vision_config": IMAGE}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
PATCHES = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
QWEN_VL = {"text_config": {**DECODER, **MROPE}, **TOKENS}


@dataclass(frozen=True)
class Kind:
    """``build`` gives a model with random weights; ``dense``: ends of the names of the linear layers that stay so."""

    build: Callable[[], nn.Module]
    dense: tuple[str, ...]


def clm(config: Any, *dense: str) -> Kind:
    return Kind(lambda: t.AutoModelForCausalLM.from_config(config()), ("lm_head", *dense))


def mlm(config: Any, *dense: str) -> Kind:
    return Kind(lambda: t.AutoModelForMaskedLM.from_config(config()), dense)


def s2s(config: Any, *dense: str) -> Kind:
    return Kind(lambda: t.AutoModelForSeq2SeqLM.from_config(config()), ("lm_head", *dense))


BERT_HEAD, ROBERTA_HEAD = ("transform.dense", "predictions.decoder"), ("lm_head.dense", "lm_head.decoder")
GLOBAL = ("query_global", "key_global", "value_global")
POOLING = ("head.attention.out_proj", "vision_model.head.mlp.fc1", "vision_model.head.mlp.fc2")

KINDS: dict[str, Kind] = {
    "gemma3_text": clm(lambda: t.Gemma3TextConfig(**GEMMA3)),
    **{
        key: clm(lambda name=name: getattr(t, f"{name}Config")(**DECODER))
        for key, name in {
            "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral", "qwen2": "Qwen2", "qwen3": "Qwen3",
            "gemma": "Gemma", "gemma2": "Gemma2", "phi3": "Phi3", "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3",
            "starcoder2": "Starcoder2", "cohere": "Cohere", "cohere2": "Cohere2", "stablelm": "StableLm",
            "granite": "Granite", "smollm3": "SmolLM3", "glm": "Glm", "glm4": "Glm4", "nemotron": "Nemotron",
            "seed_oss": "SeedOss", "ernie4_5": "Ernie4_5", "exaone4": "Exaone4", "hunyuan_v1_dense": "HunYuanDenseV1",
            "nanochat": "NanoChat",
        }.items()
    },
    **{
        key: clm(lambda name=name: getattr(t, f"{name}Config")(**HEADS))
        for key, name in {"phi": "Phi", "falcon": "Falcon", "gpt_neox": "GPTNeoX"}.items()
    },
    **{
        key: clm(lambda name=name: getattr(t, f"{name}Config")(**DECODER, num_local_experts=4, num_experts_per_tok=2))
        for key, name in {"mixtral": "Mixtral", "gpt_oss": "GptOss", "granitemoe": "GraniteMoe"}.items()
    },
    "olmoe": clm(lambda: t.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": clm(lambda: t.Qwen3MoeConfig(**DECODER, **MOE, num_experts=4)),
    "qwen2_moe": clm(
        lambda: t.Qwen2MoeConfig(**DECODER, **MOE, num_experts=4, shared_expert_intermediate_size=20),
        "shared_expert_gate",
    ),
    "llama4_text": clm(
        lambda: t.Llama4TextConfig(
            **{**DECODER, "num_hidden_layers": 2}, intermediate_size_mlp=24, num_local_experts=4,
            num_experts_per_tok=1, interleave_moe_layer_step=2,
        ),
        "router",
    ),
    "glm4_moe": clm(lambda: t.Glm4MoeConfig(**{**DECODER, **ROUTED, "num_hidden_layers": 2})),
    "deepseek_v2": clm(lambda: t.DeepseekV2Config(**LATENT)),
    "deepseek_v2-lite": clm(lambda: t.DeepseekV2Config(**{**LATENT, "q_lora_rank": None})),
    "deepseek_v3": clm(lambda: t.DeepseekV3Config(**LATENT)),
    "gpt2": clm(lambda: t.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=40, **IDS)),
    "gpt_bigcode": clm(
        lambda: t.GPTBigCodeConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=40, n_inner=24, **IDS)
    ),
    "gpt_neo": clm(
        lambda: t.GPTNeoConfig(
            hidden_size=16, num_layers=2, num_heads=2, vocab_size=64, intermediate_size=24,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=40, **IDS,
        )
    ),
    "gptj": clm(
        lambda: t.GPTJConfig(
            n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=40, n_inner=24, rotary_dim=4, **IDS
        )
    ),
    "codegen": clm(
        lambda: t.CodeGenConfig(
            n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=40, n_inner=24, rotary_dim=4, **IDS
        )
    ),
    "bloom": clm(lambda: t.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=64)),
    "mpt": clm(lambda: t.MptConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=64, max_seq_len=40)),
    "opt": clm(
        lambda: t.OPTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, vocab_size=64,
            max_position_embeddings=40, word_embed_proj_dim=16,
        )
    ),
    "xglm": clm(
        lambda: t.XGLMConfig(
            d_model=16, num_layers=1, attention_heads=2, ffn_dim=24, vocab_size=64, max_position_embeddings=40
        )
    ),
    "t5": s2s(lambda: t.T5Config(**T5)),
    "t5-gated": s2s(lambda: t.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": s2s(lambda: t.MT5Config(**T5)),
    "umt5": s2s(lambda: t.UMT5Config(**T5)),
    "longt5": s2s(lambda: t.LongT5Config(**T5)),
    "switch_transformers": s2s(
        lambda: t.SwitchTransformersConfig(
            **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        ),
        "router.classifier",
    ),
    **{
        key: s2s(lambda name=name: getattr(t, f"{name}Config")(**SEQ2SEQ))
        for key, name in {
            "bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus", "marian": "Marian", "m2m_100": "M2M100",
            "blenderbot": "Blenderbot", "blenderbot-small": "BlenderbotSmall",
        }.items()
    },
    "led": s2s(
        lambda: t.LEDConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, attention_window=4,
            max_encoder_position_embeddings=40, max_decoder_position_embeddings=40,
        ),
        *GLOBAL,
    ),
    "nllb-moe": s2s(
        lambda: t.NllbMoeConfig(**SEQ2SEQ, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1),
        "router.classifier",
    ),
    "whisper": Kind(lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)), ("proj_out",)),
    "whisper-classifier": Kind(
        lambda: t.WhisperForAudioClassification(t.WhisperConfig(**WHISPER, num_labels=3)), ("projector", "classifier")
    ),
    **{
        key: mlm(lambda name=name: getattr(t, f"{name}Config")(**ENCODER), *BERT_HEAD)
        for key, name in {
            "bert": "Bert", "ernie": "Ernie", "roformer": "RoFormer", "megatron-bert": "MegatronBert",
        }.items()
    },
    **{
        key: mlm(lambda name=name: getattr(t, f"{name}Config")(**ENCODER), *ROBERTA_HEAD)
        for key, name in {
            "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "xlm-roberta-xl": "XLMRobertaXL",
            "camembert": "Camembert", "data2vec-text": "Data2VecText", "mpnet": "MPNet",
            "roberta-prelayernorm": "RobertaPreLayerNorm",
        }.items()
    },
    "nomic_bert": mlm(lambda: t.NomicBertConfig(**ENCODER), *BERT_HEAD),
    "layoutlm": mlm(lambda: t.LayoutLMConfig(**ENCODER), *BERT_HEAD, "pooler.dense"),
    "big_bird": mlm(lambda: t.BigBirdConfig(**ENCODER, **{k: v for k, v in IDS.items() if k != "pad_token_id"},
                                            sep_token_id=3, attention_type="original_full"), *BERT_HEAD, "bert.pooler"),
    "esm": mlm(lambda: t.EsmConfig(**ENCODER, mask_token_id=4), *ROBERTA_HEAD, "contact_head.regression"),
    "longformer": mlm(lambda: t.LongformerConfig(**ENCODER, attention_window=4), *ROBERTA_HEAD, *GLOBAL),
    "electra": mlm(
        lambda: t.ElectraConfig(**ENCODER, embedding_size=12), "embeddings_project", "generator_predictions.dense",
        "generator_lm_head",
    ),
    "convbert": mlm(
        lambda: t.ConvBertConfig(**ENCODER, embedding_size=16), "generator_predictions.dense", "generator_lm_head"
    ),
    "albert": mlm(
        lambda: t.AlbertConfig(**{**ENCODER, "num_hidden_layers": 2}, embedding_size=12), "embedding_hidden_mapping_in",
        "predictions.dense", "predictions.decoder",
    ),
    "distilbert": mlm(
        lambda: t.DistilBertConfig(
            dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=64, max_position_embeddings=40
        ),
        "vocab_transform", "vocab_projector",
    ),
    "deberta": mlm(
        lambda: t.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]), *BERT_HEAD
    ),
    "deberta-v2": mlm(
        lambda: t.DebertaV2Config(
            **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8,
            norm_rel_ebd="layer_norm", conv_kernel_size=3,
        ),
        *BERT_HEAD,
    ),
    "deberta-v2-own-keys": mlm(
        lambda: t.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]), *BERT_HEAD
    ),
    "modernbert": mlm(
        lambda: t.ModernBertConfig(
            **{**ENCODER, **IDS, "num_hidden_layers": 2}, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2
        ),
        "head.dense", "decoder",
    ),
    "eurobert": mlm(lambda: t.EuroBertConfig(**DECODER, mask_token_id=5), "lm_head"),
    "funnel": mlm(
        lambda: t.FunnelConfig(vocab_size=64, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24), "lm_head"
    ),
    **{
        key: Kind(
            lambda name=name: getattr(t, f"{name}ForImageClassification")(getattr(t, f"{name}Config")(**CLASSES)),
            ("classifier",),
        )
        for key, name in {"vit": "ViT", "deit": "DeiT", "beit": "Beit", "ijepa": "IJepa"}.items()
    },
    "dinov2": Kind(lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO)), ("classifier",)),
    "dinov2-swiglu": Kind(
        lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO, use_swiglu_ffn=True)), ("classifier",)
    ),
    "dinov2_with_registers": Kind(
        lambda: t.Dinov2WithRegistersForImageClassification(t.Dinov2WithRegistersConfig(**DINO)), ("classifier",)
    ),
    "dinov3_vit": Kind(
        lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**IMAGE, num_register_tokens=1, pos_embed_rescale=None)), ()
    ),
    "swin": Kind(
        lambda: t.SwinForImageClassification(
            t.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
            )
        ),
        ("classifier", "downsample.reduction"),
    ),
    "clip": Kind(lambda: t.CLIPModel(t.CLIPConfig(**TOWERS)), ("visual_projection", "text_projection")),
    "clip-classifier": Kind(
        lambda: t.CLIPForImageClassification(t.CLIPConfig(**TOWERS, num_labels=3)), ("classifier",)
    ),
    "siglip": Kind(lambda: t.SiglipModel(t.SiglipConfig(**TOWERS)), ("text_model.head", *POOLING)),
    "siglip2": Kind(
        lambda: t.Siglip2Model(
            t.Siglip2Config(
                text_config=TOWERS["text_config"],
                vision_config={**{k: v for k, v in IMAGE.items() if k != "image_size"}, "num_patches": 4},
            )
        ),
        ("text_model.head", "patch_embedding", *POOLING),
    ),
    "siglip-classifier": Kind(
        lambda: t.SiglipForImageClassification(t.SiglipConfig(**TOWERS, num_labels=3)), ("classifier", *POOLING)
    ),
    "wav2vec2": Kind(lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SOUND)), ("lm_head", "projection")),
    "hubert": Kind(lambda: t.HubertForCTC(t.HubertConfig(**SOUND)), ("lm_head", "projection")),
    "wav2vec2-classifier": Kind(
        lambda: t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(**SOUND)),
        ("classifier", "projector", "projection"),
    ),
    "wavlm": Kind(
        lambda: t.WavLMForCTC(t.WavLMConfig(**SOUND)),
        ("lm_head", "projection", "q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear"),
    ),
    "audio-spectrogram-transformer": Kind(
        lambda: t.ASTForAudioClassification(
            t.ASTConfig(
                **{k: v for k, v in CLASSES.items() if k not in ("image_size", "num_channels")}, frequency_stride=4,
                time_stride=4, max_length=16, num_mel_bins=8,
            )
        ),
        ("classifier.dense",),
    ),
    "gemma3": Kind(
        lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=GEMMA3, vision_config={**IMAGE, "vision_use_head": False}, mm_tokens_per_image=4,
                image_token_index=60, boi_token_index=61, eoi_token_index=62,
            )
        ),
        ("lm_head",),
    ),
    "paligemma": Kind(
        lambda: t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                text_config={"model_type": "gemma", **DECODER}, image_token_index=60, projection_dim=16, hidden_size=16,
                vision_config={"model_type": "siglip_vision_model", **IMAGE, "vision_use_head": False},
            )
        ),
        ("lm_head", "multi_modal_projector.linear"),
    ),
    "llava": Kind(
        lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                text_config=t.LlamaConfig(**DECODER), vision_config=t.CLIPVisionConfig(**IMAGE), image_token_index=60,
                vision_feature_layer=-1, image_seq_length=4,
            )
        ),
        ("lm_head", "linear_1", "linear_2"),
    ),
    "qwen2_vl": Kind(
        lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(**QWEN_VL, vision_config={**PATCHES, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2})
        ),
        ("lm_head", "merger.mlp.0", "merger.mlp.2"),
    ),
    "qwen2_5_vl": Kind(
        lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                **QWEN_VL,
                vision_config={
                    **PATCHES, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "window_size": 16,
                    "fullatt_block_indexes": [0],
                },
            )
        ),
        ("lm_head", "merger.mlp.0", "merger.mlp.2"),
    ),
    "qwen3_vl": Kind(
        lambda: t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(
                **QWEN_VL,
                vision_config={
                    **PATCHES, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16,
                    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
                },
            )
        ),
        ("lm_head", *(f"{part}.linear_fc{i}" for part in ("merger", "deepstack_merger_list.0") for i in (1, 2))),
    ),
}  # fmt: skip
