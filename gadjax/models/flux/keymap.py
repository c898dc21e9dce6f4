"""FLUX.1's parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap
from gadjax.models.mmdit.keymap import STREAMS

KEYMAP = KeyMap(
    renames=(
        (r"^double_blocks/", "transformer_blocks/#/"),
        (r"^single_blocks/", "single_transformer_blocks/#/"),
        (r"^(single_transformer_blocks/#)/ff/", r"\1/"),
        *STREAMS,
    )
)
