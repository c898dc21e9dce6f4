"""DMM: several teachers merged into one network that knows them by a style in the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.errors import InputError, short_repr
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import uniform_timesteps
from gadjax.types import expand


@dataclass(frozen=True)
class DMM(Addable):
    """mean|S(x_t, t, c + style_i) - T_i(x_t, t, c)|^2 in the output, i the sample's style.

    (arXiv 2504.12364.) A network of many steps that has several teachers' styles in it. Each sample
    has one of the endings of data.styles in its prompt, by whose number i its teacher is chosen
    (`teachers`: sources in that order), which reads the prompt without it. In the paper the style
    is an embedding that is added to the time's; networks here have no such input.
    x_t is a point of T_i's own rollout from z at the run's guidance in `steps` steps, t uniform,
    where the paper has pictures with noise; both networks are compared without guidance.
    features: weight of the same distance between the tokens after `blocks` of both networks, their
      mean (the code: 0.002, with a U-Net's blocks); 0 for none. The paper's discriminator of
      several classes is not in its code, nor here.
    T_i and x_t are stop-gradiented. The result is sampled as a teacher is.
    Cost: 1 evaluation of the student; of each teacher 2 * steps + 1, as a sample's is chosen after
    them, and 2 more of both with `features`.
    """

    teachers: tuple[str, ...] = ()
    steps: int = 4
    features: float = 0.0
    blocks: tuple[int, ...] = ()

    sources = ("teachers",)

    def __post_init__(self):
        if len(self.teachers) < 2:
            raise InputError(
                f"objective.dmm.teachers: found {short_repr(self.teachers)}; expected the sources "
                "of two networks or more, one for each of data.styles"
            )
        check_count("dmm", "steps", self.steps, 1)
        if not 0 <= self.features < float("inf"):
            raise InputError(f"objective.dmm.features: found {self.features}; expected 0 or more")
        numbers = all(type(block) is int and block >= 0 for block in self.blocks)
        if not numbers or bool(self.features) != bool(self.blocks):
            raise InputError(
                f"objective.dmm.blocks: found {short_repr(self.blocks)} with features="
                f"{self.features}; expected block numbers from 0 with a weight, or neither"
            )

    @property
    def needs(self) -> Needs:
        named = {f"dmm/{i}": source for i, source in enumerate(self.teachers)}
        return Needs(networks=named, override="styles")

    def check_denoiser(self, denoiser: Denoiser) -> None:
        if any(not 0 <= block < denoiser.feature_blocks for block in self.blocks):
            raise InputError(
                f"objective.dmm.blocks: found {short_repr(self.blocks)}; expected numbers from 0 "
                f"to below {denoiser.feature_blocks}, the teacher's blocks with features"
            )

    def __call__(self, context: Context):
        batch, schedule = context.batch, context.schedule
        t_B = uniform_timesteps(context, 0.0, 1.0)
        grid = interpolate_times(jnp.full_like(t_B, schedule.last), t_B, self.steps)

        def point(name):
            def predict(x, t):
                return context.net(name, x, t, context.guidance, batch.override)

            return rollout(predict, schedule, batch.noise, grid).end

        names = [f"dmm/{i}" for i in range(len(self.teachers))]
        x_t = sg(self.by_teacher(context, [point(name) for name in names]))
        target = self.by_teacher(context, [self.raw(context, name, x_t, t_B) for name in names])
        output = context.denoiser.raw(context.student_params, x_t, t_B, batch.cond)
        loss_B = sample_mean((output - sg(target)) ** 2)
        if self.features:
            loss_B = loss_B + self.features * self.feature_loss(context, names, x_t, t_B)
        return loss_B, {}

    def raw(self, context: Context, name: str, x_t, t_B):
        """Raw output of a teacher, on the prompts without their endings."""
        return context.denoiser.raw(context.networks[name], x_t, t_B, context.batch.override)

    def by_teacher(self, context: Context, results: Sequence[jax.Array]):
        """Select each sample's teacher among results [B, ...] by teacher."""
        label_B = context.batch.label
        return sum(
            jnp.where(expand(label_B == i, x), x, jnp.zeros_like(x)) for i, x in enumerate(results)
        )

    def feature_loss(self, context: Context, names: Sequence[str], x_t, t_B):
        """Mean square distance [B] of the tokens, over `blocks`."""

        def tokens(params, cond):
            return context.denoiser.features(params, x_t, t_B, cond, blocks=self.blocks)

        student = tokens(context.student_params, context.batch.cond)
        theirs = [tokens(context.networks[name], context.batch.override) for name in names]
        pairs = zip(student, zip(*theirs, strict=True), strict=True)
        losses = [sample_mean((x - sg(self.by_teacher(context, ys))) ** 2) for x, ys in pairs]
        return sum(losses) / len(losses)
