"""Parts that the configurations of all families share."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from gadjax.errors import InputError

POSITIVE_INTEGER, POSITIVE_NUMBER = "a positive integer", "a positive number"


class BackboneConfig:
    """Options that every backbone has; those that only some have are here with their absence.

    Attributes:
      sample_size: side of the latents in training.
      in_channels: of the network's input.
      latent_channels: of the latents; in_channels unless the pipeline packs them.
      token_side: side in latents of a picture's token, for samplers whose grid depends on the size.
      last_time: largest timestep that the network is told.
      text_dim: width of the prompt embeddings.
      pooled_dim: width of the pooled prompt embedding; None without one.
      guidance_embeds: whether the guidance scale is an input of the network.
      feature_blocks: number of blocks after each of which `Denoiser.features` has the tokens; 0 for
        a family without such blocks.
    """

    sample_size: int
    in_channels: int
    text_dim: int
    pooled_dim: int | None = None
    guidance_embeds: bool = False
    feature_blocks: int = 0
    token_side: int = 2
    last_time: float = 1000.0

    @property
    def latent_channels(self) -> int:
        return self.in_channels


def refuse(key: str, value: Any, expected: str) -> NoReturn:
    """Refuse the value of an option. Raises: InputError."""
    raise InputError(f"{key}: found {value!r}; expected {expected}")


def is_positive(value: Any, *kinds: type) -> bool:
    """True for a positive value of one of these types; a bool is no int."""
    return type(value) in kinds and value > 0


def read_options(
    config: type,
    cfg: Mapping[str, Any],
    expected: str,
    *,
    fixed: Mapping[str, Any] | None = None,
    others: Collection[str] = (),
    keep_null: bool = False,
) -> dict[str, Any]:
    """Options of a diffusers config.json that are fields of a Config.

    Args:
      config: the Config, a dataclass.
      cfg: the content of the file. Keys that begin with "_" are about the file.
      expected: end of the message for an unknown option, which is refused unless it is null.
      fixed: option -> its one supported value; null, false and 0 are alike.
      others: keys that are read elsewhere or ignored.
      keep_null: return null values too; otherwise null means absent.

    Returns: the fields' values, as in the file.
    Raises: InputError for the first unknown option or unsupported value.
    """
    names, fixed = {f.name for f in fields(config)}, fixed or {}
    for key, value in cfg.items():
        if key in fixed and (value or None) != (fixed[key] or None):
            refuse(key, value, repr(fixed[key]))
        known = key in names or key in fixed or key in others or key.startswith("_")
        if not known and value is not None:
            refuse(key, value, expected)
    return {k: v for k, v in cfg.items() if k in names and (keep_null or v is not None)}
