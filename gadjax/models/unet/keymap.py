"""U-Net parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap

KEYMAP = KeyMap(
    renames=(
        (r"/transformer_blocks/", "/transformer_blocks/#/"),
        (r"/to_out/", "/to_out/0/"),
        (r"/ff/linear_1/", "/ff/net/0/proj/"),
        (r"/ff/linear_2/", "/ff/net/2/"),
        # Separate names, because a kernel of 1x1xCxC is sharded along other axes than one of CxC.
        (r"/proj_(in|out)_1x1/", r"/proj_\1/"),
    ),
)
