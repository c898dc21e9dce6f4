"""Pipelines of every family against diffusers: networks, images, and weights both ways."""

import json
import shutil

import diffusers
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import edit, same, state
from families import LENGTH
from workdirs import make_workdir

import gadjax
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.objectives import DMD, GAD, Anchor, Regression
from gadjax.pipelines import parity
from gadjax.pipelines.diffusers_calls import diffusers_arguments, draw_in_diffusers
from gadjax.pipelines.known_students import PUBLISHED_STUDENTS, published_student
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import abstract_pipeline, load_pipeline, make_pipeline, resized
from gadjax.pipelines.sampling import draw, initial_noise

PROMPTS = ("a red circle above the blue square", "")


def with_sampling_config(folder, tmp_path, **sampling):
    """A copy of the folder with a gadjax.json."""
    path = shutil.copytree(folder, tmp_path / "copy_with_config")
    (path / GADJAX_JSON).write_text(json.dumps(sampling))
    return path


def some(names, quick):
    """Parameters of a test: those not in `quick` are of the slow tier."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# The images of the others are compared below.
@pytest.mark.parametrize("family", some(families.MAKERS, ("sd15", "sd2_v", "sd3")))
def test_network_outputs_are_those_of_diffusers(folders, family):
    folder = read_pipeline(folders(family))
    found = parity.compare_networks(folder, folder)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "flux2_klein"])
def test_networks_of_another_dtype_are_compared_in_it(folders, family):
    """With the buffers that files hold: a table of positions, a batch norm's statistics."""
    ours, theirs = (
        read_pipeline(folders(family), dtype=jnp.bfloat16),
        read_pipeline(folders(family)),
    )
    assert max(parity.compare_networks(ours, theirs, jnp.bfloat16).values()) <= 1e-5


SPRINT = {"guidance": 4.5, "steps": 2}


DRAWN = ("sdxl", "sana", "sana_sprint", "sd35", "flux_dev", "z_image")


@pytest.mark.parametrize("family", some(families.MAKERS, DRAWN))
def test_images_are_those_of_diffusers(folders, family, tmp_path):
    sampling = {"steps": 4, "guidance": 3.0, "length": LENGTH.get(family, 77)}
    folder = with_sampling_config(
        folders(family), tmp_path, **sampling | (SPRINT if "sprint" in family else {})
    )
    assert parity.compare_pictures(folder, PROMPTS) <= 1e-4


# Sprint embeds the number itself.
UP_TO_ONE = {"sd3": 0.0, "sdxl": 0.5, "sd15": -1.0, "sana": 1.0, "sana_sprint": 0.5}
UP_TO_ONE |= {"z_image": 0.5, "lumina2": 1.0, "flux2_klein": 1.0}


@pytest.mark.parametrize("family", some(UP_TO_ONE, ("sd3",)))
def test_guidance_up_to_one_is_none(folders, family, tmp_path):
    """In diffusers too, called with the same number."""
    sampling = {"steps": 2, "guidance": UP_TO_ONE[family], "length": LENGTH.get(family, 77)}
    folder = with_sampling_config(folders(family), tmp_path, **sampling)
    assert parity.compare_pictures(folder, PROMPTS) <= 1e-4


# Family -> how its files are written.
STORED = {
    "sd15": {"variant": "fp16", "dtype": "float16"},
    "sd2_v": {},
    "sdxl": {"dtype": "bfloat16"},
    "sana": {"dtype": "bfloat16", "max_shard_size": "60KB"},
    "sana_sprint": {},
    "sd3": {"variant": "fp16", "dtype": "float16", "max_shard_size": "150KB"},
    "sd35": {},
    "sd35_large": {"dtype": "float16", "max_shard_size": "150KB"},
    "pixart_sigma": {"variant": "fp16", "dtype": "float16"},
    "z_image": {"dtype": "bfloat16", "max_shard_size": "150KB"},
    "lumina2": {"variant": "fp16", "dtype": "float16"},
    "flux_dev": {"dtype": "bfloat16", "max_shard_size": "150KB"},
    "flux_schnell": {"variant": "fp16", "dtype": "float16"},
    "flux2_klein": {"dtype": "bfloat16", "max_shard_size": "150KB"},
}


@pytest.mark.parametrize("family", STORED)
def test_weights_survive_the_round_trip(folders, family, tmp_path):
    options = dict(STORED[family])
    folder, variant = folders(family), options.get("variant")
    if options:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipeline.to(dtype=getattr(torch, options.pop("dtype")))
        folder = tmp_path / "stored"
        pipeline.save_pretrained(folder, **options)
    converted, back = tmp_path / "converted", tmp_path / "back"
    flags = ["--variant", variant] if variant else []
    assert main(["convert", str(folder), str(converted), *flags]) == 0
    assert main(["convert", str(converted), str(back)]) == 0
    for name in read_pipeline(folder, variant=variant).components:
        before, after = state(folder, name), state(back, name)
        if name.startswith("text_encoder"):  # both spellings are read, one is written
            after = {key: after[prefixed(key, after)] for key in before}
        before.pop("bn.num_batches_tracked", None)  # which diffusers sets to 0
        assert same(before, after), name


def prefixed(key, tensors):
    spellings = key, f"text_model.{key}", key.removeprefix("model.")
    return next(name for name in spellings if name in tensors)


@pytest.mark.slow
def test_a_folder_that_went_both_ways_is_drawn_alike(folders, tmp_path):
    """Qwen3ForCausalLM's tensors are written without their prefix, a batch norm without its count,
    and transformers and diffusers load them."""
    folder, own, back = folders("flux2_klein"), tmp_path / "own", tmp_path / "back"
    assert main(["convert", str(folder), str(own)]) == 0
    assert main(["convert", str(own), str(back)]) == 0
    (back / GADJAX_JSON).write_text(json.dumps({"steps": 2, "guidance": 3.0, "length": 44}))
    assert parity.compare_pictures(back, PROMPTS) <= 1e-4
    theirs = [diffusers.DiffusionPipeline.from_pretrained(path) for path in (folder, back)]
    for part in ("text_encoder", "vae", "transformer"):
        one, other = (getattr(pipeline, part).state_dict() for pipeline in theirs)
        assert same(one, other), part


@pytest.mark.slow
@pytest.mark.parametrize("family", families.MAKERS)
def test_a_map_of_the_noise_has_a_tangent(folders, family):
    from gadjax.formats.sampling_config import SamplingConfig
    from gadjax.pipelines.sampling import clean_latent

    pipeline, params = load_pipeline(folders(family))
    length = LENGTH.get(family, 77)
    sampling = SamplingConfig(2, None, 2.0, length)
    z, v = np.random.default_rng(0).standard_normal((2, 1, *pipeline.latent), np.float32)
    cond = pipeline.encode_text(params, *pipeline.tokens(PROMPTS[:1], length))
    null = pipeline.encode_text(params, *pipeline.prompts.negative_tokens(None, length))

    def walk(z):
        return clean_latent(pipeline, params[pipeline.backbone], sampling, z, cond, null)

    _, tangent = jax.jit(lambda z, v: jax.jvp(walk, (z,), (v,)))(z, v)
    assert np.isfinite(tangent).all() and np.abs(tangent).max() > 1e-3


STUDENTS = {
    "sd15": (899, 674, 449, 224),
    "sd2_v": (999,),
    "sdxl": (999, 500),
    "sana": (999.67, 749.62),
    "sd3": (1000.0,),
    "sd35": (1000.0, 857.69, 602.15, 8.93),
    "pixart_sigma": (999,),
    "z_image": (1000.0, 947.37, 857.14, 666.67),
    "lumina2": (1000.0, 857.14),
    "flux_dev": (1000.0, 849.2, 652.5, 384.9),
    "flux_schnell": (1000.0, 500.0),
    "flux2_klein": (1000.0, 958.1, 884.0, 717.5),
}


@pytest.mark.parametrize("family", some(STUDENTS, ("sana",)))
def test_a_student_goes_back_to_diffusers(folders, family, tmp_path):
    """`gadjax export` compares images of both; the exported weights are the EMA."""
    folder, timesteps = folders(family), STUDENTS[family]
    run, out = tmp_path / "run", tmp_path / "out"
    data = {"length": LENGTH.get(family, 77)}
    make_workdir(run, folder, timesteps=timesteps, data=data)
    assert main(["export", "--workdir", str(run), "--out", str(out)]) == 0
    assert json.loads((out / GADJAX_JSON).read_text())["verified"]["max_difference"] <= 1e-4
    backbone = "unet" if (folder / "unet").is_dir() else "transformer"
    for key, tensor in state(out, backbone).items():
        moved = 1 if key == "pos_embed.pos_embed" else 1 - 0.02 * 2
        torch.testing.assert_close(tensor, state(folder, backbone)[key] * moved, rtol=1e-6, atol=0)


RECIPES = {
    "dp-dmd-sd3.5": "sd35",
    "sd3.5-large-turbo": "sd35_large",
    "z-image-turbo": "z_image",
    "dmd2-sdxl": "sdxl",
    "dmd2-sdxl-one-step": "sdxl",
    "sid-sd": "sd2_v",
    "flux-schnell": "flux_schnell",
    "flux2-klein": "flux2_klein",
    "sana-sprint": "sana_sprint",
    "lcm-sd1.5": "sd15",
    "hyper-sd1.5-1": "sd15",
    "hyper-sdxl-2": "sdxl",
    "hyper-sd1.5-8-cfg": "sd15",
    "tdm-sd3": "sd3",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", some(RECIPES, ("sid-sd",)))
def test_published_students_are_sampled_as_by_their_authors(folders, recipe, tmp_path):
    """With the scheduler and arguments that their authors give diffusers."""
    folder = folders(RECIPES[recipe])
    pipeline, sampling = published_student(recipe, load_pipeline(folder)[0])
    written = sampling.to_dict() | {"length": LENGTH.get(RECIPES[recipe], 77)}
    path = with_sampling_config(folder, tmp_path, **written)
    if PUBLISHED_STUDENTS[recipe].scheduler:
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        changes = PUBLISHED_STUDENTS[recipe].changes
        made = getattr(diffusers, PUBLISHED_STUDENTS[recipe].scheduler).from_config(
            theirs.scheduler.config, **changes
        )
        shutil.rmtree(path / "scheduler")
        made.save_pretrained(path / "scheduler")
        index = json.loads((path / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", PUBLISHED_STUDENTS[recipe].scheduler]
        (path / "model_index.json").write_text(json.dumps(index))
        stored = load_pipeline(path)[0]
        assert stored.denoiser.schedule == pipeline.denoiser.schedule
        assert stored.denoiser.parameterization == pipeline.denoiser.parameterization
    assert parity.compare_pictures(path, PROMPTS) <= 1e-4
    assert sampling.length == {"flux-schnell": 256}.get(recipe, pipeline.sampling.length)
    assert sampling.scale == pytest.approx(0.9285640 if recipe == "sid-sd" else 1, rel=1e-6)


def test_a_recipe_keeps_what_its_scheduler_reads_of_the_folders(folders, tmp_path):
    """Like diffusers' from_config: Euler has no clip_sample, LCM has."""
    path = shutil.copytree(folders("sdxl"), tmp_path / "sdxl")
    edit(path / "scheduler" / "scheduler_config.json", clip_sample=True)
    pipeline, _ = abstract_pipeline(path)
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(path / "scheduler")
    assert diffusers.LCMScheduler.from_config(theirs.config).config.clip_sample is True
    with pytest.raises(InputError, match="clip_sample: found True; expected false"):
        published_student("dmd2-sdxl", pipeline)


def test_a_recipe_of_another_family_is_refused(folders):
    pipeline, _ = load_pipeline(folders("sd15"))
    with pytest.raises(InputError, match="expected a StableDiffusionXLPipeline for dmd2-sdxl"):
        published_student("dmd2-sdxl", pipeline)
    with pytest.raises(InputError, match="student_preset: found 'x'; expected one of tdm-pixart"):
        published_student("x", pipeline)


def broken(folder, path, part, **changes):
    """A copy with another configuration of one part."""
    shutil.copytree(folder, path)
    edit(path / part, **changes)
    return path


def test_text_encoders_of_another_width_are_refused(folders, tmp_path):
    folder = read_pipeline(folders("sdxl"))
    part = folder.components["text_encoder"]
    wide = part.__class__(**{**vars(part), "spec": part.spec.__class__(hidden_size=24)})
    folder.components["text_encoder"] = wide
    with pytest.raises(InputError, match="text encoders of width 52; expected 48, the network's"):
        make_pipeline(folder)


def test_a_missing_text_encoder_is_named(folders, tmp_path):
    folder = broken(folders("sd3"), tmp_path / "x", "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(InputError, match="found no text_encoder_2; expected the text encoder"):
        load_pipeline(folder)


@pytest.mark.slow
def test_sd3_goes_without_its_t5(folders, tmp_path):
    gone = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    folder = broken(folders("sd3"), tmp_path / "x", "model_index.json", **gone)
    shutil.rmtree(folder / "text_encoder_3")
    (folder / GADJAX_JSON).write_text(json.dumps({"steps": 2, "guidance": 2.0, "length": 9}))
    assert parity.compare_pictures(folder, PROMPTS) <= 1e-4


def test_other_lengths_than_clips_are_refused(folders):
    pipeline, _ = load_pipeline(folders("sd15"))
    with pytest.raises(InputError, match="length: found 12 tokens; expected 77"):
        pipeline.tokens(PROMPTS, 12)


@pytest.mark.parametrize("family", some(("sdxl", "sana", "sd3"), ("sana",)))
def test_a_negative_prompt_and_another_size(folders, family, tmp_path):
    """`gadjax sample` with both, against diffusers."""
    length = LENGTH.get(family, 77)
    folder = with_sampling_config(folders(family), tmp_path, steps=2, guidance=3.0, length=length)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    size = {"sana": (32, 64)}.get(family, (16, 24))
    flags = ["--negative", "blue square", "--size", f"{size[0]}x{size[1]}"]
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o"]
    assert main(["sample", *map(str, arguments), *flags]) == 0
    from PIL import Image

    ours = np.asarray(Image.open(tmp_path / "o" / "00000-0.png"), np.float32) / 255
    assert ours.shape == (*size, 3)
    pipeline, _ = load_pipeline(folder)
    latent = (size[0] // pipeline.upscale, size[1] // pipeline.upscale, pipeline.latent[2])
    noise = initial_noise(0, 1, latent).transpose(0, 3, 1, 2).copy()
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    sampling = pipeline.sampling.__class__(2, None, 3.0, length)
    image = theirs(
        "a red circle",
        negative_prompt="blue square",
        height=size[0],
        width=size[1],
        latents=torch.from_numpy(noise),
        output_type="np",
        **diffusers_arguments(type(theirs).__name__, sampling),
    ).images[0]
    assert np.abs(ours - image).max() <= 1 / 255


@pytest.mark.slow
def test_flux_s_grid_follows_the_size(folders):
    """A wide picture under the folder's own scheduler, whose shift depends on the tokens."""
    folder = folders("flux_dev")
    pipeline, params = load_pipeline(folder)
    sampling = pipeline.sampling.__class__(3, None, 4.5, LENGTH["flux_dev"])
    wide = resized(pipeline, (24, 40))
    assert wide.latent == (12, 20, 4) and np.any(wide.sampler.times(3) != pipeline.sampler.times(3))
    noise = initial_noise(0, len(PROMPTS), wide.latent)
    ours = draw(Model("flux", wide, params, sampling), PROMPTS, noise) / 2 + 0.5
    assert ours.shape == (2, 24, 40, 3)
    assert np.abs(ours - draw_in_diffusers(folder, sampling, PROMPTS, noise)).max() <= 1e-4
    with pytest.raises(InputError, match="size: found 26x40 pixels; latents: found 13 x 20"):
        resized(pipeline, (26, 40))


@pytest.mark.slow
def test_flux2_s_grid_follows_the_size_and_the_number_of_steps(folders):
    """A tall picture, whose latents are patches, at two numbers of steps."""
    folder = folders("flux2_klein")
    pipeline, params = load_pipeline(folder)
    tall = resized(pipeline, (28, 12))
    assert tall.latent == (7, 3, 16)
    shifts = {n: tall.sampler.times(n)[1] / tall.sampler.times(n)[0] for n in (2, 5)}
    for steps, second in shifts.items():
        odds = (1 - 1 / steps) / (1 / steps)  # of an even grid's second sigma
        mu = np.log(second / (1 - second) / odds)
        at_200, at_10 = 1.6927e-4 * 21 + 0.45666666, 8.73809524e-5 * 21 + 1.89833333
        assert mu == pytest.approx(at_200 + (steps - 200) * (at_200 - at_10) / 190, rel=1e-5)
        sampling = pipeline.sampling.__class__(steps, None, 4.0, LENGTH["flux2_klein"])
        noise = initial_noise(0, len(PROMPTS), tall.latent)
        ours = draw(Model("klein", tall, params, sampling), PROMPTS, noise) / 2 + 0.5
        assert ours.shape == (2, 28, 12, 3)
        assert np.abs(ours - draw_in_diffusers(folder, sampling, PROMPTS, noise)).max() <= 1e-4
    with pytest.raises(InputError, match="size: found 26x40; expected multiples of 4 pixels"):
        resized(pipeline, (26, 40))


# A U-Net is no stack of like blocks: compiling the whole sum for it takes minutes.
SUMS = {
    "sdxl": Regression(steps=1),
    "sana": DMD() + 0.3 * GAD(steps=2) + 0.05 * Anchor(steps=2),
    "sd35": DMD() + 0.3 * GAD(steps=2) + 0.05 * Anchor(steps=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SUMS)
def test_training_ends_in_a_folder_that_diffusers_samples(folders, family, tmp_path):
    """Training in bfloat16: from precomputed embeddings for one family, else from prompts."""
    teacher, data = folders(family), {"length": LENGTH.get(family, 77)}
    prompts = ["a red circle", "the blue square", "green", "above"]
    if family == "sdxl":
        texts = tmp_path / "prompts.txt"
        texts.write_text("\n".join(prompts))
        flags = ["--model", teacher, "--prompts", texts, "--out", tmp_path / "text"]
        assert main(["embed", *map(str, flags)]) == 0
        prompts, data["embeddings"] = None, str(tmp_path / "text")
    student = gadjax.distill(
        teacher,
        SUMS[family],
        prompts,
        steps=2,
        timesteps=STUDENTS["sana"] if family == "sana" else None,
        updates=2,
        workdir=tmp_path / "run",
        batch=4,
        guidance=2.0,
        dtype="bfloat16",
        data=data,
        preview={"every": 2, "prompts": 2},
    )
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 2
    verified = gadjax.save(student, tmp_path / "out")
    assert verified["max_difference"] <= 1e-3
