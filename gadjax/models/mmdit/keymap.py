"""MMDiT parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap
from gadjax.models.mmdit.config import Config

# Of a block with two streams.
STREAMS = (
    (r"/attn_context/to_([qkv])/", r"/attn/add_\1_proj/"),
    (r"/attn_context/to_out/", "/attn/to_add_out/"),
    (r"/attn_context/norm_([qk])/", r"/attn/norm_added_\1/"),
    (r"/to_out/", "/to_out/0/"),
    (r"/(ff|ff_context)/linear_1/", r"/\1/net/0/proj/"),
    (r"/(ff|ff_context)/linear_2/", r"/\1/net/2/"),
)


def keymap(config: Config) -> KeyMap:
    """Key map of a configuration: the file numbers both stacks and the last block in one list."""
    return KeyMap(
        renames=(
            (r"^dual_blocks/", "transformer_blocks/#/"),
            (r"^blocks/", f"transformer_blocks/#+{config.dual_layers}/"),
            (r"^last_block/", f"transformer_blocks/{config.num_layers - 1}/"),
            *STREAMS,
        ),
    )
