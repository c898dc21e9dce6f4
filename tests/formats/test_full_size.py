"""Conversion of a folder of PixArt-XL's size and back, with the process's peak memory."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from programs import run_python
from published import PUBLISHED

from gadjax.formats.orbax_folder import abstract_component
from gadjax.formats.state_dict import expected_shapes
from gadjax.formats.weights import fingerprint, open_weights, write_weights

MEASURED = """
import resource, sys
from gadjax.cli.main import main
import gadjax.cli.convert, gadjax.formats.orbax_folder, orbax.checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
assert main(["convert", *sys.argv[1:]]) == 0
print(before, peak())
"""


def convert(src, dst):
    """Peak bytes beyond those of the program itself."""
    done = run_python("-c", MEASURED, src, dst, JAX_PLATFORMS="cpu")
    before, peak = map(int, done.stdout.split()[-2:])
    return peak - before


@pytest.mark.slow
def test_conversion_needs_at_most_twice_the_file_size(tiny_pipeline, tmp_path):
    # The other parts stay small: the autoencoder and a text encoder of the width that is expected.
    folder = shutil.copytree(tiny_pipeline, tmp_path / "full")
    config = dict(PUBLISHED["PixArt-XL-2-512x512"]["transformer/config.json"])
    config["caption_channels"] = 20
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    part = abstract_component(
        folder, "transformer", {"transformer": ["diffusers", config["_class_name"]]}
    )
    rng = np.random.default_rng(0)

    def tensors():
        for key, (_, _, shape) in expected_shapes(part.abstract, part.keymap).items():
            yield key, rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    write_weights(folder / "transformer", "diffusion_pytorch_model", list(tensors()))
    size = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))
    assert size > 1.2e9
    gadjax_folder, back = tmp_path / "own", tmp_path / "back"
    for src, dst in ((folder, gadjax_folder), (gadjax_folder, back)):
        used = convert(src, dst)
        print(f"{src.name} to {dst.name}: {used / size:.2f} of the file's {size / 1e9:.2f} GB")
        assert used <= 2 * size
    marks = [fingerprint(open_weights(path / "transformer")) for path in (folder, back)]
    assert marks[0] == marks[1]
