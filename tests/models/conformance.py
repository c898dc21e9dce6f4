"""Conformance suites: a family's test file makes a case and a class of a suite's tests.

    CASE = Case(family=pixart.FAMILY, torch_class=PixArtTransformer2DModel, ...)

    class TestPixArt(BackboneSuite):
        case = CASE

Every network is compared with diffusers' or transformers' class with all of its tensors
re-randomised. NetworkSuite has what all networks share, BackboneSuite what backbones do;
`conformance_text` and `conformance_autoencoder` have the suites of the other two kinds.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gadjax.diffusion import geometry
from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.adapters import Lora, abstract_adapters
from gadjax.models.family import Backbone, Family
from gadjax.models.module import functional
from gadjax.models.params import cast, flatten, merge_params, unflatten
from gadjax.types import Cond

MAX_ERROR = 1e-5  # of the output's largest magnitude
SENSITIVE = 1e-3
MAX_BFLOAT16_ERROR = 0.05  # of text encoders and autoencoders
UNRULED = 2**16  # a leaf of fewer elements may have no rule


class Size(NamedTuple):
    """A small network, and latents for it."""

    config: dict[str, Any]
    height: int
    width: int


class Published(NamedTuple):
    """A published network: its config.json, trained parameters and tensors of the file."""

    config: dict[str, Any]
    parameters: int
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Tangents:
    """The program that is compared with central differences in float64.

    paths: parameters in which the scalar that holds a tangent is differentiated.
    times: one a sample.
    step: of the differences; a short one for networks with kinks.
    """

    size: Size
    paths: tuple[str, ...]
    times: tuple[float, ...]
    length: int = 7
    step: float = 1e-4
    tolerance: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What sharding rules are asked for at the published sizes.

    mesh: sizes that the named axes have to divide.
    complete: every leaf has a rule; otherwise every large one.
    replicated: ends of the paths whose rule may name no axis, or "tensor" alone on a small leaf.
    small_divide: small leaves divide too.
    """

    mesh: Mapping[str, int]
    complete: bool = False
    replicated: tuple[str, ...] = ()
    small_divide: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkCase:
    """A family, and what the suite of all networks needs to know of it.

    Attributes:
      family: the family.
      torch_network: configuration -> diffusers' or transformers' network.
      sizes: small networks that are compared, by name; each has a `config`.
      published: published networks by name.
      refused: (key, value) that are refused in the `refused_in` configuration.
      rules: see there.
      untrained: paths that `family.frozen` names in every published network.
      file_keys: state of torch's network -> the same under the keys of its files.
    """

    family: Family
    torch_network: Callable[[Mapping[str, Any]], torch.nn.Module]
    sizes: Mapping[str, Any]
    published: Mapping[str, Published]
    refused: Sequence[tuple[str, Any]]
    refused_in: Mapping[str, Any]
    rules: Rules
    untrained: tuple[str, ...] = ()
    file_keys: Callable[[dict], dict] = field(default=lambda state: state)

    def config(self, cfg):
        return self.family.config.from_dict(cfg)

    def network(self, cfg, **options):
        return functional(self.family.build(self.config(cfg), **options))

    def random_torch_network(self, cfg):
        """torch's network; no tensor of its state is at an initial zero or one."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        network = self.torch_network(cfg).eval()
        with torch.no_grad():
            for value in network.state_dict().values():
                value.add_(0.1 * torch.randn_like(value))
        return network

    def params(self, model, cfg, dtype=np.float32):
        """Our parameters from torch's."""
        tensors = {k: v.numpy().astype(dtype) for k, v in model.state_dict().items()}
        keymap = self.family.keymap_of(self.config(cfg))
        return params_from_tensors(tensors, self.network(cfg).abstract, keymap)


def torch_class(kind: type, drops: Sequence[str] = ()):
    """Configuration -> diffusers' network of a class. drops: options that it no longer has."""
    return lambda cfg: kind(**{k: v for k, v in cfg.items() if k[0] != "_" and k not in drops})


@dataclass(frozen=True, eq=False, kw_only=True)
class Case(NetworkCase):
    """A backbone's family, and what its suite needs to know besides.

    Attributes:
      sizes: at least two, non-square.
      times: of three samples, from a configuration.
      extras: (config, generator, samples) -> `Cond.extras`.
      blocks: modules of torch's network whose output `features` may be; it is the middle one's.
      tokens: such a module's output as [B, N, D].
      tangents: see there.
      bfloat16: network whose output in bfloat16 is compared.
      fresh: network that is initialised.
      layers: path of a stacked kernel in `fresh`.
      fresh_is_slow: whether initialising it compiles for long.
      adapted_is_slow: whether the derivatives of an adapted network do.
      length: of the prompt embeddings.
      torch_times: (config, times) -> what diffusers' pipeline passes to torch's network.
    """

    family: Backbone
    sizes: Mapping[str, Size]
    times: Callable[[Any], Sequence[float]]
    extras: Callable[[Any, np.random.Generator, int], dict[str, np.ndarray] | None]
    blocks: Callable[[torch.nn.Module], Sequence[torch.nn.Module]]
    tangents: Tangents
    bfloat16: Size
    fresh: Size
    layers: str
    fresh_is_slow: bool = True
    adapted_is_slow: bool = True
    length: int = 7
    tokens: Callable[[Any], torch.Tensor] = field(default=lambda output: output)
    torch_times: Callable[[Any, np.ndarray], np.ndarray] = field(default=lambda config, t: t)

    def inputs(self, size: Size, batch: int = 3, length: int | None = None):
        """(x, t, cond) with a mask that keeps one token, some and all."""
        config, r, length = (
            self.config(size.config),
            np.random.default_rng(0),
            length or self.length,
        )
        shape = batch, size.height, size.width, config.latent_channels
        x = r.standard_normal(shape, np.float32)
        t = np.array(self.times(config), np.float32)[:batch]
        text = r.standard_normal((batch, length, config.text_dim), np.float32)
        mask = (np.arange(length) < np.array([[length], [3], [1]])[:batch]).astype(np.int32)
        return x, t, Cond(text, mask, self.extras(config, r, batch))

    def torch_call(self, model, cfg, x, t, cond):
        """Output of torch's network, called as diffusers' pipelines do: [B, H, W, C]."""
        config = self.config(cfg)
        given = x, self.torch_times(config, t), cond
        given = jax.tree.map(lambda value: torch.tensor(np.asarray(value)), given)
        with torch.no_grad():
            return self.family.call_torch(model, config, *given).numpy()

    def raw(self, apply, config):
        """(params, x, t, cond) -> (raw output with all its channels, the predictor's result)."""

        def call(params, x, t, cond):
            raws = []

            def recorded(*args, **kwargs):
                raws.append(apply(*args, **kwargs))
                return raws[-1]

            prediction = self.family.predictor(recorded, config)(params, x, t, cond)
            return raws[0], prediction

        return call


class Loaded(NamedTuple):
    """Both networks of a size, with the same parameters, compiled."""

    torch_network: torch.nn.Module
    network: Any
    params: Any
    inputs: tuple
    raw: Callable
    features: Callable


@cache
def torch_reference(case: NetworkCase, name: str) -> torch.nn.Module:
    """torch's network of a size, with random parameters."""
    return case.random_torch_network(case.sizes[name].config)


@cache
def loaded(case: Case, name: str) -> Loaded:
    size = case.sizes[name]
    model, network = torch_reference(case, name), case.network(size.config)
    raw = jax.jit(case.raw(network.apply, case.config(size.config)))
    features = jax.jit(case.family.features(network.apply))
    params = case.params(model, size.config)
    return Loaded(model, network, params, case.inputs(size), raw, features)


@cache
def abstract(case: NetworkCase, name: str):
    """Shapes of a published network."""
    return case.network(case.published[name].config).abstract


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def tokens_by_block(case: Case, name: str) -> list[np.ndarray]:
    """Tokens of the image after each block of torch's network; they come first."""
    both, by_block = loaded(case, name), []
    model = both.torch_network
    images = jax.eval_shape(both.features, both.params, *both.inputs).shape[1]
    hooks = [
        block.register_forward_hook(
            lambda block, given, out: by_block.append(case.tokens(out)[:, :images].numpy())
        )
        for block in case.blocks(model)
    ]
    case.torch_call(model, case.sizes[name].config, *loaded(case, name).inputs)
    for hook in hooks:
        hook.remove()
    return by_block


def reversed_inputs(family: Backbone, config, t, cond):
    """(name, t, cond) with one input changed, of those that the family reads."""
    yield "time", t[::-1], cond
    yield "text", t, cond._replace(text=cond.text[::-1])
    if "encoder_attention_mask" in family.torch_inputs(config, cond):
        yield "mask", t, cond._replace(mask=np.ones_like(cond.mask))
    for name, value in (cond.extras or {}).items():
        yield name, t, cond._replace(extras=cond.extras | {name: value[::-1].copy()})


class NetworkSuite:
    """Tests of all networks; a subclass has `case`."""

    case: ClassVar[NetworkCase]

    def parameters(self) -> dict[str, list]:
        """Values of the tests' arguments."""
        return {
            "published": list(self.case.published),
            "key, value": list(self.case.refused),
            "size": list(self.case.sizes),
        }

    def pytest_generate_tests(self, metafunc):
        for name, values in self.parameters().items():
            if name.split(",")[0] in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    def test_published_inventory(self, published):
        """Keys, shapes and number of tensors and parameters, against the class on meta."""
        case, (cfg, parameters, tensors) = self.case, self.case.published[published]
        with torch.device("meta"):
            state = case.file_keys(case.torch_network(cfg).state_dict())
        leaves = abstract(case, published)
        shapes = expected_shapes(leaves, case.family.keymap_of(case.config(cfg)))
        found = {k: shape for k, (_, _, shape) in shapes.items()}
        assert found == {k: tuple(v.shape) for k, v in state.items()}
        assert len(found) == tensors
        flat, patterns = flatten(leaves), case.family.frozen
        frozen = tuple(p for p in flat if any(re.search(f, p) for f in patterns))
        assert frozen == case.untrained
        assert sum(leaf.size for path, leaf in flat.items() if path not in frozen) == parameters
        assert all(isinstance(path, str) for path in flat)
        name = cfg.get("_class_name") or cfg["architectures"][0]
        assert name in case.family.class_names

    def test_rules_divide_the_published_networks(self):
        """At most one rule a leaf, and no rule without one."""
        case, expected, used = self.case, self.case.rules, set()
        for name in case.published:
            for path, leaf in flatten(abstract(case, name)).items():
                matching = [(p, spec) for p, spec in case.family.rules if re.search(p, path)]
                assert len(matching) <= 1, path
                assert matching or not expected.complete and leaf.size < UNRULED, path
                for pattern, spec in matching:
                    used.add(pattern)
                    replicated = path.endswith(expected.replicated)
                    if replicated and not any(spec):
                        continue
                    assert len(spec) == leaf.ndim, path
                    alone = replicated and leaf.size <= UNRULED
                    assert tuple(spec).count("fsdp") == 1 or alone, path
                    for length, axis in zip(leaf.shape, spec, strict=True):
                        divides = axis is None or length % expected.mesh[axis] == 0
                        assert divides or not expected.small_divide and leaf.size < UNRULED, path
        assert used == {pattern for pattern, _ in case.family.rules}

    def test_unsupported_option_is_named(self, key, value):
        self.case.config(self.case.refused_in)
        message = rf"^(\w+ config )?{key}: found [^\n]*; expected [^\n]*$"
        with pytest.raises(InputError, match=message):
            self.case.config({**self.case.refused_in, key: value})

    def test_parameters_survive_the_round_trip(self, size):
        """From the state in memory to the keys of files, in every dtype."""
        case, cfg = self.case, self.case.sizes[size].config
        keymap, abstract = case.family.keymap_of(case.config(cfg)), case.network(cfg).abstract
        for dtype in (np.float32, np.float16, jnp.bfloat16):
            state = {
                k: v.numpy().astype(dtype)
                for k, v in torch_reference(case, size).state_dict().items()
            }
            back = dict(tensors_from_params(params_from_tensors(state, abstract, keymap), keymap))
            state = case.file_keys(state)
            assert set(back) == set(state)
            for key, value in state.items():
                assert back[key].dtype == value.dtype == dtype, key
                np.testing.assert_array_equal(back[key].view(np.uint8), value.view(np.uint8), key)


class BackboneSuite(NetworkSuite):
    """Tests of a backbone."""

    case: ClassVar[Case]

    def parameters(self):
        marks = [pytest.mark.slow] if self.case.fresh_is_slow else []
        fresh = pytest.param(self.case.fresh, marks=marks, id="fresh")
        marks = [pytest.mark.slow] if self.case.adapted_is_slow else []
        adapted = pytest.param(self.case.tangents, marks=marks, id="adapted")
        return super().parameters() | {"fresh": [fresh], "adapted": [adapted]}

    def test_output_is_that_of_diffusers(self, size):
        case, cfg, both = self.case, self.case.sizes[size].config, loaded(self.case, size)
        x, t, cond = both.inputs
        out, prediction = both.raw(both.params, x, t, cond)
        expected = case.torch_call(both.torch_network, cfg, x, t, cond)
        assert out.shape == expected.shape and out.dtype == jnp.float32
        error = relative(out, expected)
        print(f"{size}: {error:.2e}")
        assert error <= MAX_ERROR
        np.testing.assert_array_equal(prediction, out[..., : x.shape[-1]])
        for name, *other in reversed_inputs(case.family, case.config(cfg), t, cond):
            assert relative(both.raw(both.params, x, *other)[0], expected) > SENSITIVE, name

    def test_features_are_the_tokens_of_the_middle_block(self, size):
        """Against hooks in diffusers; no other block's output is as near."""
        both, by_block = loaded(self.case, size), tokens_by_block(self.case, size)
        features = both.features(both.params, *both.inputs)
        half = (len(by_block) + 1) // 2 - 1
        assert features.shape == by_block[half].shape and features.dtype == jnp.float32
        errors = [relative(features, tokens) for tokens in by_block]
        print(f"{size}: {errors[half]:.2e}")
        assert errors.pop(half) <= MAX_ERROR
        assert all(error > SENSITIVE for error in errors)

    def test_features_of_listed_blocks_are_their_tokens(self, size):
        """In one pass, and from the KV cache where the family has one."""
        case, both = self.case, loaded(self.case, size)
        config, method = case.config(case.sizes[size].config), case.family.text_kv
        depth = config.feature_blocks
        if not depth:
            pytest.skip("a U-Net, whose blocks are no stack of one width: it names none")
        by_block, blocks = tokens_by_block(case, size), (*range(0, depth - 1, 2), depth - 1)
        assert len(by_block) == depth
        features = case.family.features(both.network.apply)

        @jax.jit
        def run(params, x, t, cond):
            conds = [cond]
            if method:
                text_kv = both.network.apply(params, cond.text, method=method)
                conds.append(cond._replace(text=text_kv))
            return [features(params, x, t, c, blocks=blocks) for c in conds]

        for listed in run(both.params, *both.inputs):
            assert isinstance(listed, tuple) and len(listed) == len(blocks)
            for block, actual in zip(blocks, listed, strict=True):
                errors = [relative(actual, tokens) for tokens in by_block]
                assert errors.pop(block) <= MAX_ERROR
                assert all(error > SENSITIVE for error in errors)

    def test_kv_cache_stands_for_the_prompt(self, size):
        """Output and features from the KV cache are those from the prompt embeddings."""
        method, both = self.case.family.text_kv, loaded(self.case, size)
        x, t, cond = both.inputs
        text_kv = jax.jit(lambda p, text: both.network.apply(p, text, method=method))
        cached = cond._replace(text=text_kv(both.params, cond.text))
        for call in (lambda *args: both.raw(*args)[0], both.features):
            reference = call(both.params, x, t, cond)
            out = call(both.params, x, t, cached)
            assert np.abs(out - reference).max() <= 1e-6 * np.abs(reference).max()

    def test_derivatives_are_those_of_central_differences(self):
        """The tangent, and the gradient of a scalar that holds it, in latents and parameters."""
        case, given = self.case, self.case.tangents
        size, r = given.size, np.random.default_rng(1)
        params = case.params(case.random_torch_network(size.config), size.config)
        # All arithmetic outside `run` is numpy's: jax would compile it shape by shape.
        flat = {k: np.asarray(p, np.float64) for k, p in flatten(params).items()}
        point = {k: flat.pop(k) for k in given.paths}
        x, _, cond = case.inputs(size, len(given.times), given.length)
        x, text, extras = jax.tree.map(lambda a: a.astype(np.float64), (x, cond.text, cond.extras))
        cond, t = cond._replace(text=text, extras=extras), np.array(given.times)
        v, *directions = (r.standard_normal(x.shape) for _ in range(3))
        with jax.enable_x64(True):
            call = case.raw(
                case.network(size.config, dtype=jnp.float64).apply, case.config(size.config)
            )

            def loss(point, x, flat):
                params = unflatten(flat | point)
                value, tangent = geometry.tangent(lambda x: call(params, x, t, cond)[0], x, v)
                return jnp.sum(jnp.sin(tangent)), (value, tangent)

            compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

            def run(point, x):
                return jax.device_get(compiled(point, x, flat))

            def central(at, h=given.step):
                return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)

            (_, (value, tangent)), (gradients, gradient_x) = run(point, x)
            assert value.dtype == np.float64
            first = relative(tangent, central(lambda h: run(point, x + h * v)[0][1][0]))
            slopes = [
                (np.vdot(gradient_x, u), central(lambda h, u=u: run(point, x + h * u)[0][0]))
                for u in directions
            ]
            for path in given.paths:
                u = r.standard_normal(point[path].shape)

                def at(h, path=path, u=u):
                    return run(point | {path: point[path] + h * u}, x)[0][0]

                slopes.append((np.vdot(gradients[path], u), central(at)))
        assert all(abs(slope) > 1e-4 for _, slope in slopes)
        second = [relative(ours, slope) for ours, slope in slopes]
        print(f"jvp {first:.2e}, gradients of jvp", *(f"{error:.2e}" for error in second))
        assert max(first, *second) <= given.tolerance

    def test_derivatives_of_an_adapted_network(self, adapted):
        """Value, tangent and gradients of a scalar that holds both, with an adapter on every kernel
        that may have one: those of the merged network, and of central differences."""
        case, given = self.case, adapted
        size, r = given.size, np.random.default_rng(1)
        network, config = case.network(size.config, dtype=jnp.float64), case.config(size.config)
        base = case.params(case.random_torch_network(size.config), size.config)
        base = cast(base, np.float64)
        shapes = abstract_adapters(network.abstract, Lora(2, 1.4, ""))
        adapters = jax.tree.map(lambda s: 0.3 * r.standard_normal(s.shape), shapes)
        x, _, cond = case.inputs(size, len(given.times), given.length)
        x, text, extras = jax.tree.map(lambda a: a.astype(np.float64), (x, cond.text, cond.extras))
        cond, t = cond._replace(text=text, extras=extras), np.array(given.times)
        v = r.standard_normal(x.shape)
        flat, factors = flatten(base), flatten(adapters)
        assert len(factors) > 10 and all(path.endswith("kernel") for path in factors)
        whole = {path: flat[path] + 0.7 * (f.a @ f.b) for path, f in factors.items()}
        with jax.enable_x64(True):
            call = case.raw(network.apply, config)

            def loss(trained):
                params = merge_params(trained, base)
                value, tangent = geometry.tangent(lambda x: call(params, x, t, cond)[0], x, v)
                return jnp.sum(jnp.sin(tangent)) + jnp.sum(jnp.sin(value)), (value, tangent)

            compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (_, found), gradients = jax.device_get(compiled(adapters))
            (_, expected), dense = jax.device_get(compiled(unflatten(whole)))

            def at(h, u):
                return compiled(jax.tree.map(lambda p, u: p + h * u, adapters, u))[0][0]

            u = jax.tree.map(lambda p: r.standard_normal(p.shape), adapters)
            h = given.step
            slope = (8 * (at(h, u) - at(-h, u)) - (at(2 * h, u) - at(-2 * h, u))) / (12 * h)
        for ours, merged in zip(found, expected, strict=True):
            assert relative(ours, merged) <= 1e-9
        largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
        for path, gradient in flatten(gradients).items():
            of_kernel, f = flatten(dense)[path], factors[path]
            a = 0.7 * of_kernel @ np.swapaxes(f.b, -1, -2)
            b = 0.7 * np.swapaxes(f.a, -1, -2) @ of_kernel
            sides = tuple(range(of_kernel.ndim % 2, of_kernel.ndim - 2))
            b = b.sum(sides, keepdims=True)
            assert np.abs(gradient.a - a).max() <= 1e-9 * largest, path
            assert np.abs(gradient.b - b).max() <= 1e-9 * largest, path
        along = sum(map(np.vdot, jax.tree.leaves(gradients), jax.tree.leaves(u)))
        print(f"gradient along a direction: {relative(along, slope):.2e}")
        assert relative(along, slope) <= given.tolerance

    def test_bfloat16_is_close(self):
        case, size = self.case, self.case.bfloat16
        model, inputs = case.random_torch_network(size.config), case.inputs(size)
        params = cast(case.params(model, size.config), jnp.bfloat16)
        network = case.network(size.config, dtype=jnp.bfloat16)
        call = case.raw(network.apply, case.config(size.config))
        out, _ = jax.jit(call)(params, *inputs)
        assert out.dtype == jax.eval_shape(call, network.abstract, *inputs)[0].dtype == jnp.bfloat16
        exact = case.torch_call(model, size.config, *inputs)
        a, b = np.asarray(out, np.float32).ravel(), exact.ravel()
        assert np.isfinite(a).all()
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        print(f"cosine {cosine:.6f}")
        assert cosine > 0.999

    def test_fresh_parameters_are_usable(self, fresh):
        case, network = self.case, self.case.network(fresh.config)
        call = case.family.predictor(network.apply, case.config(fresh.config))

        @jax.jit
        def start(key, inputs):
            params = network.init(key)
            return params, call(params, *inputs)

        # This generator compiles faster.
        params, out = start(jax.random.key(0, impl="rbg"), case.inputs(fresh))
        flat = flatten(params)
        shapes = {k: (v.shape, v.dtype) for k, v in flatten(network.abstract).items()}
        assert {k: (v.shape, v.dtype) for k, v in flat.items()} == shapes
        assert {dtype for _, dtype in shapes.values()} == {np.dtype(np.float32)}
        assert np.isfinite(out).all() and np.abs(out).max() > 0
        kernels = flat[case.layers]
        assert not np.allclose(kernels[0], kernels[1])  # layers are drawn independently
        self.check_fresh(flat)

    def check_fresh(self, flat):
        """Further checks of fresh parameters, by path."""
