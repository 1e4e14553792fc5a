"""Searches for the range of each block, as a number format names them.

A format without a search takes the largest weight, so that nothing is clipped.
"""

from __future__ import annotations

from jaxcompress.leaf import static_type


@static_type
class MSE:
    """Settings of `mse`."""

    steps: int
    shrink: float

    @property
    def label(self) -> str:
        """For reports."""
        return "mse"


@static_type
class Percentile:
    """Settings of `percentile`."""

    percent: float

    @property
    def label(self) -> str:
        """For reports."""
        return f"p{self.percent:g}"


@static_type
class HQQ:
    """Settings of `hqq`."""

    steps: int
    norm: float
    beta: float
    growth: float

    @property
    def label(self) -> str:
        """For reports."""
        return "hqq"


Search = MSE | Percentile | HQQ


def mse(*, steps: int = 40, shrink: float = 0.2) -> MSE:
    r"""The range of least squared error, of those from the full one to a part of it.

    .. math:: \min_r \sum_i h_i\,(w_i - \hat w_i(r))^2,
        \quad r \in \{1, 1 - (1 - a)/n, \dots, a\}

    for each block on its own, with :math:`h = 1`; where statistics of the inputs are
    there (`round_weight` in a sweep, `awq_weight`), the error is that of the block's
    outputs. With a zero point both ends shrink together, then the lower one alone,
    then the upper one. Scales that are powers of two are also tried doubled.

    Args:
      steps: How many ratios below one, :math:`n`; a pass over the weight each (three
        with a zero point). Neither memory nor compile time depends on it.
      shrink: The smallest ratio, :math:`a`, in (0, 1).

    Returns:
      For ``search=`` of a number format, or ``method=`` of `activation_range`. The
      error is never above that of the full range, which wins ties: so a weight that
      lies on a grid keeps it.

    Raises:
      ValueError: If `steps` or `shrink` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.quant import int2, mse, quantize
      >>> w = jnp.array([[0.5], [-0.5], [0.5], [0.8]])
      >>> f"{quantize(w, int2(search=mse())).scales().item():.2f}"
      '0.58'

    References:
      Banner et al., `Post-training 4-bit quantization
      <https://arxiv.org/abs/1810.05723>`_, 2019, section 3 (clipping by squared
      error); Nagel et al., `A White Paper on Neural Network Quantization
      <https://arxiv.org/abs/2106.08295>`_, 2021, eq. 12. Differs: a grid of ratios;
      with a zero point a search along the ends in turn.
    """
    if steps < 1 or not 0 < shrink < 1:
        raise ValueError(
            f"mse: steps must be positive and shrink in (0, 1); got {steps}, {shrink}."
        )
    return MSE(steps=steps, shrink=float(shrink))


def percentile(percent: float) -> Percentile:
    """The range that holds so many percent of each block; the rest is clipped.

    Args:
      percent: In (50, 100]: of the magnitudes; with a zero point, of the weights from
        below for the upper end, and from above for the lower.

    Returns:
      For ``search=`` of a number format (nearest rank: a weight of the block) or
      ``method=`` of `activation_range` (off a histogram).

    Raises:
      ValueError: If `percent` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.quant import int2, percentile, quantize
      >>> w = jnp.array([[0.5], [-0.5], [0.5], [9.0]])
      >>> quantize(w, int2(search=percentile(75))).materialize()[:, 0].tolist()
      [0.5, -0.5, 0.5, 0.5]
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percentile: percent must be in (50, 100]; got {percent}.")
    return Percentile(percent=float(percent))


def hqq(
    *, steps: int = 20, norm: float = 0.7, beta: float = 10.0, growth: float = 1.01
) -> HQQ:
    r"""Half-quadratic quantization: scales of small :math:`l_p` error, without data.

    .. math::
        e &\leftarrow \operatorname{shrink}_{p, \beta}(w - \hat w), \quad
        \operatorname{shrink}(x) = \operatorname{sign}(x)
            \max(0, |x| - |x|^{p - 1} / \beta) \\
        z &\leftarrow \langle q - (w - e) / s \rangle, \quad
        s \leftarrow \frac{\sum (q - z)(w - e)}{\sum (q - z)^2}, \quad
        \beta \leftarrow \kappa \beta

    Large errors go to :math:`e` and no longer pull at the grid.

    Args:
      steps: Iterations.
      norm: :math:`p` in (0, 1].
      beta: :math:`\beta` of the first iteration.
      growth: :math:`\kappa`.

    Returns:
      For ``search=`` of a number format with floating scales. The iterate of least
      :math:`\sum |w - \hat w|^p`, each block for itself: never above the full range's.

    Raises:
      ValueError: If an option is out of range.

    Examples:
      >>> from jaxcompress.quant import hqq, int4
      >>> int4(group_size=64, symmetric=False, search=hqq()).name
      'uint4 g64 hqq'

    References:
      Badri and Shaji, `Half-Quadratic Quantization of Large Machine Learning Models
      <https://mobiusml.github.io/hqq_blog/>`_, 2023, eq. 3-6. Differs: the zero point
      is an integer, so that zero stays on the grid, and the scale is solved too;
      the grid never grows beyond the full range; :math:`\beta` is in units of the
      first scale, so that it does not depend on the weights' magnitude; no early
      stop, but the best iterate of each block.
    """
    if steps < 1 or not 0 < norm <= 1 or beta <= 0 or growth < 1:
        raise ValueError(
            "hqq: steps and beta must be positive, norm in (0, 1] and growth at least "
            f"1; got {steps}, {beta}, {norm} and {growth}."
        )
    return HQQ(steps=steps, norm=float(norm), beta=float(beta), growth=float(growth))
