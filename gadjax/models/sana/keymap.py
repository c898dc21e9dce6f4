"""Sana parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap

KEYMAP = KeyMap(
    renames=(
        (r"^blocks/", "transformer_blocks/#/"),
        (r"/to_out/", "/to_out/0/"),
        (r"^patch_embed/", "patch_embed/proj/"),
    ),
)
