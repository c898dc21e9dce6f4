"""Options of vision transformers, read from the config.json of transformers' classes.

CLIP (Radford et al., arXiv:2103.00020), DINOv2 (arXiv:2304.07193; registers arXiv:2309.16588),
DINOv3 (arXiv:2508.10104), SigLIP and SigLIP 2 (arXiv:2303.15343, 2502.14786).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gadjax.errors import InputError
from gadjax.models.config import (
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    is_positive,
    refuse,
)

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new", "silu")
# Far above what is published, and below what would take minutes to trace.
MAX_OPTION, MAX_LAYERS = 1 << 16, 256

# model_type -> kind of the network, and the defaults of its configuration class in transformers.
_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP = _TOWER | {"projection_dim": 512}
_SIGLIP = _TOWER | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
_DINOV2 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
_DINOV3 = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 16,
    "image_size": 224,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
    "num_register_tokens": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", _CLIP),
    "clip_vision_model": ("clip", _CLIP),
    "siglip": ("siglip", _SIGLIP),
    "siglip_vision_model": ("siglip", _SIGLIP),
    "dinov2": ("dinov2", _DINOV2),
    "dinov2_with_registers": (
        "dinov2",
        _DINOV2 | {"patch_size": 16, "num_register_tokens": 4},
    ),
    "dinov3_vit": ("dinov3", _DINOV3),
}
# Options of these classes that are not read, with the reason.
_TRAINING, _BACKBONE = "of training only", "of the class that returns feature maps"
IGNORED = {
    "attention_dropout": _TRAINING,
    "attention_probs_dropout_prob": _TRAINING,
    "hidden_dropout_prob": _TRAINING,
    "drop_path_rate": _TRAINING,
    "initializer_range": _TRAINING,
    "initializer_factor": _TRAINING,
    "layerscale_value": "of initialisation",
    "logit_scale_init_value": "of initialisation",
    "pos_embed_shift": _TRAINING,
    "pos_embed_jitter": _TRAINING,
    "pos_embed_rescale": _TRAINING,
    "use_mask_token": "masked patches are of training only",
    "apply_layernorm": _BACKBONE,
    "reshape_hidden_states": _BACKBONE,
    "_out_features": _BACKBONE,
    "_out_indices": _BACKBONE,
}


@dataclass(frozen=True)
class VisionConfig:
    """Options of a vision transformer that change its output.

    Attributes:
      kind: clip, siglip, dinov2 or dinov3.
      width, layers, heads, hidden: sizes of the blocks; hidden is the MLP's.
      patch, image_size: in pixels; image_size is that of the table of positions.
      eps: of the layer norms.
      activation: of the MLP, a name in ACTIVATIONS.
      gate: "" for none, "fused" for DINOv2's SwiGLU, "split" for DINOv3's gated MLP.
      registers: register tokens behind the class token.
      biases: of the query, key, value and output projections, and of the MLP.
      theta: base of the rotary positions (DINOv3).
      projection: width of CLIP's projected vector; None where the folder has no projection.
      head: whether SigLIP's pooling head is present.
      register_table: DINOv2 with registers, whose table of positions is resized with antialias.
    """

    kind: str
    width: int
    layers: int
    heads: int
    hidden: int
    patch: int
    image_size: int
    eps: float
    activation: str
    gate: str = ""
    registers: int = 0
    biases: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True)
    theta: float = 100.0
    projection: int | None = None
    head: bool = False
    register_table: bool = False

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the vectors that the network gives, the usual one first."""
        if self.kind == "clip":
            return ("projected", "pooled", "raw") if self.projection else ("pooled", "raw")
        return ("pooled",) if self.kind != "siglip" or self.head else ()

    @property
    def outputs(self) -> int:
        """Width of the usual vector."""
        return self.projection or self.width


def read_vision_config(cfg: Mapping[str, Any]) -> VisionConfig:
    """Options of a config.json, of a vision model or of a model of pictures and texts.

    Raises: InputError naming the key of an unsupported value, and for another `model_type`.
    """
    kind, options = _options(cfg)
    heads, width = options["num_attention_heads"], options["hidden_size"]
    if width % heads:
        refuse("num_attention_heads", heads, f"a divisor of hidden_size {width}")
    if kind == "dinov3" and width // heads % 4:
        refuse("num_attention_heads", heads, "heads of a multiple of 4 channels, for RoPE")
    hidden, gate = options.get("intermediate_size"), ""
    if kind == "dinov2":
        hidden = width * options["mlp_ratio"]
        if options["use_swiglu_ffn"]:
            hidden, gate = (int(hidden * 2 / 3) + 7) // 8 * 8, "fused"
    elif options.get("use_gated_mlp"):
        gate = "split"
    names = [f"{part}_bias" for part in ("query", "key", "value", "proj", "mlp")]
    qkv = options.get("qkv_bias", True)
    defaults = (qkv, qkv, qkv, True, True)
    # Either the classes with a projection, or the vision tower of a model that has one.
    projected = "clip" in (cfg.get("model_type"), kind) and (
        cfg.get("model_type") == "clip"
        or cfg.get("architectures") == ["CLIPVisionModelWithProjection"]
    )
    return VisionConfig(
        kind,
        width,
        options["num_hidden_layers"],
        heads,
        hidden,
        options["patch_size"],
        options["image_size"],
        float(options["layer_norm_eps"]),
        options["hidden_act"],
        gate,
        options.get("num_register_tokens", 0),
        tuple(options.get(n, value) for n, value in zip(names, defaults, strict=True)),
        float(options.get("rope_theta", 100.0)),
        options["projection_dim"] if projected else None,
        bool(options.get("vision_use_head")),
        cfg.get("model_type") == "dinov2_with_registers",
    )


def tower(cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options of one tower ("vision" or "text") of a model of both.

    Older files repeat them as NAME_config_dict, which wins, as in transformers.
    Raises: InputError where either is no JSON object.
    """
    merged: dict[str, Any] = {}
    for key in (f"{name}_config", f"{name}_config_dict"):
        part = cfg.get(key)
        if part is not None and not isinstance(part, dict):
            refuse(key, part, "a JSON object")
        merged |= part or {}
    return merged


def _options(cfg: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind of the network, and its options with transformers' defaults. Raises: InputError."""
    model_type = cfg.get("model_type")
    if model_type == "siglip2":
        raise InputError(
            "model_type: found 'siglip2' (NaFlex, of pictures of any shape); expected a SigLIP 2 "
            "of one size, whose model_type is 'siglip'"
        )
    if not isinstance(model_type, str) or model_type not in KINDS:
        refuse("model_type", model_type, f"one of {', '.join(KINDS)}")
    kind, defaults = KINDS[model_type]
    values = dict(cfg)
    if model_type in ("clip", "siglip"):
        values = tower(cfg, "vision")
        if model_type == "clip":  # its towers repeat it, and the model's counts
            values["projection_dim"] = cfg.get("projection_dim", defaults["projection_dim"])
    options = {key: values.get(key, default) for key, default in defaults.items()}
    if (channels := values.get("num_channels", 3)) != 3:
        refuse("num_channels", channels, "3")
    for key, value in options.items():
        default = defaults[key]
        if key == "hidden_act":
            valid, expected = value in ACTIVATIONS, " or ".join(ACTIVATIONS)
        elif isinstance(default, bool):
            valid, expected = type(value) is bool, "true or false"
        elif isinstance(default, float):
            valid, expected = is_positive(value, float, int) and value < 1e9, POSITIVE_NUMBER
        elif key == "num_register_tokens":
            valid = type(value) is int and 0 <= value <= MAX_OPTION
            expected = "0 or a positive integer"
        else:
            if key in ("image_size", "patch_size") and _is_square(value):
                options[key] = value = value[0]
            most = MAX_LAYERS if key == "num_hidden_layers" else MAX_OPTION
            valid, expected = is_positive(value, int) and value <= most, POSITIVE_INTEGER
        if not valid:
            refuse(key, value, expected)
    if options["patch_size"] > options["image_size"]:
        refuse("patch_size", options["patch_size"], f"at most image_size {options['image_size']}")
    return kind, options


def _is_square(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] == value[1]
