"""Call of diffusers' Lumina2Transformer2DModel."""

from typing import Any

from gadjax.models.lumina2.config import Config
from gadjax.models.zimage.config import STEPS
from gadjax.types import Cond


def torch_call(network: Any, config: Config, x_BHWC: Any, t_B: Any, cond: Cond) -> Any:
    """Velocity [B, H, W, C] of Lumina2Transformer2DModel, which counts time from noise on, up to 1,
    and has the other sign.

    Args:
      network: of diffusers.
      config: the network's options.
      x_BHWC, t_B, cond: inputs of the predictor, as torch's tensors.
    """
    out = network(
        x_BHWC.permute(0, 3, 1, 2),
        timestep=1 - t_B / STEPS,
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.mask,
    )
    return -out.sample.permute(0, 2, 3, 1)
