"""Published repositories from their configurations alone: nothing downloaded, no parameters."""

import functools
import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh
from PIL import Image
from published import PUBLISHED, write_folder

from gadjax.errors import InputError
from gadjax.formats.orbax_folder import abstract_folder
from gadjax.formats.state_dict import expected_shapes
from gadjax.models.adapters import adapter_rules
from gadjax.models.registry import read_network
from gadjax.parallel.sharding import AXES, DISCRIMINATOR_RULES, path_name, shardings
from gadjax.pipelines.pipeline import abstract_pipeline
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.config import read_config
from gadjax.training.setup import prepare
from gadjax.training.steps import critic_step, student_step

# Tensors in the files, and numbers in them, of every part.
KL4, KL16, DC = (248, 83_653_863), (244, 83_819_683), (375, 312_250_275)
CLIP_L, CLIP_H = (196, 123_060_480), (372, 340_387_840)
CLIP_LP, BIG_G = (197, 123_650_304), (517, 694_659_840)
T5, GEMMA = (219, 4_762_310_656), (288, 2_614_341_888)
SD2 = {"unet": (686, 865_910_724), "text_encoder": CLIP_H, "vae": KL4}
SD3 = {"text_encoder": CLIP_LP, "text_encoder_2": BIG_G, "text_encoder_3": T5, "vae": KL16}
SANA = {"text_encoder": GEMMA, "vae": DC}
PIXART = {"text_encoder": T5, "vae": KL4}
Z_IMAGE = {
    "transformer": (521, 6_154_908_736),
    "text_encoder": (398, 4_022_468_096),
    "vae": KL16,
}
FLUX = {"text_encoder": CLIP_L, "text_encoder_2": T5, "vae": KL16}
KLEIN = {
    "transformer": (169, 3_875_544_576),
    "text_encoder": (398, 4_022_468_096),
    "vae": (250, 84_046_115 + 2 * 128),  # with the statistics of its batch norm
}
INVENTORY = {
    "stable-diffusion-v1-5": {"unet": (686, 859_520_964), "text_encoder": CLIP_L, "vae": KL4},
    "stable-diffusion-2-base": SD2,
    "stable-diffusion-2-1-base": SD2,
    "stable-diffusion-2-1": SD2,
    "stable-diffusion-xl-base-1.0": {
        "unet": (1680, 2_567_463_684),
        "text_encoder": CLIP_L,
        "text_encoder_2": BIG_G,
        "vae": KL4,
    },
    "PixArt-XL-2-512x512": PIXART | {"transformer": (603, 610_856_096)},
    "PixArt-XL-2-1024-MS": PIXART | {"transformer": (611, 611_349_152)},
    "PixArt-Sigma-XL-2-1024-MS": PIXART | {"transformer": (603, 610_856_096)},
    "Sana_600M_512px": SANA | {"transformer": (548, 591_747_872)},
    "Sana_1600M_512px": SANA | {"transformer": (396, 1_604_462_752)},
    "Sana_1600M_1024px": SANA | {"transformer": (396, 1_604_462_752)},
    "SANA1.5_1.6B_1024px": SANA | {"transformer": (476, 1_604_641_952)},
    "Sana_Sprint_0.6B_1024px": SANA | {"transformer": (664, 593_501_216)},
    "Sana_Sprint_1.6B_1024px": SANA | {"transformer": (480, 1_610_237_472)},
    "Lumina-Image-2.0": {
        "transformer": (459, 2_609_769_152),
        "text_encoder": GEMMA,
        "vae": KL16,
    },
    "Z-Image": Z_IMAGE,
    "Z-Image-Turbo": Z_IMAGE,
    # With the table of positions, which the files hold.
    "stable-diffusion-3-medium": SD3 | {"transformer": (683, 2_028_328_000 + 192**2 * 1536)},
    "stable-diffusion-3.5-medium": SD3 | {"transformer": (909, 2_243_171_520 + 384**2 * 1536)},
    # large-turbo too, which has the same configurations.
    "stable-diffusion-3.5-large": SD3 | {"transformer": (1227, 8_056_627_520 + 192**2 * 2432)},
    "FLUX.1-dev": FLUX | {"transformer": (1160, 11_901_408_320)},
    "FLUX.1-schnell": FLUX | {"transformer": (1156, 11_891_178_560)},
    "FLUX.2-klein-base-4B": KLEIN,
    "FLUX.2-klein-4B": KLEIN,
}


@pytest.fixture(scope="session")
def repositories(tmp_path_factory):
    """Folders of configurations by repository."""
    return functools.cache(lambda name: write_folder(name, tmp_path_factory.mktemp("published")))


@pytest.mark.parametrize("name", INVENTORY)
def test_every_tensor_is_accounted_for(repositories, name):
    folder = abstract_folder(repositories(name))
    found = {}
    for part in folder.components.values():
        shapes = [shape for *_, shape in expected_shapes(part.abstract, part.keymap).values()]
        found[part.name] = len(shapes), sum(map(math.prod, shapes))
    assert found == INVENTORY[name]


# Devices -> sizes of (data, fsdp, tensor, sequence).
MESHES = {
    8: (1, 8, 1, 1),
    16: (1, 8, 2, 1),
    64: (4, 16, 1, 1),
    256: (8, 32, 1, 1),
    512: (8, 32, 2, 1),
}
LARGE = 1 << 20
MAX_REPLICATED = 1 << 16  # of a parameter that every device may hold


@pytest.mark.parametrize("name", ["stable-diffusion-xl-base-1.0", "stable-diffusion-3.5-medium"])
def test_no_large_parameter_is_replicated_on_all_devices(repositories, name):
    check_sharded(abstract_folder(repositories(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", INVENTORY)
def test_no_large_parameter_of_any_repository_is_replicated(repositories, name):
    check_sharded(abstract_folder(repositories(name)))


def check_sharded(folder):
    for part in folder.components.values():
        for sizes in MESHES.values():
            mesh = AbstractMesh(sizes, AXES)
            placed = shardings(part.abstract, part.family.rules, mesh)
            leaves = jax.tree_util.tree_leaves_with_path(part.abstract)
            for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True):
                split = math.prod(mesh.shape[axis] for axis in sharding.spec if axis)
                if split == 1:
                    assert math.prod(leaf.shape) <= MAX_REPLICATED, (
                        part.name,
                        path_name(path),
                        sizes,
                    )
                if math.prod(leaf.shape) >= LARGE:
                    assert split >= sizes[1], (part.name, path_name(path), sizes)


# Config file and variant -> the repository that it distils.
CONFIGS = {
    "pixart_gad.py": "PixArt-XL-2-512x512",
    "sd2_gad.py": "stable-diffusion-2-base",
    "sd2_gad.py:one_gad": "stable-diffusion-2-base",
    "sana_gad.py:both": "Sana_600M_512px",
    "sana_sprint.py": "Sana_1600M_1024px",
    "sana_sprint.py:gad": "Sana_1600M_1024px",
    "sd35_dpdmd.py:gad": "stable-diffusion-3.5-medium",
    "backbones.py:sd35_large": "stable-diffusion-3.5-large",
    "backbones.py:pixart_sigma": "PixArt-Sigma-XL-2-1024-MS",
    "backbones.py:z_image": "Z-Image",
    "backbones.py:lumina2": "Lumina-Image-2.0",
    "backbones.py:flux_dev": "FLUX.1-dev",
    "backbones.py:flux_schnell": "FLUX.1-schnell",
    "backbones.py:flux2_klein": "FLUX.2-klein-base-4B",
    "sdxl.py": "stable-diffusion-xl-base-1.0",
    "sdxl.py:dmd2": "stable-diffusion-xl-base-1.0",
    "sdxl.py:dmd2_gan": "stable-diffusion-xl-base-1.0",
}
WITH_PICTURES = "sana_sprint.py", "sana_sprint.py:gad", "sdxl.py:dmd2_gan"


@pytest.fixture
def traced(repositories, tmp_path):
    """Shapes of a config's training state before and after both updates."""

    def call(name):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red circle\na blue square\n")
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for number, caption in enumerate(prompts.read_text().splitlines()):
            Image.new("RGB", (64, 64)).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(caption)
        data = f"images={pictures}" if name in WITH_PICTURES else f"prompts={prompts}"
        file, _, variant = name.partition(":")
        path = Path(__file__).parents[1] / "configs" / file
        config = read_config(
            [
                f"--config={path}{':' + variant if variant else ''}",
                f"--config.teacher={repositories(CONFIGS[name])}",
                f"--config.data.{data}",
                "--config.batch=2",
                "--config.microbatch=0",
            ]
        )
        run = prepare(config, abstract=True)
        return run, jax.eval_shape(run.start, run.initial_params)

    return call


SLOW = ("sd2_gad.py:one_gad", "sana_gad.py:both", "sdxl.py", "backbones.py:sd35_large")
SLOW += WITH_PICTURES
SLOW += ("backbones.py:z_image", "backbones.py:lumina2")
SLOW += ("backbones.py:flux_dev", "backbones.py:flux_schnell", "backbones.py:flux2_klein")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONFIGS]
)
def test_a_paper_s_config_makes_a_state(traced, name):
    run, state = traced(name)
    part = run.pipeline.folder.components[run.pipeline.backbone]
    student = sum(leaf.size for leaf in jax.tree.leaves(state.params["student"]))
    base = sum(leaf.size for leaf in jax.tree.leaves(run.base("student", run.frozen) or {}))
    if name.startswith("backbones"):  # adapters on a whole base
        assert 0 < student < base / 5
        student = 0
    assert student + base == INVENTORY[CONFIGS[name]][part.name][1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.frozen[part.name])} == {"bfloat16"}
    mesh = AbstractMesh((8, 32, 1, 1), AXES)
    rules = part.family.rules
    shardings(state, DISCRIMINATOR_RULES + rules + adapter_rules(rules), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_paper_s_config_makes_both_updates(traced, name):
    run, state = traced(name)
    raw = run.source.batch(0, 2)
    untrained = run.frozen.get("untrained")
    assert untrained is None or "sd3" in name

    def batch(frozen, raw):
        return make_batch(run.pipeline, frozen, raw, make_key(0), 0)

    made = jax.eval_shape(batch, run.frozen, raw)

    def updated(step, state, frozen, batch):
        return step(run.step_spec, state, run.networks(frozen), batch)[0]

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    for step in [student_step] + [critic_step] * (len(run.step_spec.optimizers) > 1):
        after = jax.eval_shape(functools.partial(updated, step), state, run.frozen, made)
        assert shapes(after) == shapes(state)


def test_a_config_without_its_part_is_named(repositories, tmp_path):
    folder = repositories("stable-diffusion-2-base")
    pipeline, params = abstract_pipeline(folder)
    assert pipeline.latent == (64, 64, 4) and pipeline.upscale == 8
    assert pipeline.sampling.length == 77 and params["unet"] is pipeline.networks["unet"].abstract
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="model_index.json"):
        abstract_folder(tmp_path / "x")


@pytest.mark.parametrize("name", sorted(INVENTORY))
def test_null_means_that_an_option_is_absent(name):
    """Newer versions of diffusers write keys that are unknown here, as null."""
    for path, config in PUBLISHED[name].items():
        part = Path(path).parent.name
        if part in INVENTORY[name]:
            class_name = PUBLISHED[name]["model_index.json"][part][1]
            _, reference, _ = read_network(Path(path), class_name, config)
            more = config | {"of_a_newer_version": None}
            if part.startswith("text_encoder"):
                more.pop("architectures")
            assert read_network(Path(path), class_name, more)[1] == reference
