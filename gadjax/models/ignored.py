"""Ignored keys of diffusers and transformers configurations and weights, each with its reason.

Every other key of a configuration is used, or refused if its value asks for something else. A key
that the class in diffusers or transformers does not have is ignored by that class too: of a network
it is refused here, of a text encoder named in a warning. Tokenizer files are read by transformers;
what its callers decide is in gadjax.models.text. tests/models/test_ignored.py compares these lists
with the signatures of the classes.
"""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

log = logging.getLogger(__name__)

_TRAINING = "of training only"
_NO_HEAD = "of a head that an encoder does not have"
_GENERATION = "of text generation, which an encoder does not do"
_OUTPUT = "the form of a call's output"
_FILE = "about the file"
_FLOAT32 = "softmax is float32 in any case"
_CLIPPING = "read only if samples are clipped or thresholded, which is refused"

_TRANSFORMERS = {
    "attention_dropout": _TRAINING,
    "classifier_dropout": _TRAINING,
    "dropout": _TRAINING,
    "dropout_rate": _TRAINING,
    "initializer_factor": _TRAINING,
    "initializer_range": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "problem_type": _TRAINING,
    "id2label": _NO_HEAD,
    "label2id": _NO_HEAD,
    "num_labels": _NO_HEAD,
    "is_encoder_decoder": _GENERATION,
    "bos_token_id": _GENERATION,
    "pad_token_id": "read from the tokenizer's files",
    "use_cache": _GENERATION,
    "cache_implementation": _GENERATION,
    "task_specific_params": _GENERATION,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "return_dict": _OUTPUT,
    "output_past": _OUTPUT,
    "chunk_size_feed_forward": "does not change the result",
    "torchscript": "does not change the result",
    "dtype": "tensors have the files' dtype, --dtype decides",
    "torch_dtype": "tensors have the files' dtype, --dtype decides",
    "_name_or_path": _FILE,
    "transformers_version": _FILE,
    "architectures": "model_index.json names the class",
    "model_type": "model_index.json names the class",
}
_CLIP = _TRANSFORMERS | {
    "tie_word_embeddings": _NO_HEAD,
    "pooled_output_dim": "of another model that shared the file",
}
_T5 = _TRANSFORMERS | {
    "eos_token_id": "read from the tokenizer's files",
    "decoder_start_token_id": _GENERATION,
    "num_decoder_layers": _GENERATION,
    "n_positions": "positions are relative",
    "scale_decoder_outputs": _GENERATION,
    "tie_encoder_decoder": _GENERATION,
    "tie_word_embeddings": "both spellings of the embedding are compared in any case",
}
_GEMMA = _TRANSFORMERS | {
    "eos_token_id": "read from the tokenizer's files",
    "final_logit_softcapping": _NO_HEAD,
    "max_position_embeddings": "positions are rotations (RoPE) of any length",
    "tie_word_embeddings": _NO_HEAD,
}
_WINDOW = "of sliding windows, which are refused"
_QWEN3 = _GEMMA | {"sliding_window": _WINDOW, "max_window_layers": _WINDOW}
_QWEN3.pop("final_logit_softcapping")
_PIXART = {
    "norm_num_groups": "there is no group norm",
    "num_embeds_ada_norm": "there is no table of classes",
    "upcast_attention": _FLOAT32,
    "use_linear_projection": "of images without patches",
}
_THRESHOLDS = {"dynamic_thresholding_ratio": _CLIPPING, "sample_max_value": _CLIPPING}
_CLIPPED = _THRESHOLDS | {"clip_sample_range": _CLIPPING}
_DYNAMIC = "of dynamic shifting, which is refused"
_DYNAMIC_SHIFTING = dict.fromkeys(
    ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
    _DYNAMIC,
)

# Class -> key -> reason.
IGNORED: dict[str, dict[str, str]] = {
    "UNet2DConditionModel": {
        "upcast_attention": _FLOAT32,
        "addition_embed_type_num_heads": "of an embedding of another type than text_time",
    },
    "PixArtTransformer2DModel": _PIXART,
    "Transformer2DModel": _PIXART,
    "SanaTransformer2DModel": {},
    "SD3Transformer2DModel": {},
    "ZImageTransformer2DModel": {},
    "Lumina2Transformer2DModel": {"scaling_factor": "the class does not use it"},
    "FluxTransformer2DModel": {},
    "Flux2Transformer2DModel": {},
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": _T5,
    "Gemma2Model": _GEMMA,
    "Qwen3Model": _QWEN3,
    "Qwen3ForCausalLM": _QWEN3,
    "AutoencoderKL": {
        "sample_size": "of tiling, which is an argument of a call",
        "force_upcast": "of float16, in which gadjax does not compute",
    },
    "AutoencoderDC": {},
    "AutoencoderKLFlux2": {"sample_size": "of tiling", "batch_norm_momentum": _TRAINING},
    "DPMSolverMultistepScheduler": _THRESHOLDS
    | {
        "lower_order_final": "the last step is of order 1 in any case, as it ends at sigma 0",
        "euler_at_final": "the last step is of order 1 in any case, as it ends at sigma 0",
        "solver_type": "of order 2",
        "time_shift_type": _DYNAMIC,
        "flow_shift": "of a flow",
    },
    "DDIMScheduler": _CLIPPED,
    "EulerDiscreteScheduler": {
        "sigma_min": "of other spacings, which are refused",
        "sigma_max": "of other spacings, which are refused",
    },
    "FlowMatchEulerDiscreteScheduler": _DYNAMIC_SHIFTING,
    "FlowMatchLCMScheduler": _DYNAMIC_SHIFTING
    | {"upscale_mode": "of scale_factors, which are refused"},
    "PNDMScheduler": {},
    "LCMScheduler": _CLIPPED
    | {
        "set_alpha_to_one": "no step ends before time 0",
        "steps_offset": "times are those of original_inference_steps",
        "timestep_spacing": "times are those of original_inference_steps",
    },
    "SCMScheduler": {
        "sigma_data": "the pipeline divides by it what it multiplied by it",
        "num_train_timesteps": "times are angles",
    },
}

# Class -> regex of a tensor's key -> reason.
IGNORED_TENSORS: dict[str, dict[str, str]] = {
    "CLIPTextModel": {
        r"^(text_model\.)?embeddings\.position_ids$": "the integers 0, 1, ... in older files"
    },
    "Qwen3ForCausalLM": {r"^lm_head\.weight$": _NO_HEAD},
    "AutoencoderKLFlux2": {r"^bn\.num_batches_tracked$": "a count of training's batches"},
}


@functools.lru_cache(maxsize=64)
def _warn(class_name: str, keys: tuple[str, ...]) -> None:
    """Warn once in a process, since a command reads a configuration more than once."""
    log.warning("config.json: %s: no options of %s; they are not read", ", ".join(keys), class_name)


def warn_unknown_keys(class_name: str, config: Mapping[str, Any], used: Iterable[str]) -> None:
    """Warn of keys of a text encoder's config that are neither used nor IGNORED, nor null.

    Args:
      class_name: a key of IGNORED.
      config: content of the config.json.
      used: the keys that are read.
    """
    known = {*used, *IGNORED[class_name]}
    keys = [key for key, value in config.items() if value is not None and key not in known]
    if keys := [key for key in keys if not key.startswith("_")]:
        _warn(class_name, tuple(sorted(keys)))
