"""Preprocessing, bit for bit against transformers' image processors in Pillow."""

import json

import numpy as np
import pytest
import torch
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from gadjax.errors import InputError
from gadjax.features.preprocessing import (
    CLIP,
    IMAGENET,
    RECIPES,
    Recipe,
    read_recipe,
    recipe_from_dict,
)

DINOV2 = {"size": {"shortest_edge": 256}, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]}
PROCESSORS = {
    "CLIP": CLIPImageProcessorPil(),
    "CLIP, 336": CLIPImageProcessorPil(size=336, crop_size=336),
    "DINOv2": BitImageProcessorPil(**DINOV2),
    "DINOv2, odd crop": BitImageProcessorPil(**DINOV2, crop_size={"height": 223, "width": 199}),
    "SigLIP": SiglipImageProcessorPil(),
    "SigLIP 2": SiglipImageProcessorPil(resample=2, size={"height": 256, "width": 256}),
    "no crop, no scale": CLIPImageProcessorPil(do_center_crop=False, do_rescale=False),
}


def picture(height, width, seed=0):
    """Picture with smooth parts, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = 127 + 90 * np.sin(x / 9 + y / 13)[..., None] * [1, 0.5, -1]
    image[height // 3 :, width // 2 :] = rng.integers(0, 256, 3)
    image += rng.normal(0, 20, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(512, 512), (301, 477), (517, 263), (61, 80)])
def test_every_bit_is_that_of_the_processor(name, size, tmp_path):
    processor, image = PROCESSORS[name], picture(*size)
    processor.save_pretrained(tmp_path)
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    prepared = read_recipe(tmp_path)(image)
    assert prepared.dtype == np.float32 and prepared.shape == expected.shape
    assert (prepared == expected).all()


@pytest.mark.parametrize("size", [(512, 512), (301, 477), (61, 80)])
def test_dinov3_is_resized_in_floats(size):
    """Its processor needs torchvision, so its formula is written here, in float64: torch's weights
    of float32 are 1e-5 from it, a thousandth of a level."""
    cfg = {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    cfg |= {"size": {"height": 224, "width": 192}, "do_center_crop": None}
    image = picture(*size)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    x = torch.nn.functional.interpolate(
        x, size=(224, 192), mode="bilinear", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(values).double().reshape(1, 3, 1, 1) for values in IMAGENET)
    expected = ((x - mean) / std)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(recipe_from_dict(cfg)(image), expected, atol=3e-6)


def test_named_recipes_and_their_text(tmp_path):
    assert read_recipe(tmp_path, "dgm") is RECIPES["dgm"]
    image = picture(64, 96)
    squashed = RECIPES["dgm"](image)
    assert squashed.shape == (224, 224, 3)
    assert str(RECIPES["dgm"]) == (
        "dgm; to 224 x 224, bicubic; mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )
    clip = recipe_from_dict({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224})
    assert clip == Recipe("CLIPImageProcessor", 224, None, 3, (224, 224), 1 / 255, *CLIP)
    assert "shorter side to 224, bicubic; centre 224 x 224" in str(clip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type: found 'ViT"),
        ({"image_processor_type": 3}, "image_processor_type: found 3"),
        ({"size": {"longest_edge": 3}}, "size: found"),
        ({"size": 10**9}, "size: found 1000000000"),
        ({"crop_size": {"height": 300, "width": 20}}, "crop_size: found"),
        ({"resample": 9}, "resample: found 9"),
        ({"image_mean": [0, 1]}, "image_mean: found"),
        ({"image_std": [0, 1, 1]}, "image_std: found"),
        ({"rescale_factor": float("nan")}, "rescale_factor: found nan"),
        ({"do_resize": "yes"}, "do_resize: found 'yes'"),
        ({"do_pad": True}, "do_pad: found True"),
    ],
)
def test_refusals(change, message, tmp_path):
    cfg = {"image_processor_type": "CLIPImageProcessor"} | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path)
    with pytest.raises(InputError, match="recipe: found 'mine'; expected one of dgm"):
        read_recipe(tmp_path, "mine")
