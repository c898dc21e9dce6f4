"""Z-Image parameter paths under diffusers' keys."""

from gadjax.models.keymap import KeyMap

KEYMAP = KeyMap(
    renames=(
        (r"^(layers|noise_refiner|context_refiner)/", r"\1/#/"),
        (r"/attn/", "/attention/"),
        (r"/to_out/", "/to_out/0/"),
        (r"/ff/", "/feed_forward/"),
        (r"^(layers|noise_refiner)/(.*)adaLN_modulation/", r"\1/\2adaLN_modulation/0/"),
        (r"^final_layer/adaLN_modulation/", "final_layer/adaLN_modulation/1/"),
        # The size of the patches, in space and in time, is part of the name.
        (r"^(x_embedder|final_layer)/", r"all_\1/2-1/"),
        (r"^t_embedder/linear_1/", "t_embedder/mlp/0/"),
        (r"^t_embedder/linear_2/", "t_embedder/mlp/2/"),
    ),
)
