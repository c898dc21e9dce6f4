"""Parameterizations of the network output (eps, v, x0, flow), to Prediction(x0, eps) and back.

With x_t = alpha x0 + sigma eps the four are
  eps;  x0;  v = alpha eps - sigma x0 (Salimans & Ho 2022);  flow = eps - x0 (Liu et al. 2022).
All conversions are exact where alpha and sigma are positive. In float32 they are ill-conditioned
at the ends: x0 from eps divides by alpha (1/157 at the end of PixArt's schedule), eps from x0 by
sigma (1/100 at its start), so rounding grows by that factor.
"""

from gadjax.types import Prediction, expand

PARAMETERIZATIONS = ("eps", "v", "x0", "flow")


def to_prediction(kind: str, raw, x_t, alpha, sigma) -> Prediction:
    """Convert a raw output to x0 and eps.

    Args:
      kind: one of PARAMETERIZATIONS.
      raw: network output, float32, of the shape of x_t.
      x_t: the network's input.
      alpha, sigma: [B] or scalars.

    Raises: ValueError for another kind.
    """
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    if kind == "eps":
        return Prediction((x_t - s * raw) / a, raw)
    if kind == "x0":
        return Prediction(raw, (x_t - a * raw) / s)
    if kind == "v":
        square = a**2 + s**2
        return Prediction((a * x_t - s * raw) / square, (s * x_t + a * raw) / square)
    if kind == "flow":
        return Prediction((x_t - s * raw) / (a + s), (x_t + a * raw) / (a + s))
    raise ValueError(kind)


def from_prediction(kind: str, prediction: Prediction, alpha, sigma):
    """Convert x0 and eps to the raw output: the regression target of denoising training.

    Args:
      kind: one of PARAMETERIZATIONS.
      prediction: x0 and eps.
      alpha, sigma: [B] or scalars.

    Raises: ValueError for another kind.
    """
    x0, eps = prediction
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return expand(alpha, x0) * eps - expand(sigma, x0) * x0
    if kind == "flow":
        return eps - x0
    raise ValueError(kind)
