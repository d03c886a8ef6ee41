"""A tiny configuration for any class of Transformers: its default one, with sizes, numbers of layers and dropout reduced."""

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# Kind of model, as the table names it, and the Auto mapping that lists its classes.
MAPPINGS = {
    "causal language models": "CAUSAL_LM",
    "masked language models": "MASKED_LM",
    "encoder-decoders": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence classifiers": "SEQUENCE_CLASSIFICATION",
    "token classifiers": "TOKEN_CLASSIFICATION",
    "image classifiers": "IMAGE_CLASSIFICATION",
    "speech recognition": "SPEECH_SEQ_2_SEQ",
    "language models with images": "IMAGE_TEXT_TO_TEXT",
}
LAYERS, WIDTH = 4, 32
# Names of fields by the small value that they get.
NAMES = [
    (99, "vocab_size src_vocab_size tgt_vocab_size entity_vocab_size vocab_size_per_layer_input"),
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim encoder_hidden_size rnn_hidden_size",
    ),
    (
        WIDTH,
        "lru_width attention_hidden_size projection_dim dim_model_base d_embed backbone_hidden_size entity_emb_size",
    ),
    (WIDTH, "kv_hidden_size mamba_d_ssm text_hidden_size hidden_dim true_hidden_size"),
    (
        64,
        "intermediate_size ffn_dim n_inner d_inner d_ff encoder_ffn_dim decoder_ffn_dim dim_feedforward ffn_hidden_size",
    ),
    (64, "intermediate_size_mlp shared_intermediate_size mlp_dim n_ff feed_forward_size hidden_ff"),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers",
    ),
    (LAYERS, "num_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_mem_blocks"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads num_local_experts num_experts n_routed_experts"),
    (4, "moe_num_experts conv_kernel"),
    (2, "num_key_value_heads num_kv_heads n_shared_experts num_experts_per_tok moe_topk moe_k num_experts_per_token"),
    (2, "num_shared_experts"),
    (16, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size q_lora_rank kv_lora_rank"),
    (16, "moe_shared_expert_intermediate_size index_head_dim linear_key_head_dim linear_value_head_dim state_size"),
    (16, "ssm_state_size hidden_size_per_layer_input"),
    (8, "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim global_head_dim attention_head_dim"),
    (
        128,
        "max_position_embeddings n_positions max_encoder_position_embeddings max_decoder_position_embeddings seq_length",
    ),
    (1, "n_group topk_group num_group num_expert_group"),
    (0, "bos_token_id decoder_start_token_id num_nextn_predict_layers num_mtp_layers"),
    (1, "pad_token_id"),
    (2, "eos_token_id"),
]
SMALL = {name: value for value, names in NAMES for name in names.split()}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
# What the default configuration does not show, by model type.
BY_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 16},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "drop_path_rate": 0.0},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "drop_path_rate": 0.0},
    "codegen": {"rotary_dim": 8},
    "dots3_note": {"num_key_value_heads": 4},
    "donut-swin": {"num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "cvt": {"num_heads": [1, 2, 4]},
    "efficientnet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "funnel": {"bos_token_id": 0},
    "inkling_text": {"unpadded_vocab_size": 99},
    "inkling2_text": {"unpadded_vocab_size": 99},
    "inkling2_loop_text": {"unpadded_vocab_size": 99},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "led": {"attention_window": 4},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": [4, 4, 4, 4]},
    "moonshine": {
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": LAYERS,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "encoder_num_key_value_heads": 2,
        "decoder_num_key_value_heads": 2,
    },
    "mobilebert": {"hidden_size": 32, "embedding_size": 32, "intra_bottleneck_size": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "pvt": {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1]},
    "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "num_cross_attention_heads": 1,
        "num_self_attends_per_block": 4,
        "image_size": 16,
    },
    "regnet": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 4},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "num_groups": 4},
    "swin": {"num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1], "drop_path_rate": 0.0},
    "swinv2": {"num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1], "drop_path_rate": 0.0},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16},
    "wav2vec2": {"conv_dim": [WIDTH] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    "zaya": {"num_experts_per_tok": 1},
}
BY_TYPE |= {
    f"{name}_text": {"rope_parameters": SECTIONS}
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_ocr", "paddleocr_vl")
}


def classes() -> list[tuple[str, str, str]]:
    """`(kind, model type, class name)` of all classes of the installed Transformers."""
    found = []
    for kind, mapping in MAPPINGS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        seen = set()
        for model_type, listed in names.items():
            for name in listed if isinstance(listed, tuple | list) else (listed,):
                if name not in seen:
                    seen.add(name)
                    found.append((kind, model_type, name))
    return found


def shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that make it tiny, in place of those of `default`."""
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrunk(value) | {"model_type": value.model_type}
        elif name in SMALL and (value is None or isinstance(value, int)) and not isinstance(value, bool):
            if not (value is None and name.endswith(("_dim", "_rank", "layers"))):
                fields[name] = SMALL[name]
        elif isinstance(value, float) and ("drop" in name):
            fields[name] = 0.0
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(kinds := vars(default).get(name), list):
            kinds = list(dict.fromkeys(kinds))
            fields[name] = [kinds[number % len(kinds)] for number in range(LAYERS)]
    if "kv_lora_rank" in vars(default) and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention has no groups
    if fields.get("num_attention_heads") and "head_dim" in vars(default):
        fields["head_dim"] = 8
    if default.model_type.endswith("encoder-decoder"):
        fields["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    return fields | BY_TYPE.get(default.model_type, {})


def tiny_config(model_type: str, name: str) -> PreTrainedConfig:
    """A tiny configuration for the class of that name."""
    kind = getattr(transformers, name).config_class or CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = kind(**shrunk(kind()))
    return config
