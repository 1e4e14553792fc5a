"""Operations that act position by position, and which of them keep zeros."""

from __future__ import annotations

ZERO_KEEPING = frozenset(
    {
        *("abs", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "conj", "erf"),
        *("erf_inv", "expm1", "floor", "imag", "log1p", "neg", "real", "round"),
        *("sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "copy", "copy_p"),
        *("convert_element_type", "reduce_precision", "stop_gradient"),
        *("sharding_constraint", "name", "pvary", "pcast"),
    }
)
"""Of one operand: ``f(0) == 0``."""

OTHER_UNARY = frozenset(
    {
        *(
            "acos",
            "acosh",
            "cos",
            "cosh",
            "digamma",
            "erfc",
            "exp",
            "exp2",
            "is_finite",
        ),
        *("lgamma", "log", "logistic", "not", "rsqrt", "population_count", "clz"),
        *("bessel_i0e", "bessel_i1e"),
    }
)
"""Of one operand, not zero at zero."""

ALL_ZERO = frozenset({"add", "sub", "add_any", "max", "min", "or", "xor", "atan2"})
"""Zero where all operands are."""

ANY_ZERO = frozenset({"mul", "and"})
"""Zero where any operand is."""

FIRST_ZERO = frozenset(
    {"div", "rem", "shift_left", "shift_right_arithmetic", "shift_right_logical"}
)
"""Zero where the first operand is."""

OTHER = frozenset(
    {
        *("eq", "ne", "lt", "le", "gt", "ge", "pow", "nextafter", "select_n", "clamp"),
        *("integer_pow", "igamma", "igammac", "complex", "regularized_incomplete_beta"),
        *("random_gamma_grad", "polygamma", "zeta", "erf_inv"),
    }
)
"""What they do with zeros is said in `keeps_zero`, or unknown."""

ELEMENTWISE = ZERO_KEEPING | OTHER_UNARY | ALL_ZERO | ANY_ZERO | FIRST_ZERO | OTHER


def keeps_zero(name: str, zeros: list[bool], power: int = 1) -> bool:
    """Whether an elementwise result is zero where the operands marked so are.

    Args:
      name: Of the operation.
      zeros: For each operand, whether it is known to be zero there.
      power: Of ``integer_pow``.
    """
    if name in ALL_ZERO or name in ZERO_KEEPING:
        return all(zeros)
    if name in ANY_ZERO:
        return any(zeros)
    if name in FIRST_ZERO:
        return zeros[0]
    if name == "integer_pow":
        return zeros[0] and power > 0
    if name == "select_n":
        return all(zeros[1:])
    return False
