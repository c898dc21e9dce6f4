"""Workflows of ComfyUI for families that are not drawn in tests/training/test_export_single.py."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from gadjax.formats.comfyui import WRITTEN, workflow
from gadjax.formats.lora_writer import usage_hint
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.pipeline_classes import PIPELINES
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.single_file import modelspec

STUDENT = SamplingConfig(2, (1000.0, 500.0))


def made(folders, family, sampling, **files):
    return workflow(open_folder(folders(family), components=()), sampling, **files)


# Family -> loader of its text encoders and its type, and the scale that its network is told.
LOADERS = {
    "flux_dev": ("DualCLIPLoader", "flux", 3.5),
    "flux_schnell": ("DualCLIPLoader", "flux", None),
    "z_image": ("CLIPLoader", "lumina2", None),
}


@pytest.mark.parametrize("family", LOADERS)
def test_the_nodes_of_a_family(folders, family):
    loader, text, scale = LOADERS[family]
    nodes = made(folders, family, replace(STUDENT, guidance=scale or 1.0), lora="a.safetensors")
    links = [x for n in nodes.values() for x in n["inputs"].values() if isinstance(x, list)]
    assert {name for name, _ in links} == nodes.keys() - {"save"}
    assert nodes["clip"]["class_type"] == loader and nodes["clip"]["inputs"]["type"] == text
    assert nodes["latent"]["class_type"] == "EmptySD3LatentImage"  # of 16 channels
    assert nodes["sigmas"]["inputs"]["sigmas"] == "1.00000000, 0.50000000, 0.00000000"
    told = nodes["guider"]["inputs"]["conditioning"]
    if scale is None:
        assert told == ["prompt", 0] and "guidance" not in nodes
        return
    assert told == ["guidance", 0] and nodes["guidance"]["inputs"]["guidance"] == scale
    assert nodes["guidance"]["inputs"]["conditioning"] == ["prompt", 0]


def test_there_is_none_for_classifier_free_guidance(folders):
    assert made(folders, "z_image", replace(STUDENT, guidance=4.5)) is None


def test_headers_name_the_model_and_an_embedded_guidance(folders):
    told = replace(STUDENT, guidance=3.5)
    names = {"flux_dev": "flux-1-dev", "flux_schnell": "flux-1-schnell", "z_image": None}
    for family, name in names.items():
        folder = open_folder(folders(family), components=())
        texts = modelspec(folder, "x", told, "unknown", "/lora")
        assert texts.get("modelspec.architecture") == (name and f"{name}/lora")
    assert usage_hint(told) == "2 steps from timesteps 1000, 500, guidance 3.5"
    assert "without guidance" in usage_hint(replace(STUDENT, guidance=1.0))


@pytest.mark.parametrize("kind", sorted(set(PIPELINES) - set(WRITTEN)))
def test_a_pipeline_whose_nodes_are_not_known_has_no_workflow(kind):
    """Not one with the text encoders' loader of another family."""
    folder = SimpleNamespace(model_index={"_class_name": kind})
    assert workflow(folder, SamplingConfig(steps=2, timesteps=(1000.0, 500.0))) is None
