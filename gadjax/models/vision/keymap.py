"""Key maps of vision transformers: parameter paths to the keys of transformers' files."""

from gadjax.models.keymap import KeyMap
from gadjax.models.vision.config import VisionConfig

# In CLIP's and SigLIP's files of a model of both towers: what is not the vision tower's.
_OTHER_TOWER = (
    r"^text_model\.",
    r"^text_projection\.",
    r"^logit_(scale|bias)$",
    r"embeddings\.position_ids$",  # the integers 0, 1, ... in older files
)
_TWO_TOWERS = (
    (r"^class_token$", "embeddings/class_embedding"),
    (r"^patch/", "embeddings/patch_embedding/"),
    (r"^positions$", "embeddings/position_embedding/weight"),
    (r"^pre_norm/", "pre_layrnorm/"),  # transformers' spelling
    (r"^blocks/", "encoder/layers/#/"),
    (r"^norm/", "post_layernorm/"),
    (r"/norm([12])/", r"/layer_norm\1/"),
    (r"/attention/([qkv]|out)/", r"/self_attn/\1_proj/"),
    (r"/mlp/up/", "/mlp/fc1/"),
    (r"/mlp/down/", "/mlp/fc2/"),
    (r"^head/in_proj/kernel$", "head/attention/in_proj_weight"),
    (r"^head/in_proj/bias$", "head/attention/in_proj_bias"),
    (r"^head/out_proj/", "head/attention/out_proj/"),
    (r"^head/norm/", "head/layernorm/"),
    (r"^head/fc", "head/mlp/fc"),
    (r"^projection/", "visual_projection/"),
    (r"^(?!visual_projection/)", "vision_model/"),
)
_DINOV2 = (
    (r"^class_token$", "embeddings/cls_token"),
    (r"^registers$", "embeddings/register_tokens"),
    (r"^patch/", "embeddings/patch_embeddings/projection/"),
    (r"^positions$", "embeddings/position_embeddings"),
    (r"^blocks/", "encoder/layer/#/"),
    (r"^norm/", "layernorm/"),
    (r"/attention/q/", "/attention/attention/query/"),
    (r"/attention/k/", "/attention/attention/key/"),
    (r"/attention/v/", "/attention/attention/value/"),
    (r"/attention/out/", "/attention/output/dense/"),
    (r"/(layer_scale[12])$", r"/\1/lambda1"),
)
_DINOV3 = (
    (r"^class_token$", "embeddings/cls_token"),
    (r"^registers$", "embeddings/register_tokens"),
    (r"^patch/", "embeddings/patch_embeddings/"),
    (r"^blocks/", "layer/#/"),
    (r"/attention/([qkv])/", r"/attention/\1_proj/"),
    (r"/attention/out/", "/attention/o_proj/"),
    (r"/mlp/(up|down|gate)/", r"/mlp/\1_proj/"),
    (r"/(layer_scale[12])$", r"/\1/lambda1"),
)
_MASK = (r"^embeddings\.mask_token$",)  # of training with masked patches


def vision_keymap(config: VisionConfig) -> KeyMap:
    """Key map of a vision transformer with these options."""
    if config.kind in ("clip", "siglip"):
        ignored = _OTHER_TOWER
        if not config.projection:
            ignored += (r"^visual_projection\.",)
        return KeyMap(
            renames=_TWO_TOWERS,
            ignored=ignored,
            # transformers 5 writes the vision models without the prefix.
            aliases=(
                (r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)", "vision_model."),
            ),
        )
    if config.kind == "dinov3":
        return KeyMap(renames=_DINOV3, ignored=_MASK)
    up, down = ("weights_in", "weights_out") if config.gate else ("fc1", "fc2")
    mlp = ((r"/mlp/up/", f"/mlp/{up}/"), (r"/mlp/down/", f"/mlp/{down}/"))
    return KeyMap(renames=_DINOV2 + mlp, ignored=_MASK)
