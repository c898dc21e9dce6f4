"""LoRA files of diffusers, PEFT, kohya and ComfyUI: weights as in diffusers, or a refusal."""

import json
import re

import families
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.lora_file import parse_lora_flag, read_lora
from gadjax.formats.lora_info import lora_lines
from gadjax.formats.lora_names import layers_of
from gadjax.formats.state_dict import tensors_from_params
from gadjax.pipelines.adapted import merge_loras

peft = pytest.importorskip("peft")
RANK = 3


def backbone_of(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


@pytest.fixture(scope="module")
def pipelines(folders):
    made = {}

    def get(family):
        if family not in made:
            made[family] = read_pipeline(folders(family))
        return made[family]

    return get


@pytest.fixture
def network(pipelines):
    """Factors of some modules of SD1.5's U-Net, of different ranks, in torch's layout."""
    folder = pipelines("sd15")
    layers, rng = layers_of(folder.components["unet"]), np.random.default_rng(0)
    chosen = sorted(layers)[::9]
    assert any(len(layers[name].shape) == 4 for name in chosen)
    factors = {}
    for i, name in enumerate(chosen):
        shape, rank = layers[name].shape, 2 + i % 3
        a = rng.normal(size=(rank, *shape[1:])).astype(np.float32)
        b = rng.normal(size=(shape[0], rank, *(1 for _ in shape[2:]))).astype(np.float32)
        factors[name] = torch.from_numpy(a), torch.from_numpy(b)
    return folder, factors


def write(path, tensors, metadata=None):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def differences(folder, path, weight=1.0):
    """What a file changes of every tensor of the backbone, in torch's layout."""
    part = folder.components[folder.backbone]
    merged, _ = merge_loras(
        folder, {n: p.params for n, p in folder.components.items()}, [(path, weight)]
    )
    after = dict(tensors_from_params(merged[folder.backbone], part.keymap))
    before = dict(tensors_from_params(part.params, part.keymap))
    return {
        key.removesuffix(".weight"): after[key] - before[key]
        for key in before
        if not np.array_equal(after[key], before[key])
    }


def product(a, b, scale=1.0):
    a, b = a.numpy(), b.numpy()
    whole = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    return scale * whole.reshape(len(b), *a.shape[1:])


def check(found, factors, scales):
    assert found.keys() == factors.keys()
    for name, (a, b) in factors.items():
        expected = product(a, b, scales[name] if isinstance(scales, dict) else scales)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5, err_msg=name)


def kohya(name):
    return f"lora_unet_{name.replace('.', '_')}"


def old(name):
    return re.sub(r"\.(to_\w+?)(\.0)?$", r".processor.\1_lora", name)


SPELLINGS = {
    "diffusers": lambda n: (f"unet.{n}.lora_A.weight", f"unet.{n}.lora_B.weight"),
    "peft": lambda n: (
        f"base_model.model.{n}.lora_A.default.weight",
        f"base_model.model.{n}.lora_B.default.weight",
    ),
    "bare": lambda n: (f"{n}.lora_A.weight", f"{n}.lora_B.weight"),
    "middle": lambda n: (f"unet.{n}.lora.down.weight", f"unet.{n}.lora.up.weight"),
    "old": lambda n: (
        (f"unet.{old(n)}.down.weight", f"unet.{old(n)}.up.weight")
        if ".attn" in n
        else (f"unet.{n}.lora.down.weight", f"unet.{n}.lora.up.weight")
    ),
    "kohya": lambda n: (f"{kohya(n)}.lora_down.weight", f"{kohya(n)}.lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_lora(network, spelling, tmp_path):
    folder, factors = network
    tensors = {}
    for name, pair in factors.items():
        tensors |= dict(zip(SPELLINGS[spelling](name), pair, strict=True))
    path = write(tmp_path / "a.safetensors", tensors)
    check(differences(folder, path), factors, 1.0)
    check(differences(folder, path, -0.5), factors, -0.5)
    half = {key: value.bfloat16() for key, value in tensors.items()}
    found = differences(folder, write(tmp_path / "b.safetensors", half))
    rounded = {n: tuple(x.bfloat16().float() for x in pair) for n, pair in factors.items()}
    check(found, rounded, 1.0)


def test_each_module_has_its_own_alpha(network, tmp_path):
    """Some alphas are left out: those modules have a scale of 1, not the others' alpha."""
    folder, factors = network
    tensors, scales = {}, {}
    for i, (name, (a, b)) in enumerate(factors.items()):
        tensors |= dict(zip(SPELLINGS["kohya"](name), (a, b), strict=True))
        scales[name] = 1.0
        if i % 2:
            tensors[f"{kohya(name)}.alpha"] = torch.tensor(float(i))
            scales[name] = i / len(a)
    check(differences(folder, write(tmp_path / "a.safetensors", tensors)), factors, scales)


def test_alphas_of_the_metadata(network, tmp_path):
    folder, factors = network
    tensors = {}
    for name, pair in factors.items():
        tensors |= dict(zip(SPELLINGS["diffusers"](name), pair, strict=True))
    first = next(iter(factors))
    for rslora in (False, True):
        settings = {
            "unet.r": 2,
            "unet.lora_alpha": 6,
            "unet.alpha_pattern": {first: 9},
            "unet.use_rslora": rslora,
        }
        path = write(
            tmp_path / f"{rslora}.safetensors",
            tensors,
            {"format": "pt", "lora_adapter_metadata": json.dumps(settings)},
        )
        scales = {
            name: (9 if name == first else 6) / (len(a) ** (0.5 if rslora else 1))
            for name, (a, _) in factors.items()
        }
        check(differences(folder, path), factors, scales)


def test_1x1_convolutions_as_matrices(network, tmp_path):
    folder, factors = network
    layers = layers_of(folder.components["unet"])
    name = next(n for n, layer in layers.items() if n.endswith("proj_in"))
    a, b = torch.randn(2, layers[name].shape[1]), torch.randn(layers[name].shape[0], 2)
    path = write(
        tmp_path / "a.safetensors", dict(zip(SPELLINGS["kohya"](name), (a, b), strict=True))
    )
    (found,) = differences(folder, path).values()
    np.testing.assert_allclose(found[..., 0, 0], product(a, b), atol=1e-5)


# Family -> (original name, modules of diffusers, whether halves are swapped).
ORIGINAL = {
    "sdxl": [
        ("input_blocks.0.0", ("conv_in",), False),
        ("label_emb.0.2", ("add_embedding.linear_2",), False),
        ("input_blocks.1.0.in_layers.2", ("down_blocks.0.resnets.0.conv1",), False),
        ("input_blocks.2.0.op", ("down_blocks.0.downsamplers.0.conv",), False),
        (
            "input_blocks.3.1.transformer_blocks.1.attn2.to_k",
            ("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",),
            False,
        ),
        ("middle_block.2.out_layers.3", ("mid_block.resnets.1.conv2",), False),
        ("middle_block.1.proj_in", ("mid_block.attentions.0.proj_in",), False),
        ("output_blocks.1.2.conv", ("up_blocks.0.upsamplers.0.conv",), False),
        ("output_blocks.3.0.skip_connection", ("up_blocks.1.resnets.1.conv_shortcut",), False),
    ],
    "sd35": [
        (
            "joint_blocks.1.x_block.attn.qkv",
            tuple(f"transformer_blocks.1.attn.to_{x}" for x in "qkv"),
            False,
        ),
        (
            "joint_blocks.0.x_block.attn2.qkv",
            tuple(f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"),
            False,
        ),
        (
            "joint_blocks.2.context_block.attn.qkv",
            tuple(f"transformer_blocks.2.attn.add_{x}_proj" for x in "qkv"),
            False,
        ),
        (
            "joint_blocks.0.context_block.mlp.fc1",
            ("transformer_blocks.0.ff_context.net.0.proj",),
            False,
        ),
        (
            "joint_blocks.2.context_block.adaLN_modulation.1",
            ("transformer_blocks.2.norm1_context.linear",),
            True,
        ),
        (
            "joint_blocks.1.context_block.adaLN_modulation.1",
            ("transformer_blocks.1.norm1_context.linear",),
            False,
        ),
        ("final_layer.adaLN_modulation.1", ("norm_out.linear",), True),
        ("x_embedder.proj", ("pos_embed.proj",), False),
    ],
    "z_image": [
        (
            "layers.1.attention.qkv",
            tuple(f"layers.1.attention.to_{x}" for x in "qkv"),
            False,
        ),
        ("noise_refiner.0.attention.out", ("noise_refiner.0.attention.to_out.0",), False),
        ("context_refiner.0.feed_forward.w3", ("context_refiner.0.feed_forward.w3",), False),
        ("x_embedder", ("all_x_embedder.2-1",), False),
        ("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",), False),
        ("t_embedder.mlp.2", ("t_embedder.mlp.2",), False),
    ],
    "flux2_klein": [
        (
            "double_blocks.1.txt_attn.qkv",
            tuple(f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"),
            False,
        ),
        ("double_blocks.0.img_mlp.0", ("transformer_blocks.0.ff.linear_in",), False),
        ("single_blocks.1.linear1", ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",), False),
        ("single_blocks.0.linear2", ("single_transformer_blocks.0.attn.to_out",), False),
        ("single_stream_modulation.lin", ("single_stream_modulation.linear",), False),
        ("final_layer.adaLN_modulation.1", ("norm_out.linear",), True),
    ],
    "flux_dev": [
        (
            "double_blocks.1.img_attn.qkv",
            tuple(f"transformer_blocks.1.attn.to_{x}" for x in "qkv"),
            False,
        ),
        (
            "double_blocks.0.txt_attn.qkv",
            tuple(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"),
            False,
        ),
        (
            "single_blocks.1.linear1",
            tuple(
                f"single_transformer_blocks.1.{x}"
                for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            ),
            False,
        ),
        ("single_blocks.0.linear2", ("single_transformer_blocks.0.proj_out",), False),
        ("final_layer.adaLN_modulation.1", ("norm_out.linear",), True),
        ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",), False),
    ],
}


@pytest.mark.parametrize("family", ORIGINAL)
def test_names_of_the_original_releases(pipelines, family, tmp_path):
    folder = pipelines(family)
    part = folder.components[folder.backbone]
    layers = layers_of(part)
    # Every module has an original name, and no two have the same.
    table = part.family.original(layers.keys(), part.spec)
    named = [module for entry in table.values() for module in entry.modules]
    assert sorted(named) == sorted(layers)
    for name, modules, swapped in ORIGINAL[family]:
        shapes = [layers[module].shape for module in modules]
        a = torch.randn(2, *shapes[0][1:])
        b = torch.randn(sum(s[0] for s in shapes), 2, *(1 for _ in shapes[0][2:]))
        whole = product(a, b)
        whole = np.concatenate(np.split(whole, 2)[::-1]) if swapped else whole
        rows = np.split(whole, np.cumsum([s[0] for s in shapes])[:-1])
        for down, up, prefix, flat in (
            ("lora_A", "lora_B", "diffusion_model.", False),
            ("lora_A.default", "lora_B.default", "base_model.model.", False),
            ("lora_A", "lora_B", "", False),
            ("lora_down", "lora_up", "lora_unet_", True),
        ):
            stem = prefix + (name.replace(".", "_") if flat else name)
            tensors = {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
            found = differences(folder, write(tmp_path / "a.safetensors", tensors))
            assert found.keys() == set(modules)
            for module, expected in zip(modules, rows, strict=True):
                np.testing.assert_allclose(found[module], expected, atol=1e-5, err_msg=module)


def test_pixarts_original_names(tiny_pipeline, tmp_path):
    folder = read_pipeline(tiny_pipeline)
    part = folder.components["transformer"]
    layers = layers_of(part)
    table = part.family.original(layers.keys(), part.spec)
    assert sorted(m for entry in table.values() for m in entry.modules) == sorted(layers)
    a, b = torch.randn(2, 24), torch.randn(48, 2)
    stem = "diffusion_model.blocks.1.cross_attn.kv_linear"
    path = write(
        tmp_path / "a.safetensors", {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    )
    found = differences(folder, path)
    whole = product(a, b)
    np.testing.assert_allclose(found["transformer_blocks.1.attn2.to_k"], whole[:24], atol=1e-5)
    np.testing.assert_allclose(found["transformer_blocks.1.attn2.to_v"], whole[24:], atol=1e-5)


XLABS = {  # of a block -> what it stands for in diffusers
    "double_blocks.1.processor.qkv_lora1": 3,
    "double_blocks.1.processor.proj_lora1": 1,
    "double_blocks.0.processor.qkv_lora2": 3,
    "double_blocks.1.processor.proj_lora2": 1,
    "single_blocks.1.processor.qkv_lora": 3,
    "single_blocks.0.processor.proj_lora": None,  # of attention and MLP
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_names_of_xlabs(pipelines, folders, prefix, tmp_path):
    """Weights as diffusers' own conversion and fusion of the file."""
    folder = pipelines("flux_dev")
    width = layers_of(folder.components["transformer"])["transformer_blocks.0.attn.to_q"].shape[0]
    mlp = layers_of(folder.components["transformer"])["single_transformer_blocks.0.proj_mlp"]
    torch.manual_seed(0)
    tensors = {}
    for i, (stem, thirds) in enumerate(XLABS.items()):
        inputs = width if thirds else width + mlp.shape[0]
        tensors[f"{prefix}{stem}.down.weight"] = torch.randn(2 + i % 2, inputs) / 8
        tensors[f"{prefix}{stem}.up.weight"] = torch.randn((thirds or 1) * width, 2 + i % 2) / 8
    path = write(tmp_path / "a.safetensors", tensors)
    pipe = DiffusionPipeline.from_pretrained(folders("flux_dev"))
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    expected = {k: after[k] - v for k, v in before.items() if not torch.equal(after[k], v)}
    found = differences(folder, path)
    assert found.keys() == {key.removesuffix(".weight") for key in expected} and len(found) == 12
    for module, change in found.items():
        np.testing.assert_allclose(
            change, expected[f"{module}.weight"], rtol=0, atol=1e-6, err_msg=module
        )
    assert f"keys: x-labs: {len(XLABS)}" in lora_lines(path)
    assert f"networks: FLUX: {len(XLABS)}" in lora_lines(path)


@pytest.mark.parametrize(
    "change,message",
    [
        ("double_blocks.0.processor.qkv_lora3", "found 2 of 4 tensors that belong to no module"),
        ("double_blocks.7.processor.qkv_lora1", "found 2 of 4 tensors that belong to no module"),
        ("double_blocks.1.img_attn.qkv.lora", "found two adapters of transformer_blocks.1.attn.to"),
    ],
)
def test_tensors_of_xlabs_that_are_nowhere(pipelines, change, message, tmp_path):
    folder, stem = pipelines("flux_dev"), "double_blocks.1.processor.qkv_lora1"
    width = layers_of(folder.components["transformer"])["transformer_blocks.0.attn.to_q"].shape[0]
    a, b = torch.randn(2, width), torch.randn(3 * width, 2)
    tensors = {}
    for name in (stem, change):
        tensors |= {f"{name}.down.weight": a.clone(), f"{name}.up.weight": b.clone()}
    with pytest.raises(InputError, match=message):
        read_lora(write(tmp_path / "a.safetensors", tensors), folder)


TEXTS = {  # spelling of a module of a text encoder -> family, network, module
    "lora_te3_encoder_block_1_layer_0_SelfAttention_q": (
        *("flux_dev", "text_encoder_2"),
        "encoder.block.1.layer.0.SelfAttention.q",
    ),
    "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora": (
        *("sd15", "text_encoder"),
        "encoder.layers.1.self_attn.out_proj",
    ),
}


@pytest.mark.parametrize("spelling", TEXTS)
def test_spellings_of_text_encoders(pipelines, spelling, tmp_path):
    family, network, module = TEXTS[spelling]
    folder = pipelines(family)
    layers = layers_of(folder.components[network])
    full = module if module in layers else f"text_model.{module}"
    down, up = ("down", "up") if spelling.endswith("_lora") else ("lora_down", "lora_up")
    a, b = torch.randn(2, layers[full].shape[1]), torch.randn(layers[full].shape[0], 2)
    tensors = {f"{spelling}.{down}.weight": a, f"{spelling}.{up}.weight": b}
    found = read_lora(write(tmp_path / "a.safetensors", tensors), folder).factors
    assert found.keys() == {network} and found[network].keys() == {full}
    np.testing.assert_array_equal(found[network][full].b, b)


KEYS = ("unet.mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in")
MODULE, KOHYA = KEYS
REFUSED = {
    "lora_magnitude_vector": (f"{MODULE}.lora_magnitude_vector", "found DoRA"),
    "dora_scale": (f"{KOHYA}.dora_scale", "found DoRA"),
    "loha": (f"{KOHYA}.hada_w1_a", "found LoHa"),
    "lokr": (f"{KOHYA}.lokr_w1", "found LoKr"),
    "tucker": (f"{KOHYA}.lora_mid.weight", "found a LoCon with a Tucker core"),
    "bias": (f"{MODULE}.lora_B.bias", "found a LoRA with biases"),
    "diff": (f"{KOHYA}.diff", "found whole differences of weights"),
    "unknown module": (
        "unet.mid_block.attentions.7.proj_in.lora_A.weight",
        "found 1 of 3 tensors that belong to no module of the pipeline",
    ),
    "unknown tensor": (f"{MODULE}.lora_C.weight", "belong to no module of the pipeline"),
    "two adapters": (f"{KOHYA}.lora_down.weight", "found only A of lora_unet_mid"),
    "a second name": (f"{MODULE}.lora_A.other.weight", "found two tensors A of unet.mid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(pipelines, case, tmp_path):
    key, message = REFUSED[case]
    a, b = torch.randn(2, 24, 1, 1), torch.randn(24, 2, 1, 1)
    tensors = {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b, key: torch.randn(2, 2)}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_lora(path, pipelines("sd15"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"A": torch.randn(2, 23, 1, 1)}, r"expected a product \(24, 24, 1, 1\)"),
        ({"B": torch.randn(23, 2, 1, 1)}, r"expected a product \(24, 24, 1, 1\)"),
        ({"A": torch.randn(2, 24, 3, 3)}, r"expected a product \(24, 24, 1, 1\)"),
        ({"B": torch.randn(24, 2, 3, 3)}, r"expected a product \(24, 24, 1, 1\)"),
        ({"B": torch.randn(24, 3, 1, 1)}, r"expected \[r, in\] and \[out, r\]"),
        ({"A": torch.randn(24)}, r"expected \[r, in\] and \[out, r\]"),
        ({"A": torch.full((2, 24, 1, 1), torch.nan)}, "found NaN or infinity in A"),
        ({"A": torch.ones(2, 24, 1, 1, dtype=torch.int32)}, "found A .* of int32; expected floats"),
        ({"B": None}, "found only A of .*; expected both A and B"),
        ({"alpha": torch.tensor(-1.0)}, "found alpha -1.0 of"),
        ({"alpha": torch.randn(2)}, "found alpha .* of"),
    ],
)
def test_factors_that_do_not_fit(pipelines, changes, message, tmp_path):
    parts = {"A": torch.randn(2, 24, 1, 1), "B": torch.randn(24, 2, 1, 1)} | changes
    names = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}
    tensors = {f"{KOHYA}.{names[k]}": v for k, v in parts.items() if v is not None}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InputError, match=message):
        read_lora(path, pipelines("sd15"))


@pytest.mark.parametrize(
    "metadata,message",
    [
        ("[]", "found metadata lora_adapter_metadata that is no JSON object"),
        ("{", "found metadata lora_adapter_metadata that is no JSON object"),
        ('{"unet.use_dora": true}', "found use_dora = True; expected False"),
        ('{"unet.bias": "all"}', "found bias = 'all'; expected 'none'"),
        ('{"unet.lora_alpha": "x"}', "found an alpha of 'x'"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "found alpha_pattern = 3"),
    ],
)
def test_bad_metadata(pipelines, metadata, message, tmp_path):
    tensors = {
        f"{MODULE}.lora_A.weight": torch.randn(2, 24),
        f"{MODULE}.lora_B.weight": torch.randn(24, 2),
    }
    path = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": metadata})
    with pytest.raises(InputError, match=re.escape(message)):
        read_lora(path, pipelines("sd15"))


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.125", ("a.safetensors", 0.125)),
        ("dir/a:b.safetensors:-1", ("dir/a:b.safetensors", -1.0)),
    ],
)
def test_weights_of_the_flag(text, expected):
    path, weight = parse_lora_flag(text)
    assert (str(path), weight) == expected


@pytest.mark.parametrize("text", ["a:x", "a:", ":1", "a:nan", "a:inf", "a:1e400"])
def test_bad_weights_of_the_flag(text):
    with pytest.raises(InputError, match="--lora: found .* expected FILE or FILE:WEIGHT"):
        parse_lora_flag(text)


LOADERS = [name for name in families.LOADERS if name != "sana_sprint"]


@pytest.mark.parametrize(
    "family",
    [n if n in ("sd15", "sana") else pytest.param(n, marks=pytest.mark.slow) for n in LOADERS],
)
def test_what_diffusers_saves_and_loads(folders, pipelines, family, tmp_path):
    """Random adapters of PEFT on the backbone, saved by diffusers with their metadata: each weight
    that they change, by as much."""
    pipe = DiffusionPipeline.from_pretrained(folders(family))
    name = backbone_of(pipe)
    leaves = r"(to_[qkv]|to_out\.0|conv1|proj|net\.2|conv_point|w[123])"
    blocks = r"(attn\d?|attention|ff|ff_context|feed_forward|resnets\.\d+)"
    targets = rf".*{blocks}\..*{leaves}"
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_rslora=True
    )
    backbone = getattr(pipe, name)
    backbone.add_adapter(config)
    arguments = {
        f"{name}_lora_layers": peft.utils.get_peft_model_state_dict(backbone),
        f"{name}_lora_adapter_metadata": backbone.peft_config["default"].to_dict(),
    }
    pipe.save_lora_weights(tmp_path, **arguments)
    expected = {
        key.removesuffix(".base_layer"): module.get_delta_weight("default").detach().numpy()
        for key, module in backbone.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = differences(pipelines(family), tmp_path)
    assert found.keys() == expected.keys() and len(expected) > 10
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5, err_msg=key)
