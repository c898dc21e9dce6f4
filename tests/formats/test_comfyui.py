"""Pipelines without a workflow of ComfyUI; those with one: tests/training/test_export_single.py."""

from types import SimpleNamespace

import pytest

from gadjax.formats.comfyui import WRITTEN, workflow
from gadjax.formats.pipeline_classes import PIPELINES
from gadjax.formats.sampling_config import SamplingConfig


@pytest.mark.parametrize("kind", sorted(set(PIPELINES) - set(WRITTEN)))
def test_a_pipeline_whose_nodes_are_not_known_has_no_workflow(kind):
    """Not one with the text encoders' loader of another family."""
    folder = SimpleNamespace(model_index={"_class_name": kind})
    assert workflow(folder, SamplingConfig(steps=2, timesteps=(1000.0, 500.0))) is None
