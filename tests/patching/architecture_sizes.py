"""Tiny configurations of any architecture of transformers: what `architectures` builds its models from.

Sizes are not listed per model: a configuration's own fields say what they are, by their names (`shrunk`). `OVERRIDES`
holds what a name does not tell.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import transformers

WIDTH, INNER, LAYERS, HEADS, VOCABULARY, EXPERTS, IMAGE, AUDIO, LENGTH = 64, 96, 3, 4, 120, 4, 32, 64, 8

# What an integer field of a name is set to, at most: the first pattern that matches the whole name decides.
_KEPT = -1
_RULES: list[tuple[str, int]] = [
    (r"type_vocab_size|num_labels|num_channels|num_encoder_blocks|num_stages|altup_num_inputs|.*_id"
     r"|.*(_index|rate|stride|kernel_size|steps|seconds|frame_size|scale|sampling|_hz|seed|num_buckets|_distance|n_floor"
     r"|theta|length_per_tok|_prob|max_period|_multiple_of|scale_factor|hop_length|n_fft|samples_per_token)", _KEPT),
    (r".*vocab_size|.*_group_vocab|entity_emb_num|.*num_embeddings|vocab_size_\w+", VOCABULARY),
    (r"codebook_size", 128),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank|.*_lora_rank|.*_rank", 32),
    (r"num_codebooks|num_quantizers|num_semantic_quantizers|n_groups|mamba_n_?groups|o_groups", 2),
    (r"(num_|n_)?shared_experts?|moe_num_shared_experts|num_kv_shared_layers", 1),
    (r".*(experts_per_tok|experts_per_token|top_k_experts|moe_top_?k|moe_k|index_topk_blocks|index_kpool)", 2),
    (r"(moe_)?(num_|n_)?(routed_|local_)?experts|moe_num_experts|zero_expert_num", EXPERTS),
    (r"n_group|num_expert_group", 2),
    (r"mm_tokens_per_image|vision_soft_tokens_per_image", 4),
    (r"base_channels", 32),
    (r"num_filters", 8),
    (r"topk_group|num_hidden_groups|inner_group_num|first_k_dense_replace|num_dense_layers|.*_offset|\w*mem_blocks"
     r"|num_hash|num_hashes|num_random_blocks", 1),
    (r".*(shared|moe|expert)\w*(intermediate|ffn_hidden|ffn)_(size|dim)", 48),
    (r".*(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|n_inner|inner_dim|d_inner)"
     r"|mlp_dim|ffn_size|feed_forward_size|.*_hidden_dim|hidden_dim|encoder_cross_output_size", INNER),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", 2),
    (r"mamba_(n|num)_heads", 8),
    (r".*(qk_rope_head_dim|rotary_dim)", 8),
    (r".*(head_dim|head_size|d_kv|d_head|dim_head|kv_channels|key_dim|headdim|d_state|state_size)", WIDTH // HEADS),
    (r".*(heads|n_head)", HEADS),
    (r".*(layers|n_layer|num_blocks|depth|n_layers|layers_per_stack|_per_block)", LAYERS),
    (r"max_source_positions", AUDIO // 2),
    (r".*max_(position|2d_position|temporal)_embeddings|n_positions|n_ctx|max_.*positions|max_seq_len|context_length"
     r"|model_max_length|max_pos_emb", 128),
    (r"image_size|force_image_size|crop_size|resolution|input_size", IMAGE),
    (r"patch_size", 8),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel|input_feat_size|feature_size|feature_projection_\w+", AUDIO),
    (r".*(sliding_window|sliding_window_size|window_length|attention_window_size|index_topk|keep_window_size)", 4),
    (r".*(_period|_interval|_every_n_layers|window_pattern|sparse_step|layer_interval|_frequency)", 2),
    (r".*chunk_size", 8),
    (r"mask_(time|feature)_length", 2),  # some mask a stretch of their input in training, if it is longer
]  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_LAYER_INDICES = re.compile(r".*(_idxs|_indexes|_indices|_layers|layer_ids|_layer_idx)|out_indices")
_SPECIAL = re.compile(r".*(token_id|token_index|_id|_token_ids|_index)")
_WHERE_NONE = {
    "head_dim": WIDTH // HEADS,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "vocab_size": VOCABULARY,
}

# By model type (or task and model type, or class): fields that their names do not give away.
# fmt: off
_SWIN = {"image_size": 64, "window_size": 2}
_CODEC = {"downsampling_ratios": (2, 2), "depths": (2, 2, 2), "num_filters": 8}
_CROPS = {"image_grid_pinpoints": [[64, 64]]}


def _sections(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


OVERRIDES: dict[str, dict[str, Any]] = {
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},  # the class lacks the second
    "DiffusionGemmaTextConfig": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 48},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": WIDTH // 4},
    "GraniteSpeech5EncoderConfig": {"num_mel_bins": AUDIO // 4},
    "apertus1p5": {"image_token_offset": 8, "audio_token_offset": 136},
    "apertus1p5_text": {"vocab_size": 300},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio-spectrogram-transformer": {"max_length": AUDIO},
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 40},
    "chameleon": {"vocabulary_map": {"<image>": 40} | {f"IMGIMG{chr(65 + code)}Z": 41 + code for code in range(10)}},
    "chameleon_vqgan": {"num_embeddings": 10},
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": _sections(4, 2, 2), "sliding_attention": _sections(4, 2, 2)}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "donut-swin": _SWIN,
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "image_size": 64},
    "emu3": {"vocabulary_map": {"<image>": 40, "<|extra_200|>": 41}
             | {f"<|visual token {code:06d}|>": 42 + code for code in range(16)}},
    "emu3_vqgan": {"codebook_size": 16},
    "ernie4_5_vl_moe_text": {"rope_parameters": _sections(3, 3, 2)},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1, 2, 2],
                        "downsample_rate": "1/2", **_CROPS},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hgnet_v2": {"stem_channels": (3, 8, 16), "stage_in_channels": (16, 32, 32, 64),
                 "stage_mid_channels": (8, 8, 16, 16), "stage_out_channels": (32, 32, 64, 64),
                 "hidden_sizes": [32, 32, 64, 64], "embedding_size": 16, "stage_numb_of_layers": (2, 2, 2, 2)},
    "instructblip": {"image_token_index": 40},
    "instructblipvideo": {"video_token_index": 40},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 96, "intermediate_size": 144},
    "llama4_vision_model": {"intermediate_size": 4 * WIDTH},
    "llava_next": _CROPS,
    "llava_next_video": _CROPS,
    "llava_onevision": _CROPS,
    "mamba2": {"num_heads": 8},
    "minicpm_ocr": {"image_token_id": 40},
    "minicpmv4_6": {"image_token_id": 40},
    "minicpmv4_7": {"image_token_id": 40},
    "mobilevitv2": {"image_size": 64},
    "molmo2_adapter": {"vision_feature_layer": [2, 1]},
    "moonshine_streaming": {"num_key_value_heads": HEADS},  # the class lacks it, checkpoints have it
    "muse_spark_audio": {"num_hidden_layers": 4},
    "paddleocr_vl_text": {"rope_parameters": _sections(2, 3, 3)},
    "image-classification:perceiver": {"num_cross_attention_heads": 1},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "causal-lm:reformer": {"is_decoder": True},
    "reformer": {"axial_pos_shape": (2, 4), "axial_pos_embds_dim": (16, 48), "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4},
    "shieldgemma2": {"yes_token_index": 81, "no_token_index": 82},
    "step3p5": {"sliding_window": 4},
    "swin": _SWIN,
    "t5": {"decoder_start_token_id": 0},
    "textnet": {"stem_out_channels": 16},
    "vibevoice_acoustic_tokenizer": _CODEC,
    "vibevoice_acoustic_tokenizer_decoder": _CODEC,
    "vibevoice_acoustic_tokenizer_encoder": _CODEC,
    "vipllava": {"vision_feature_layer": (-1, -2, 0, 1, 2)},
    "voxtral": {"audio_token_id": 40},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
              "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS},
}
# What a configuration's class has to be given to be made at all.
_MUSICGEN = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}
_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
FULL: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    # Early releases have no defaults for these.
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision"}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": _DECODER},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "granite4_vision": {"text_config": {"model_type": "granite4_vision_text"}},
    "musicgen": _MUSICGEN,
    "musicgen_melody": _MUSICGEN,
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": _DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": _DECODER},
}
# fmt: on


class _Tokens:
    """Small ids for special tokens, the same for one name all through a configuration."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def small(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.small(f"{name}.{i}", each) for i, each in enumerate(value))
        if not isinstance(value, int) or isinstance(value, bool) or value < 30:
            return value
        return self.ids.setdefault(name.replace("_index", "_id"), 30 + len(self.ids))


def _rule(name: str) -> int | None:
    return next((value for pattern, value in _COMPILED if pattern.fullmatch(name)), None)


def _small_integer(name: str, value: int) -> int:
    most = _rule(name)
    if most == _KEPT or value <= 1:
        return value
    if most is None:  # some width, whatever its name
        return WIDTH if value > 128 or (value > WIDTH and name.endswith(("size", "dim"))) else value
    return most if most == VOCABULARY else min(value, most)


def _small_list(name: str, value: list[int] | tuple[int, ...]) -> list[int] | tuple[int, ...]:
    """Of a model in stages: the ratios between the stages are kept."""
    if re.fullmatch(r".*(depths|layers|num_block_repeats|stage_num_blocks|stage_numb_of_layers)", name):
        return type(value)(min(each, 2) for each in value)
    if re.fullmatch(r".*heads", name):
        return type(value)(each // math.gcd(*value) for each in value)
    if re.fullmatch(r".*image_size", name):
        return type(value)(IMAGE for _ in value)
    if re.fullmatch(r".*(size|sizes|dims|dim|channels|planes)", name) and (unit := math.gcd(*value)) > 16:
        return type(value)(each // unit * 16 for each in value)
    return value


def _is_integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(each) is int for each in value)


def _is_indices(name: str, value: Any) -> bool:
    return _LAYER_INDICES.fullmatch(name) is not None and _is_integers(value) and max(value) > 1


def _per_layer(config: transformers.PreTrainedConfig) -> dict[int, dict[str, Any]]:
    spec = vars(config).get("_heterogeneity_spec")
    return spec.per_layer_overrides if spec is not None else {}


def _layer_count(config: transformers.PreTrainedConfig) -> int | None:
    """None where its layers are not all in one row, as they are not in a model of stages."""
    count = getattr(config, "num_hidden_layers", None)
    stages = _rule(config.attribute_map.get("num_hidden_layers", "num_hidden_layers")) == _KEPT
    return count if isinstance(count, int) and not stages else None


def _chosen_layers(config: transformers.PreTrainedConfig) -> list[int]:
    """The layers of the full size whose like the tiny model has: one of each kind at least."""
    count = _layer_count(config)
    if count is None:
        return list(range(LAYERS))
    kinds: list[list[str]] = [[repr(_per_layer(config).get(index))] for index in range(count)]
    for name, value in vars(config).items():
        if name.startswith("_") or not isinstance(value, (list, tuple)):
            continue
        if _is_indices(name, value):
            per_layer = [str(index in value) for index in range(count)]
        elif len(value) == count and count > 4:
            per_layer = [repr(each) for each in value]
        else:
            continue
        for kind, each in zip(kinds, per_layer, strict=True):
            kind.append(each)
    seen: dict[tuple[str, ...], int] = {}
    for index, kind in enumerate(kinds):
        seen.setdefault(tuple(kind), index)
    chosen = sorted(seen.values())[: LAYERS + 2]
    chosen += [index for index in range(count) if index not in chosen][: max(0, LAYERS - len(chosen))]
    return sorted(chosen)


def _small_rope(value: dict[str, Any], head: int, mrope: bool) -> dict[str, Any]:
    small = dict(value)
    if mrope and "rope_theta" in value:  # models fall back to sections of the full size
        small.setdefault("mrope_section", [16, 24, 24])
    for name, each in tuple(small.items()):
        if isinstance(each, dict):
            small[name] = _small_rope(each, head, mrope)
        elif name == "original_max_position_embeddings" and isinstance(each, int):
            small[name] = 64
        elif name in ("short_factor", "long_factor") and each is not None:
            small[name] = list(each)[: int(head * value.get("partial_rotary_factor", 1.0)) // 2]
        elif name == "mrope_section" and each is not None:
            half = int(head * (value.get("partial_rotary_factor") or 1.0)) // 2
            parts = [max(1, half * part // sum(each)) for part in each]
            parts[0] += half - sum(parts)
            small[name] = parts
    return small


def shrunk(
    config: transformers.PreTrainedConfig, task: str = "", tokens: _Tokens | None = None
) -> transformers.PreTrainedConfig:
    """A tiny configuration of the same class, with its sub-configurations."""
    tokens = tokens or _Tokens()
    kind, held = type(config), vars(config)
    usual = {field.name: field.default for field in dataclasses.fields(kind)}
    values = {name: held.get(kind.attribute_map.get(name, name)) for name in usual}
    chosen, count = _chosen_layers(config), _layer_count(config)
    layers_field = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            small[name] = shrunk(value, task, tokens)
        elif value is None and name in _WHERE_NONE:
            small[name] = _WHERE_NONE[name]
        elif isinstance(value, bool) or value is None or name in ("dtype", "id2label", "label2id", "architectures"):
            pass
        elif name in (layers_field, "num_hidden_layers", "num_kv_shared_layers") and value == count:
            small[name] = len(chosen)
        elif count is not None and _is_indices(name, value):
            small[name] = type(value)(chosen.index(index) for index in value if index in chosen)
        elif isinstance(value, (list, tuple)) and len(value) == count and count > 4:
            each_small = [
                _small_integer(name, value[index]) if _is_integers(value) else value[index] for index in chosen
            ]
            small[name] = type(value)(each_small)
        elif _SPECIAL.fullmatch(name) and isinstance(value, (int, list, tuple)):
            small[name] = tokens.small(name, value)
        elif name == "embed_dim" and "depths" in usual:
            small[name] = 16 if isinstance(value, int) else _small_list(name, value)
        elif isinstance(value, int):
            small[name] = _small_integer(name, value)
        elif _is_integers(value):
            small[name] = _small_list(name, value)
        if name not in small and value is not None and usual[name] is not value and not isinstance(value, dict):
            small[name] = value
    small |= _related(small, values)
    for name in (config.model_type, f"{task}:{config.model_type}", kind.__name__):
        small |= OVERRIDES.get(name, {})
    if per_layer := _per_layer(config):
        small["per_layer_config"] = {}
        for place, index in enumerate(chosen):
            own = per_layer.get(index, {})
            less = {name: _small_integer(name, each) if isinstance(each, int) else each for name, each in own.items()}
            less |= {
                name: each
                for name, each in _related(small | less, values | own).items()
                if name in less or each != small[name]
            }
            small["per_layer_config"][place] = less
    rope_parameters = values.get("rope_parameters")
    if isinstance(rope_parameters, dict) and small.get("rope_parameters", rope_parameters) is rope_parameters:
        head = small.get("qk_rope_head_dim") or small.get("head_dim") or WIDTH // HEADS
        mrope = "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
        small["rope_parameters"] = _small_rope(rope_parameters, head, mrope)
    for name in ("encoder", "decoder"):  # which early releases take as dicts, and have no fields for
        if name not in usual and isinstance(held.get(name), transformers.PreTrainedConfig):
            small[name] = shrunk(held[name], task, tokens).to_dict()
    return kind(**small)


def _related(small: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Sizes that other sizes decide: where the full ones are equal, or add up, the small ones do too."""
    related = {}
    for name in small:
        heads = name.replace("key_value_heads", "attention_heads")
        if heads != name and heads in small and values[heads] == values[name]:
            related[name] = small[heads]
    rope, plain = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if rope and plain:
        small = small | ({"qk_nope_head_dim": small["qk_rope_head_dim"]} if plain == rope else {})
        related["qk_nope_head_dim"] = small["qk_nope_head_dim"]
        sums = {rope: small["qk_rope_head_dim"], rope + plain: small["qk_rope_head_dim"] + small["qk_nope_head_dim"]}
        for name in ("head_dim", "qk_head_dim"):
            if values.get(name) in sums:
                related[name] = sums[values[name]]
    return related
