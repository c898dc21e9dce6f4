"""Which autoencoder a pipeline folder has, as a few digits."""

from dataclasses import asdict

import numpy as np

from gadjax.convert.files import fingerprint
from gadjax.convert.folder import Component
from gadjax.convert.tensors import tensors_from_params


def image_fingerprint(vae: Component) -> str:
    """32 hex digits for what turns a picture into a latent: config.json's values and the weights.

    Unlike `text_fingerprint` it reads all weights, which are few, and are needed anyway.
    """
    config = np.frombuffer(repr(asdict(vae.spec)).encode(), np.uint8)
    tensors = tensors_from_params(vae.params, vae.keymap)
    return fingerprint([("config.json", config), *tensors])
