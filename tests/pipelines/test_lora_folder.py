"""Folder of a LoRA: which of them have a workflow of ComfyUI."""

import numpy as np
import pytest

from gadjax.formats.comfyui import WORKFLOW
from gadjax.formats.lora_extract import Difference, LayerError
from gadjax.formats.lora_writer import KEYS, Pair
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines import lora_folder, parity
from gadjax.pipelines.extract_lora import Extract, lora_export


@pytest.mark.parametrize("keys", KEYS)
def test_a_workflow_is_made_for_comfyuis_keys_alone(keys, tiny_pipeline, tmp_path, monkeypatch):
    folder, made = open_folder(tiny_pipeline), []
    pair, error = Pair(np.ones((1, 2)), np.ones((2, 1))), LayerError("a", 1.0, 0.5, 0.0)
    difference = Difference({"a": pair}, [error], {})
    lora = lora_export(Extract(folder, folder, difference, SamplingConfig(2, None, 1.0, 8)), "x")

    def workflow(*args, **options):
        made.append(options)
        return {"model": {"class_type": "UNETLoader", "inputs": {}}}

    monkeypatch.setattr(lora_folder, "workflow", workflow)
    monkeypatch.setattr(parity, "missing", lambda lora: ["torch"])
    lora_folder.write_lora_folder(tmp_path / "out", lora, keys=keys)
    assert len(made) == (keys == "comfyui")
    assert (tmp_path / "out" / WORKFLOW).exists() == (keys == "comfyui")
