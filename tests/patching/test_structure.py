"""The layers and sites that are found by structure: names and order, in known families and in modules of any make."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
import transformers
from torch import nn

from red_kernels.edits.config import POSITIONS, RedConfig
from red_kernels.models.structure import Block, FoundSite, blocks_in
from red_kernels.patching.patch import patch

D, INNER = 32, 80
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def paths(block: Block, place: str) -> list[str]:
    return [site.path for site in block.sites if site.place == place]


def all_paths(block: Block) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in block.sites:
        found.setdefault(site.place, []).append(site.path)
    return found


def site_names(blocks: list[Block], position: str) -> list[str]:
    return [
        f"{block.name}.{site.path}".rstrip(".")
        for block in blocks
        for site in block.sites
        if site.place in POSITIONS[position]
    ]


def from_config(name: str, **arguments: Any) -> nn.Module:
    config = getattr(transformers, name)(**arguments)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def only(model: nn.Module) -> Block:
    """The one layer of a model, or the first of layers that are alike."""
    blocks = blocks_in(model)
    assert blocks
    assert all(block.sites == blocks[0].sites for block in blocks)
    return blocks[0]


@pytest.mark.parametrize("position", cases.POSITIONS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_sites_of_the_zoo(name: str, position: str) -> None:
    if position == "res_with_attn" and name in zoo.PARALLEL:
        return
    found = site_names(blocks_in(zoo.tiny(name)), position)
    assert set(found) == cases.sites(name, position).names
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        ("llama", "more", [*QKV, "self_attn.o_proj", "mlp.down_proj"]),
        ("llama", "res_with_attn", ["self_attn", ""]),
        ("opt", "more", [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")] + ["fc2"]),
        ("gpt2", "more", ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]),
        ("bert", "ffn_attn", ["attention.output.dense", "output.dense"]),
        ("bert", "res_with_attn", ["attention.output", "output"]),
        ("distilbert", "res_with_attn", ["sa_layer_norm", ""]),
        ("qwen2_moe", "ffn", ["mlp"]),
        ("phi3", "more", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.down_proj"]),
        ("modernbert", "more", ["attn.Wqkv", "attn.Wo", "mlp.Wo"]),
    ],
)
def test_their_order(name: str, position: str, expected: list[str]) -> None:
    block = blocks_in(zoo.tiny(name))[0]
    assert [site.path for site in block.sites if site.place in POSITIONS[position]] == expected


def test_t5_in_full() -> None:
    model = zoo.tiny("t5_gated")
    blocks = blocks_in(model)
    assert [block.name for block in blocks] == [
        *(f"encoder.block.{i}" for i in range(zoo.LAYERS)),
        *(f"decoder.block.{i}" for i in range(zoo.LAYERS - 1)),
    ]
    last = blocks[-1]
    assert (last.stack, last.list_key, last.index, last.kind) == ("decoder", "block", zoo.LAYERS - 2, "decoder")
    assert last.module is model.get_submodule(last.name)
    assert [(site.place, site.path, site.of_tuple) for site in last.sites] == [
        ("attn_res", "layer.0", True),
        *(("qkv", f"layer.0.SelfAttention.{name}", False) for name in "qkv"),
        ("attn", "layer.0.SelfAttention.o", False),
        ("attn_res", "layer.1", True),
        *(("qkv", f"layer.1.EncDecAttention.{name}", False) for name in "qkv"),
        ("attn", "layer.1.EncDecAttention.o", False),
        ("ffn", "layer.2.DenseReluDense.wo", False),
        ("res", "layer.2", True),
    ]


def test_widths_and_tuples() -> None:
    block = blocks_in(zoo.tiny("llama"))[0]
    of = {site.path: site for site in block.sites}
    assert of["self_attn"] == FoundSite("attn_res", "self_attn", zoo.HIDDEN, True, inside=True)
    assert of[""] == FoundSite("res", "", zoo.HIDDEN, True)
    assert of["self_attn.k_proj"] == FoundSite("qkv", "self_attn.k_proj", zoo.HIDDEN // 2, False)
    mixture = blocks_in(zoo.tiny("mixtral"))[0]
    assert FoundSite("ffn", "mlp", zoo.HIDDEN, True) in mixture.sites
    behind = {site.path: site for site in blocks_in(zoo.tiny("bert"))[0].sites}["attention.output"]
    assert behind == FoundSite("attn_res", "attention.output", zoo.HIDDEN, False)


@pytest.mark.parametrize("position", ["ffn", "more", "res"])
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "gpt2"])
def test_an_edited_model_has_the_same_sites(name: str, position: str) -> None:
    model = zoo.tiny(name)
    before = [(block.name, block.sites) for block in blocks_in(model)]
    patch(model, RedConfig(position=position, kind="ln"))
    assert [(block.name, block.sites) for block in blocks_in(model)] == before


def test_no_stream_behind_attention_beside_the_ffn() -> None:
    for name in zoo.PARALLEL:
        assert not any(paths(block, "attn_res") for block in blocks_in(zoo.tiny(name)))


# Models of the library by their configurations, made without weights.

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
_KV: dict[str, Any] = {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ("GemmaConfig", {**_KV, "head_dim": 8}, {"ffn": ["mlp.down_proj"], "attn": ["self_attn.o_proj"], "qkv": QKV}),
        ("Starcoder2Config", _KV, {"ffn": ["mlp.c_proj"], "attn": ["self_attn.o_proj"], "attn_res": ["self_attn"]}),
        ("CohereConfig", _KV, {"ffn": ["mlp.down_proj"], "attn": ["self_attn.o_proj"], "res": [""], "attn_res": []}),
        ("Glm4Config", {**_KV, "head_dim": 8}, {"ffn": ["mlp.down_proj"], "attn_res": ["self_attn"]}),
        ("Olmo2Config", _KV, {"ffn": ["mlp.down_proj"], "attn_res": ["self_attn"], "res": [""]}),
        (
            "DeepseekV3Config",
            {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "first_k_dense_replace": 2},
            {"ffn": ["mlp.down_proj"], "qkv": ["self_attn.q_b_proj", "self_attn.kv_b_proj"]},
        ),
        ("GptOssConfig", {**_KV, "head_dim": 8, "num_local_experts": 4}, {"ffn": ["mlp"], "qkv": QKV}),
        ("AlbertConfig", {"embedding_size": 16}, {"ffn": ["ffn_output"], "attn": ["attention.dense"], "res": [""]}),
        ("MPNetConfig", {}, {"ffn": ["output.dense"], "attn": ["attention.attn.o"], "res": ["output"]}),
        ("EsmConfig", {}, {"ffn": ["output.dense"], "attn": ["attention.output.dense"], "attn_res": ["attention"]}),
        ("FNetConfig", {}, {"ffn": ["output.dense"], "attn": [], "qkv": [], "res": ["output"]}),
        ("MambaConfig", {}, {"ffn": [], "attn": ["mixer.out_proj"], "qkv": [], "res": []}),
        ("DeiTConfig", {}, {"ffn": ["mlp.fc2"], "attn": ["attention.o_proj"], "attn_res": ["attention"]}),
        (
            "Wav2Vec2ConformerConfig",
            {},
            {
                "ffn": ["ffn1.output_dense", "ffn2.output_dense"],
                "attn": ["self_attn.linear_out"],
                "qkv": [f"self_attn.linear_{name}" for name in "qkv"],
            },
        ),
    ],
)
def test_layers_of_the_library(config: str, arguments: dict[str, Any], expected: dict[str, list[str]]) -> None:
    block = only(from_config(config, **{**_SMALL, **arguments}))
    assert {place: paths(block, place) for place in expected} == expected


def test_cross_attention() -> None:
    model = from_config(
        "BartConfig",
        vocab_size=64,
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    encoder, decoder = blocks_in(model)
    assert (encoder.kind, decoder.kind) == ("encoder", "decoder")
    assert paths(encoder, "attn") == ["self_attn.out_proj"]
    assert paths(decoder, "attn") == ["self_attn.out_proj", "encoder_attn.out_proj"]
    assert paths(decoder, "ffn") == ["fc2"]
    gpt2 = only(zoo.tiny("gpt2", add_cross_attention=True))
    assert paths(gpt2, "attn") == ["attn.c_proj", "crossattention.c_proj"]
    assert paths(gpt2, "attn_res") == ["attn"]


def test_hybrids_have_attention_or_a_mixer() -> None:
    model = from_config(
        "Qwen3_5TextConfig",
        **{**_SMALL, **_KV, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    )
    linear, full = blocks_in(model)
    assert paths(linear, "attn") == ["linear_attn.out_proj"]
    assert paths(linear, "qkv") == ["linear_attn.in_proj_qkv"]
    assert paths(full, "attn") == ["self_attn.o_proj"]
    both = only(from_config("FalconH1Config", **{**_SMALL, **_KV, "mamba_d_ssm": D, "mamba_n_heads": 4}))
    assert paths(both, "attn") == ["self_attn.o_proj"]


def test_a_mixture_beside_a_dense_ffn() -> None:
    model = from_config(
        "Gemma4TextConfig",
        **{**_SMALL, **_KV, "head_dim": 8, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        moe_intermediate_size=16,
    )
    assert [paths(block, "ffn") for block in blocks_in(model)] == [["mlp.down_proj", "experts"]] * 2


def test_stages_are_no_layers() -> None:
    blocks = blocks_in(from_config("Swinv2Config", image_size=32, embed_dim=16, depths=[2, 1], num_heads=[2, 2]))
    assert [(block.index, block.kind) for block in blocks] == [(0, "vision"), (1, "vision"), (0, "vision")]
    assert [block.sites[-1].width for block in blocks] == [16, 16, 32]
    for block in blocks:
        assert paths(block, "ffn") == ["output.dense"]
        assert paths(block, "qkv") == [f"attention.self.{name}" for name in ("query", "key", "value")]


def test_the_towers_of_a_model() -> None:
    tower: dict[str, Any] = {
        "hidden_size": D,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = from_config("CLIPConfig", text_config=tower, vision_config={**tower, "image_size": 8, "patch_size": 4})
    assert [(block.name, block.kind) for block in blocks_in(model)] == [
        ("text_model.encoder.layers.0", "text"),
        ("vision_model.encoder.layers.0", "vision"),
    ]


def test_a_shared_layer_comes_once() -> None:
    layer = nn.TransformerEncoderLayer(D, 4, INNER)
    model = nn.Module()
    model.layers = nn.ModuleList([layer, layer, copy.deepcopy(layer)])
    assert [block.name for block in blocks_in(model)] == ["layers.0", "layers.2"]


def test_convolutions_have_no_sites() -> None:
    assert blocks_in(from_config("ResNetConfig", depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8)) == []


# Modules of any make.


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)


class Attention(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Expert(nn.Module):
    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        self.w1 = nn.Linear(D, inner)
        self.w2 = nn.Linear(inner, D)
        self.w3 = nn.Linear(D, inner)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4)
        self.experts = nn.ModuleList([Expert() for _ in range(4)])
        self.shared_expert = Expert()


class Layer(nn.Module):
    """A pre-norm layer around an FFN of any make."""

    def __init__(self, ffn: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(D)
        self.mlp = ffn
        for name, module in others.items():
            self.add_module(name, module)


def sequential(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))


@pytest.mark.parametrize(
    ("ffn", "expected"),
    [
        (nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.Linear(INNER, D)), "mlp.2"),
        (nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D), nn.Dropout()), "mlp.3"),
        (sequential(D, 2 * D), None),
        (Expert(), "mlp.w2"),
        (Expert(inner=D), "mlp.w2"),
        (Mixture(), "mlp"),
    ],
)
def test_ffns(ffn: nn.Module, expected: str | None) -> None:
    block = only(Stack(Layer(ffn), Layer(copy.deepcopy(ffn))))
    assert paths(block, "ffn") == ([] if expected is None else [expected])
    assert (paths(block, "attn"), paths(block, "qkv")) == (["attn.proj"], ["attn.qkv"])


@pytest.mark.parametrize("told_by", ["attention", "config"])
def test_the_width_of_a_mixture_beside_norms_of_another(told_by: str) -> None:
    layer = Layer(Mixture())
    layer.norm1 = layer.norm2 = nn.LayerNorm(4 * D)
    if told_by == "config":
        del layer.attn
    model = Stack(layer)
    model.config = transformers.LlamaConfig(hidden_size=D)
    (block,) = blocks_in(model)
    assert {site.width for site in block.sites if site.place in ("ffn", "res")} == {D}


def test_what_is_beside_the_sublayers() -> None:
    modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
    layer = Layer(
        Expert(),
        adaLN_modulation=modulation,
        adapter=sequential(D, 4, D),
        relative_position_bias_mlp=sequential(2, 64, 4),
        time_embedding=sequential(D, INNER, D),
    )
    assert all_paths(only(Stack(layer))) == {
        "attn_res": ["attn"],
        "qkv": ["attn.qkv"],
        "attn": ["attn.proj"],
        "ffn": ["mlp.w2"],
        "res": [""],
    }


class Plain(nn.Module):
    """A layer whose projections are its own children."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.ln2 = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, inner)
        self.fc2 = nn.Linear(inner, D)


@pytest.mark.parametrize("inner", [INNER, D])
def test_a_layer_without_sublayers(inner: int) -> None:
    assert all_paths(only(Stack(Plain(inner)))) == {"qkv": ["qkv"], "attn": ["proj"], "ffn": ["fc2"], "res": [""]}


def test_torch_layers() -> None:
    encoder, decoder = blocks_in(nn.Transformer(D, 4, 1, 1, D, batch_first=True))
    assert paths(encoder, "attn") == ["self_attn"]
    assert paths(decoder, "attn") == ["self_attn", "multihead_attn"]
    for block in (encoder, decoder):
        assert paths(block, "ffn") == ["linear2"]
        assert paths(block, "qkv") == []
        assert all(site.of_tuple for site in block.sites if site.place == "attn")


def test_projections_that_are_not_called() -> None:
    """WavLM hands the weights of its projections to torch's function."""
    layers = {**_SMALL, "num_feat_extract_layers": 1, "conv_dim": [8], "conv_stride": [2], "conv_kernel": [2]}
    block = blocks_in(from_config("WavLMConfig", **layers, num_conv_pos_embedding_groups=2))[0]
    assert (paths(block, "attn"), paths(block, "qkv")) == (["attention"], [])
    assert paths(block, "ffn") == ["feed_forward.output_dense"]


def test_lists_of_sublayers() -> None:
    """A layer that is a list is not called: no module gives its stream. A list of sublayers in turn has no layers."""
    ffn = sequential(D, INNER, D)
    nested = only(Stack(nn.ModuleList([Attention(), ffn])))
    assert all_paths(nested) == {"qkv": ["0.qkv"], "attn": ["0.proj"], "ffn": ["1.1"]}
    flat = blocks_in(Stack(*(copy.deepcopy(module) for _ in range(2) for module in (Attention(), Expert()))))
    assert [paths(block, "ffn") for block in flat] == [[], ["w2"], [], ["w2"]]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("key", "query", "value"):
            self.add_module(name, nn.Linear(D, D // 2, bias=False))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(), Head()])
        self.proj = nn.Linear(D, D)


def test_an_attention_of_single_heads() -> None:
    layer = Layer(sequential(D, INNER, D))
    layer.add_module("attn", MultiHead())
    model = nn.Module()
    model.transformer = nn.ModuleDict({"h": nn.ModuleList([layer]), "ln_f": nn.LayerNorm(D)})
    block = only(model)
    assert (block.name, block.stack, block.list_key) == ("transformer.h.0", "transformer", "h")
    assert paths(block, "attn") == ["attn.proj"]
    assert paths(block, "qkv") == [f"attn.heads.{i}.{name}" for i in range(2) for name in ("key", "query", "value")]
    assert paths(block, "ffn") == ["mlp.1"]


def test_a_model_that_is_a_list() -> None:
    blocks = blocks_in(nn.Sequential(Layer(Expert()), Layer(Expert())))
    assert [(block.name, block.stack, block.list_key, block.index) for block in blocks] == [
        ("0", "", "", 0),
        ("1", "", "", 1),
    ]


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    plain = blocks_in(zoo.tiny("llama"))
    model = peft.get_peft_model(zoo.tiny("llama"), peft.LoraConfig(target_modules="all-linear"))
    assert [block.sites for block in blocks_in(model)] == [block.sites for block in plain]


def test_it_is_quick() -> None:
    with torch.device("meta"):
        model = transformers.LlamaModel(transformers.LlamaConfig(**{**_SMALL, "num_hidden_layers": 32}))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(blocks_in(model)) == 32
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
