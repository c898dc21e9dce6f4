"""Lumina 2's parameter paths, which are Z-Image's, under diffusers' keys."""

from gadjax.models.keymap import KeyMap

KEYMAP = KeyMap(
    renames=(
        (r"^context_refiner/attention_norm1/", "context_refiner/#/norm1/"),
        (r"^(layers|noise_refiner)/attention_norm1/", r"\1/#/norm1/norm/"),
        (r"^(layers|noise_refiner)/adaLN_modulation/", r"\1/#/norm1/linear/"),
        (r"^(layers|noise_refiner|context_refiner)/(?!#)", r"\1/#/"),
        (r"/attention_norm2/", "/norm2/"),
        (r"/to_out/", "/to_out/0/"),
        (r"/ff/w([123])/", r"/feed_forward/linear_\1/"),
        (r"^t_embedder/", "time_caption_embed/timestep_embedder/"),
        (r"^cap_embedder/", "time_caption_embed/caption_embedder/"),
        (r"^final_layer/adaLN_modulation/", "norm_out/linear_1/"),
        (r"^final_layer/linear/", "norm_out/linear_2/"),
    ),
)
