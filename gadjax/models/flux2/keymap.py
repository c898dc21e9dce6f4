"""FLUX.2-klein's parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap

KEYMAP = KeyMap(
    renames=(
        (r"^double_blocks/", "transformer_blocks/#/"),
        (r"^single_blocks/", "single_transformer_blocks/#/"),
        (r"/attn_context/to_([qkv])/", r"/attn/add_\1_proj/"),
        (r"/attn_context/to_out/", "/attn/to_add_out/"),
        (r"/attn_context/norm_([qk])/", r"/attn/norm_added_\1/"),
        (r"^(transformer_blocks/.*)/to_out/", r"\1/to_out/0/"),
    )
)
