"""Sharding rules of the U-Net's parameters over the mesh axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

# Reason why a "sequence" axis cannot split the positions of a sample.
NO_SEQUENCE_SHARDING = "whose convolutions and group norms have a sample's positions on one device"

# Every width of the published networks is a multiple of 64. With a "tensor" axis of 2, conv1 and
# the projections after norms are sharded along their outputs, conv2 and the projections back to the
# residual stream along their inputs.
RULES: tuple[tuple[str, P], ...] = (
    (r"/transformer_blocks/.*/(to_q|to_k|to_v|linear_1)/kernel$", P(None, "fsdp", "tensor")),
    (r"/transformer_blocks/.*/(to_out|linear_2)/kernel$", P(None, "tensor", "fsdp")),
    # Ten layers of them are 102,400 elements.
    (r"/transformer_blocks/ff/linear_1/bias$", P(None, "fsdp")),
    (r"/proj_in/kernel$", P("fsdp", "tensor")),
    (r"/proj_out/kernel$", P("tensor", "fsdp")),
    (r"/proj_in_1x1/kernel$", P(None, None, "fsdp", "tensor")),
    (r"/proj_out_1x1/kernel$", P(None, None, "tensor", "fsdp")),
    (r"/resnets/\d+/(conv1|conv_shortcut)/kernel$", P(None, None, "fsdp", "tensor")),
    (r"/resnets/\d+/conv2/kernel$", P(None, None, "tensor", "fsdp")),
    (r"/resnets/\d+/time_emb_proj/kernel$", P("fsdp", "tensor")),
    (r"/(down|up)samplers/0/conv/kernel$", P(None, None, "tensor", "fsdp")),
    (r"^(time|add)_embedding/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^(time|add)_embedding/linear_2/kernel$", P("tensor", "fsdp")),
    # The other side of these two is a handful of latent channels.
    (r"^conv_in/kernel$", P(None, None, None, "fsdp")),
    (r"^conv_out/kernel$", P(None, None, "fsdp", None)),
)
