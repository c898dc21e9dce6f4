"""The autoencoder's fingerprint changes with everything that changes a latent."""

import shutil

import safetensors.numpy
from checkpoints import edit

from gadjax.formats.fingerprints import image_fingerprint
from gadjax.formats.orbax_folder import open_folder


def read_fingerprint(folder):
    return image_fingerprint(open_folder(folder, components=("vae",)).components["vae"])


def test_fingerprint_depends_on_weights_and_scale_only(tiny_pipeline, tmp_path):
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    first = read_fingerprint(tiny_pipeline)
    edit(copy / "vae" / "config.json", sample_size=32)
    edit(copy / "scheduler" / "scheduler_config.json", beta_end=0.01)
    assert read_fingerprint(copy) == first and len(first) == 32
    edit(copy / "vae" / "config.json", scaling_factor=0.13025)
    scaled = read_fingerprint(copy)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["encoder.conv_in.bias"][-1] += 1e-3
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    assert len({first, scaled, read_fingerprint(copy)}) == 3
