"""The names that identify the parts of a layer if its structure leaves it open."""

from __future__ import annotations

import functools
import re

__all__ = [
    "ATTENTION",
    "FFN",
    "MIXER",
    "READ_BEFORE",
    "RETURN_TUPLES",
    "SKIP",
    "is_between",
    "is_down",
    "is_experts",
    "is_mixture",
    "is_norm",
    "is_norm_of_heads",
    "is_other",
    "is_output",
    "is_output_by_order",
    "is_qkv",
    "is_router",
    "is_wrapped",
    "kind_by_path",
    "label_of",
    "leaf_label",
    "name_of",
    "serves_alone",
    "stands_for_norm",
]

# The role of a layer's part. A mixer takes attention's place: a state space, a recurrence, a short convolution.
ATTENTION, MIXER, FFN, SKIP = "attention", "mixer", "ffn", "skip"

# Parts whose linear layers add nothing to the stream directly, by their attribute's name.
_SKIPPED = re.compile(
    r"norm|modulation$|ada_?ln|adapter|lora|embed(?!\w*_mlp$)|pooler|pooling|router|indexer|quantiz|classif|predict"
    r"|rel_?pos|pos_(bias|emb|enc|mlp|proj|\w*proj)|linear_pos|position_?(bias|enc|emb|mlp)|relative|rotary|rope"
    r"|bias_mlp|cpb|time_?(step|_emb|_proj)|per_layer|laurel|altup|bottleneck"
    r"|down_?sample|up_?sample|_heads?$|^heads?$|compress"
)
_NEVER = re.compile(
    r"^(?!norm_attn_norm$).*norm|modulation|_bias|hyper_?connection"
)  # of attention or not; except DBRX's half
_CONVOLUTION = re.compile(r"^l?conv(\d?d|_module|_layer|olution\w*)?$")
_SKIPPED_CLASS = re.compile(
    r"Ada\w*Norm|Adapter|Router|Modulation|RelPos|PositionBias|Indexer|ConvModule|ConvolutionModule"
)
_MIXERS = re.compile(r"mamba|ssm|delta_?net|short_?conv|recurrent|lstm|rg_?lru|linear_attn|time_?mix|retention|hyena")
_MIXER_CLASS = re.compile(
    r"Mamba|SSM|DeltaNet|DeltaAttention|ShortConv|RecurrentBlock|RgLru|LinearAttention|LightningAttention"
    r"|TimeMix|Retention|Hyena|RWKV\w*Att|S4|KimiDelta"
)
_ATTENTIONS = re.compile(r"attn|attention|(^|_)att($|_)|(^|_)attend")
_ATTENTION_CLASS = re.compile(r"Attention|Attn|MultiHead|MHA$|AttLayer")
_FFNS = re.compile(r"mlp|ffn|ffw|feed_?forward|^ff(\d+|_\w+)?$|^ff$|intermediate|(^|_)inter$|experts?($|_)|moe|glu$")
_FFN_CLASS = re.compile(
    r"MLP|Mlp|FFN|Ffn|Feed_?[Ff]orward|FFW|FFLayer|LayerFF|Intermediate|GLU|GatedUnit|MoE(?!\w*Attention)|ChannelMix"
)
_FFN_LEAF = re.compile(
    r"(c_)?fc_?\d?(_\w+)?|fc_(in|out)|lin(ear)?_?\d|linear_fc\d|pw(conv|lin)_?\d|(gate|up|down|gate_up|up_gate)_proj"
    r"|proj_(up|down|mlp|up_gate)|w_?[0123]|wi(_\d)?|dense\d|dense_h_to_4h|dense_4h_to_h|ff\w*|mlp\w*|intermediate\w*"
    r"|layer_[12]|up|down"
)
_DOWN = re.compile(
    r"(c_)?fc_?2|fc_out|lin(ear)?_?2|linear_fc2|pw(conv|lin)_?2|down_proj|proj_down|w_?2|wo|dense_?2|dense_4h_to_h"
    r"|c_proj|out_proj|o_proj|proj_out|output(_\w+)?|ff\w*_output|w_?out|layer_2|down|\w*_down|out"
)
_MIXTURE_CLASS = re.compile(r"(M[oO][eE]|SparseMLP|M[oO][eE](Block|Layer|Mlp|MLP|FeedForward)|MixtureOfExperts)\d*$")
_MODALITIES = (
    ("vision", re.compile(r"vision|visual|image|video|pixel|(^|[._])vit([._]|$)|sam_|qformer")),
    ("audio", re.compile(r"audio|speech|acoustic|wav2vec|hubert|whisper|codec")),
    ("text", re.compile(r"text|language|llm|(^|[._])lm([._]|$)")),
)

_QKV_WORDS = frozenset(
    [
        "q",
        "k",
        "v",
        "qkv",
        "kv",
        "qk",
        "query",
        "key",
        "value",
        "queries",
        "keys",
        "values",
        "wq",
        "wk",
        "wv",
        "wqkv",
        "wkv",
        "qkvz",
        "receptance",
        "pack",
    ]
)
_ALONE = {"key": frozenset(["k", "key", "keys", "wk"]), "value": frozenset(["v", "value", "values", "wv"])}
_QKV_NAMES = frozenset(("c_attn", "att_proj", "attn_in", "in_proj"))
_NO_PROJECTION = frozenset(
    [
        "a",
        "pos",
        "position",
        "rel",
        "relative",
        "r",
        "gate",
        "norm",
        "beta",
        "dt",
        "rope",
        "bias",
        "lora",
        "mem",
        "index",
        "weights",
        "offsets",
        "conv",
    ]
)
_OUTPUT_WORDS = frozenset(["o", "out", "output", "wo", "post"])
_OUTPUT_NAMES = frozenset(("dense", "proj", "c_proj", "projection", "merge", "final", "fc", "attn_proj", "proj_out"))
_PASSED = frozenset(("linear", "dense", "lin", "layer", "base_layer", "fn", "fc", "_orig_mod", "module"))


@functools.lru_cache(maxsize=4096)
def label_of(name: str, kind: str) -> str:
    """The role of a part, by its attribute's name, else by its class's; empty if neither shows it."""
    lower = name.lower()
    if (
        (_SKIPPED.search(lower) and not _ATTENTIONS.search(lower))
        or _NEVER.search(lower)
        or _SKIPPED_CLASS.search(kind)
    ):
        return SKIP
    for label, pattern in ((MIXER, _MIXERS), (ATTENTION, _ATTENTIONS), (FFN, _FFNS)):
        if pattern.search(lower):
            return label
    for label, pattern in ((MIXER, _MIXER_CLASS), (SKIP, _CONVOLUTION), (ATTENTION, _ATTENTION_CLASS)):
        if pattern.search(lower if label == SKIP else kind):
            return label
    return FFN if _FFN_CLASS.search(kind) else ""


@functools.lru_cache(maxsize=4096)
def leaf_label(name: str) -> str:
    """The role of a linear layer outside these parts."""
    if _FFN_LEAF.fullmatch(name.lower()):
        return FFN
    if is_qkv(name) or name in ("o_proj", "out_proj", "out_lin", "to_out", "attn_proj", "attn_out"):
        return ATTENTION
    return ""


@functools.lru_cache(maxsize=4096)
def _words(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name))


def is_between(name: str) -> bool:
    """Whether a linear layer's own name is meaningless, so that its parent's is used."""
    return name.isdigit() or name in _PASSED


def is_wrapped(name: str) -> bool:
    """Whether a linear layer has the name of a wrapped one."""
    return re.fullmatch(r"_?(inner|wrapped|original|orig|base)(_(module|layer|linear|fn))?", name) is not None


def is_qkv(name: str, mixer: bool = False) -> bool:
    """Whether a linear layer gives an attention's queries, keys or values."""
    words = _words(name)
    if words & (_NO_PROJECTION - {"gate"} if "q" in words else _NO_PROJECTION) or words & {"output", "intermediate"}:
        return False
    return bool(words & _QKV_WORDS) or (name.lower() in _QKV_NAMES and not mixer)


def name_of(path: str) -> str:
    """The last meaningful name on the path of a linear layer."""
    parts = path.split(".")
    return parts[-2] if len(parts) > 1 and is_between(parts[-1]) else parts[-1]


def serves_alone(path: str, what: str) -> bool:
    """Whether one of the linear layers of `is_qkv` gives only an attention's `"key"` or `"value"`."""
    words = _words(name_of(path)) & _QKV_WORDS
    return bool(words) and words <= _ALONE[what]


def is_output(name: str) -> bool:
    """Whether a linear layer of an attention is its output projection, whatever follows it."""
    words = _words(name)
    return bool(words & _OUTPUT_WORDS) and not words & _NO_PROJECTION


def is_output_by_order(name: str) -> bool:
    """Whether a linear layer may be the output projection of an attention without a plainer name."""
    return name in _OUTPUT_NAMES


def is_other(name: str) -> bool:
    """Whether a linear layer of an attention has another role: a gate, a position, a first low-rank factor."""
    return bool(_words(name) & _NO_PROJECTION)


def is_down(name: str) -> bool:
    """Whether a linear layer has the name of an FFN's last projection."""
    return _DOWN.fullmatch(name.lower()) is not None


def is_norm(kind: str) -> bool:
    """Whether a class has the name of a norm."""
    return (
        re.search(r"Norm(?!\w*(Attention|Layer|Block|Output|Embeddings|Intermediate|Encoder|Model|Head))", kind)
        is not None
    )


def stands_for_norm(name: str, kind: str) -> bool:
    """Whether a part that is no plain norm takes a norm's place."""
    return re.search(r"Ada\w*Norm", kind) is not None or (
        kind == "Identity" and re.search(r"norm|^ln(_|\d|$)", name.lower()) is not None
    )


def is_norm_of_heads(name: str) -> bool:
    """Whether a norm in an attention is that of its queries or keys."""
    return bool(_words(name) & (_QKV_WORDS | {"head", "heads"}))


def is_experts(name: str, kind: str) -> bool:
    """Whether a part contains all the experts of a mixture."""
    return (re.fullmatch(r"(\w+_)?experts", name) is not None and "shared" not in name) or kind.endswith("Experts")


def is_router(name: str) -> bool:
    """Whether a part chooses among experts."""
    return re.search(r"rout|^gate$|^gating", name.lower()) is not None


def is_mixture(kind: str) -> bool:
    """Whether a class has the name of a mixture of experts."""
    return _MIXTURE_CLASS.search(kind) is not None


# Attentions with an inaccessible stream: the layer, or a class of its own, has read it by then.
READ_BEFORE = ("crossattention", "norm_attn_norm")


# Linear layers that return a bias or a scale next to their output.
RETURN_TUPLES = ("ColumnParallelLinear", "RowParallelLinear")


def kind_by_path(path: str) -> str:
    """The input of a stack, by the names on its path, innermost first; empty if they do not show it."""
    for part in reversed(path.lower().split(".")):
        for kind, pattern in _MODALITIES:
            if pattern.search(part):
                return kind
    return ""
