"""DisBack: DMD with a teacher that returns along the path on which it was degraded."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.dmd import DMD


@dataclass(frozen=True)
class DisBack(DMD):
    """DMD whose teacher is, in equal parts of the run, path[0], path[1], ..., then the teacher.

    The path leads from a network that fits the student's first samples back to the teacher, so
    that the two scores are close from the beginning (arXiv 2408.15991). It is made before: a run of
    `dmd` with optim.lr = 0 trains a critic on the student that does not move, and its checkpoints,
    in falling order, are the path: ("WORKDIR@critic@300", "WORKDIR@critic@200", ...).
    until: share of the run after which the teacher itself is matched.
    All else, and what is stop-gradiented, as in `dmd`; its critic too. The official code loads its
    checkpoints under names that match nothing, so that its teacher never changes.
    Cost: that of DMD, without a KV cache of the prompts; the path's networks are held beside the
    teacher, and one more copy while one is chosen.
    """

    path: tuple[str, ...] = ()
    until: float = 0.5

    sources = ("path",)

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise InputError(
                "objective.disback.path: found nothing; expected the sources of degraded teachers, "
                "such as ('WORKDIR@critic@200', 'WORKDIR@critic@100')"
            )
        if not 0 < self.until <= 1:
            raise InputError(
                f"objective.disback.until: found {self.until}; expected a share above 0 and up to 1"
            )

    @property
    def needs(self) -> Needs:
        named = {f"disback/{i}": source for i, source in enumerate(self.path)}
        return replace(super().needs, networks=named, teacher=True)

    def __call__(self, context: Context):
        return super().__call__(replace(context, teacher=self.teacher(context)))

    def teacher(self, context: Context):
        """(x_BHWC, t_B, scale) -> Prediction of the network that the path has reached."""
        count = len(self.path)
        index = jnp.clip(jnp.floor(context.share / self.until * count), 0, count)
        nets = *(context.networks[f"disback/{i}"] for i in range(count)), context.teacher_params
        params = jax.tree.map(lambda *of: jax.lax.select_n(jnp.int32(index), *of), *nets)

        def predict(x, t_B, scale=None):
            scale = context.guidance if scale is None else scale
            batch = context.batch
            return context.denoiser.guided(params, x, t_B, batch.cond, batch.null, scale)

        return predict
