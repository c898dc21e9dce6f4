"""PixArt parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap

KEYMAP = KeyMap(
    renames=(
        (r"^blocks/", "transformer_blocks/#/"),
        (r"/to_out/", "/to_out/0/"),
        (r"/ff/linear_1/", "/ff/net/0/proj/"),
        (r"/ff/linear_2/", "/ff/net/2/"),
    ),
)
