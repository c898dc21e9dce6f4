"""Score forgetting distillation (SFD): SiD whose teacher reads another concept."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context
from gadjax.objectives.sid import SiD


@dataclass(frozen=True)
class SFD(SiD):
    """SiD(x0; T(c'), F(c)) for each prompt c, times `forget` where c' differs from c.

    c' is c with the words of data.forget replaced by data.replacement (arXiv 2409.11219): for a
    prompt of the concept to forget the student learns what the teacher draws for the other one, and
    for all others what it draws anyway, in the same distillation. Student and critic read c, the
    teacher c', in the maps of other terms too (`gad`, `anchor`). All else as in `sid`, the
    stop-gradients and options too, and the critic's loss, which has the factor as well. (The code:
    1 for SD 1.5 and 0.01 for CIFAR-10.)
    The code sums one batch of either kind; here the prompts decide how many of a batch are which.
    Not here: concepts found by a classifier, in place of words; prompts as embeddings.
    Cost: that of `sid`; the text encoders read two prompts a sample.
    """

    forget: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.forget < float("inf"):
            raise InputError(f"objective.sfd.forget: found {self.forget}; expected 0 or more")

    @property
    def needs(self):
        return replace(super().needs, override="forget")

    def __call__(self, context: Context):
        loss_B, metrics = super().__call__(context)
        return self.factor(context) * loss_B, metrics

    def critic_loss(self, context: Context):
        return self.factor(context) * super().critic_loss(context)

    def factor(self, context: Context):
        """`forget` [B] for prompts of the concept, 1 for the others."""
        return jnp.where(context.batch.label > 0, self.forget, 1.0)
