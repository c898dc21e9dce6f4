"""NASA: the negative prompt's cross-attention, subtracted from the prompt's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gadjax.api import load, with_sampling
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.models.params import flatten, unflatten
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import subtract_negative

PROMPTS, NEGATIVE, LENGTH, SCALE = ("red circle", "green"), "blue square above", 8, 0.4


def conds(pipeline, params, length=LENGTH):
    """Conditioning of the prompts and of the negative prompt."""

    def cond(prompts):
        return pipeline.encode_text(params, *pipeline.tokens(prompts, length))

    return cond(PROMPTS), cond([NEGATIVE] * len(PROMPTS))


def inputs(pipeline):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(len(PROMPTS), *pipeline.latent)), jnp.float32)
    return x, jnp.asarray([300.0, 700.0])


@pytest.mark.parametrize(
    "family", ["pixart", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sana", "sd15"))]
)
def test_the_prompt_minus_itself_is_a_smaller_projection(folders, tiny_pipeline, family):
    """Z - s Z = (1 - s) Z: that of a network whose cross-attention's output kernel is as much
    smaller; a scale of 0 changes nothing."""
    pipeline, params = load_pipeline(tiny_pipeline if family == "pixart" else folders(family))
    length = LENGTH if family == "pixart" else pipeline.prompts.length
    cond, null = conds(pipeline, params, length)
    backbone, denoiser = params[pipeline.backbone], pipeline.denoiser
    flat = flatten(backbone)
    kernels = [path for path in flat if path.endswith("attn2/to_out/kernel")]
    smaller = unflatten(flat | {path: (1 - SCALE) * flat[path] for path in kernels})

    @jax.jit
    def run(backbone, smaller, cond, null, x, t):
        def subtracted(other, scale):
            return denoiser.raw(
                backbone, x, t, subtract_negative(denoiser, backbone, cond, other, scale)
            )

        plain = denoiser.raw(backbone, x, t, cond), denoiser.raw(smaller, x, t, cond)
        return plain, (subtracted(null, 0.0), subtracted(cond, SCALE)), subtracted(null, SCALE)

    plain, same, other = run(backbone, smaller, cond, null, *inputs(pipeline))
    for a, b in zip(plain, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
    assert kernels and np.abs(other - plain[0]).max() > 1e-3 * np.abs(other).max()


class Subtracting(torch.nn.Module):
    """Processor of diffusers' attention that subtracts the attention to other tokens."""

    def __init__(self, plain, tokens, bias):
        super().__init__()
        self.plain, self.tokens, self.bias = plain, tokens, bias

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, **more):
        out, attn.to_out[0] = attn.to_out[0], torch.nn.Identity()
        try:
            positive = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)
            negative = self.plain(attn, hidden_states, self.tokens, self.bias)
        finally:
            attn.to_out[0] = out
        return out(positive - SCALE * negative)


def test_it_is_a_processor_of_diffusers_that_subtracts(tiny_pipeline):
    """In PyTorch with another negative prompt, of another length, against the same parameters."""
    from diffusers import PixArtTransformer2DModel

    pipeline, params = load_pipeline(tiny_pipeline)
    cond, null = conds(pipeline, params)
    assert not np.array_equal(cond.mask, null.mask)
    backbone, (x, t) = params["transformer"], inputs(pipeline)
    cond_minus = subtract_negative(pipeline.denoiser, backbone, cond, null, SCALE)
    ours = pipeline.denoiser.raw(backbone, x, t, cond_minus)
    model = PixArtTransformer2DModel.from_pretrained(tiny_pipeline / "transformer").eval()
    text, mask, other, other_mask = (
        torch.tensor(np.asarray(a)) for a in (cond.text, cond.mask, null.text, null.mask)
    )
    with torch.no_grad():
        tokens = model.caption_projection(other)
        bias = ((1 - other_mask.float()) * -10000.0)[:, None]
        for block in model.transformer_blocks:
            block.attn2.processor = Subtracting(block.attn2.processor, tokens, bias)
        theirs = model(
            torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=torch.tensor(np.asarray(t)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    theirs = theirs[:, :4].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_it_needs_a_negative_prompt_no_guidance_and_cross_attention(tiny_pipeline, folders):
    model = load(str(tiny_pipeline))
    plain = with_sampling(model, guidance=1.0)

    def refused(message, model, **options):
        with pytest.raises(InputError, match=message):
            with_sampling(model, **options)

    refused("nasa: found 0.5 without a negative prompt", plain, nasa=0.5)
    refused(
        "nasa: found 0.5 and guidance 4", with_sampling(model, guidance=4.0), nasa=0.5, negative="x"
    )
    refused("nasa: found nan; expected a finite", plain, nasa=float("nan"), negative="x")
    refused("negative: found 'x'; expected none", plain, negative="x")
    joint = replace(
        plain,
        pipeline=replace(plain.pipeline, denoiser=replace(plain.pipeline.denoiser, text_kv=None)),
    )
    refused(
        "nasa: found 0.5 for a PixArt.*; expected a PixArt, a SANA or a U-Net",
        joint,
        nasa=0.5,
        negative="x",
    )
    assert with_sampling(plain, nasa=0.5, negative="x").sampling.nasa == 0.5


@pytest.mark.slow
def test_the_command_samples_other_images(tiny_pipeline, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle\n")
    flags = ["--model", str(tiny_pipeline), "--prompts", str(prompts), "--steps", "2"]
    flags += ["--guidance", "1"]

    def image(name, *more):
        assert main(["sample", *flags, "--out", str(tmp_path / name), *more]) == 0
        return (tmp_path / name / "00000-0.png").read_bytes()

    plain, minus = image("a"), image("b", "--nasa", "0.9", "--negative", "blue square")
    assert plain != minus
    assert main(["sample", *flags, "--out", str(tmp_path / "c"), "--nasa", "0.5"]) == 2
    assert "--nasa: found 0.5 without a negative prompt" in capsys.readouterr().err
