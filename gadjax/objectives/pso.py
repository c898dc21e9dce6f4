"""Pairwise sample optimisation (PSO): pictures of the data preferred to the student's own start."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.rollout import rollout
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class PSO(Addable):
    """-log sigmoid(beta (r(x_w) - r(x_l))), r(y) = mean|R(y_t) - y|^2 - mean|S(y_t) - y|^2.

    Tuning of a distilled student without a teacher (arXiv 2410.03190), in its offline form: x_w is
    a picture of the data, x_l what the reference R draws for its caption, from z in the student's
    steps. y_t = alpha y + sigma eps at the time of the student's drawn step, with one eps for both
    and for R and S, which predict x0 without guidance. R is frozen; its samples and errors are
    stop-gradiented, and gradients flow through S(y_t) alone.
    The paper's r is the log of the ratio of the densities of S and R for a step's end. For a step
    with Gaussian noise that is a difference of squares as here, times a factor of the time, for
    which beta stands at all times. This reading is second-hand: we have neither the paper's factors
    nor its code, and beta = 100 is ours.
    reference: source of R. The student's own start is the usual one.
    Not here: the online form, whose pairs are two samples of the student ranked by a reward.
    Students that add noise between their steps are refused: R draws by the ODE.
    Cost: 2 evaluations of the student with gradient, 2 of R, and R's steps from z.
    """

    beta: float = 100.0
    reference: str = "start"

    sources = ("reference",)

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise InputError(f"objective.pso.beta: found {self.beta}; expected more than 0")
        if not self.reference:
            raise InputError(
                "objective.pso.reference: found nothing; expected 'start', 'teacher', a diffusers "
                "folder or a workdir of gadjax train"
            )

    @property
    def needs(self) -> Needs:
        networks = {"pso/reference": self.reference}
        return Needs(images=True, few_step=True, next_latent=True, networks=networks)

    def __call__(self, context: Context):
        preferred = self.log_ratio(context, context.batch.x0)
        margin_B = preferred - self.log_ratio(context, self.reference_sample(context))
        metrics = {"margin": jnp.mean(margin_B), "preferred": jnp.mean(preferred)}
        return jax.nn.softplus(-self.beta * margin_B), metrics

    def log_ratio(self, context: Context, y):
        """r(y) [B], the log of the density ratio of student and reference up to beta."""
        y = sg(y)
        y_t = add_noise(context.schedule, y, context.normal("eps"), context.t_B)
        nets = (
            sg(context.net("pso/reference", y_t, context.t_B)),
            context.net("student", y_t, context.t_B),
        )
        reference_B, student_B = (sample_mean((net.x0 - y) ** 2) for net in nets)
        return reference_B - student_B

    def reference_sample(self, context: Context):
        """x0 [B, H, W, C] that R draws from z in the student's steps."""

        def reference(x, t_B):
            return context.net("pso/reference", x, t_B)

        grid = jnp.asarray(context.times) if context.grid_NB is None else context.grid_NB
        return rollout(reference, context.schedule, context.batch.noise, grid).end
