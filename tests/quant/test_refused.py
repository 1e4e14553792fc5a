"""What `quantize` and formats refuse, and how formats are named."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from tests.quant.oracles import UNEVEN


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.integer(1), "integer: bits must be 2 to 8; got 1"),
        (lambda: q.integer(9), "integer: bits must be 2 to 8; got 9"),
        (lambda: q.log(1), "log: bits must be 2 to 8; got 1"),
        (lambda: q.normal(9), "normal: bits must be 2 to 8; got 9"),
        (lambda: q.lloyd(0), "lloyd: bits must be 2 to 8; got 0"),
        (
            lambda: q.int4(group_size=8, granularity=q.PerTensor()),
            r"int4: give group_size or granularity, not both; got 8 and PerTensor\(\)",
        ),
        (lambda: q.nf4(group_size=0), "nf4: group_size must be positive; got 0"),
        (
            lambda: q.int8(rounding="up"),
            r"int8: rounding must be one of .*'toward_zero'\); got 'up'",
        ),
        (
            lambda: q.int8(scale_dtype=np.int32),
            r"int8: scale_dtype must be one of .*'float16'\); got int32",
        ),
        (lambda: q.mxfp4(group_size=16), r"mxfp4: \['group_size'\] are fixed"),
        (
            lambda: q.nvfp4(scale_dtype=np.float32),
            r"nvfp4: \['scale_dtype'\] are fixed",
        ),
        (
            lambda: q.mxint8(granularity=q.PerTensor()),
            r"mxint8: \['granularity'\] are fixed",
        ),
    ],
)
def test_formats_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


W = np.ones((8, 6), np.float32)
STATIC = q.int8(activations=q.static(q.Integer(bits=8)))


@pytest.mark.parametrize(
    ("w", "fmt", "axes", "message"),
    [
        (
            W,
            q.int4(group_size=3),
            None,
            r"group_size must divide .* of 'w', 8; got 3.*\[1, 2, 4, 8\]",
        ),
        (W, q.mxfp4(), None, "group_size must divide .* of 'w', 8; got 32"),
        (
            W,
            q.int4(granularity=q.Block2D(out=4, contract=8)),
            None,
            "block of outputs must divide the last output axis of 'w', 6; got 4",
        ),
        (
            W,
            q.int4(granularity=q.Block2D(out=6, contract=5)),
            None,
            "block of inputs must divide the flattened .* of 'w', 8; got 5",
        ),
        (
            W,
            q.int4(granularity=q.PerChannel(axes=(1,))),
            None,
            r"axes must be negative .*; got \(1,\) for shape \(8, 6\)",
        ),
        (
            W,
            q.int4(granularity=q.PerChannel(axes=(-3,))),
            None,
            r"axes must be negative .*; got \(-3,\)",
        ),
        (W, q.int4(rounding="stochastic"), None, "stochastic rounding needs a key"),
        (W, STATIC, None, "need their calibrated scale"),
        (
            np.ones((2, 3, 4), np.float32),
            q.int4(),
            None,
            r"contracting axes of 'w', of shape \(2, 3, 4\), cannot be told",
        ),
        (W, q.int4(), 0, r"axes must be distinct and negative.*got \(0,\)"),
        (W, q.int4(), (-1, -1), r"axes must be distinct .*got \(-1, -1\)"),
        (W, q.int4(), (), r"axes must be distinct .*got \(\)"),
        (
            W,
            q.int4(),
            jc.Axes(contract=(-2,), stack=1),
            r"axes must be distinct and negative.*got \(-2,\)",
        ),
        (np.float32([[1, np.nan]]), q.int4(), None, "'w' has 1 NaN or infinite of 2"),
        (np.float32([[np.inf, 1]]), q.int4(), None, "'w' has 1 NaN or infinite of 2"),
        (np.ones((0, 4), np.float32), q.int4(), None, r"'w' has shape \(0, 4\)"),
        (np.ones((), np.float32), q.int4(), None, r"'w' has shape \(\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    w: Any, fmt: Any, axes: Any, message: str
) -> None:
    match = rf"quantize to {re.escape(fmt.name)}: .*{message}"
    with jax.debug_nans(False), pytest.raises(ValueError, match=match):
        q.quantize(jnp.asarray(w), fmt, axes=axes)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_weights_that_are_not_real_floats_are_refused(dtype: Any) -> None:
    w = jnp.ones((4, 4), dtype)
    name = w.dtype.name
    with pytest.raises(TypeError, match=f"int4: .*real floating.*'layer/w' is {name}"):
        q.quantize(w, q.int4(), path="layer/w")


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (q.int4(group_size=128), "int4 g128"),
        (q.int4(symmetric=False), "uint4"),
        (q.int8(granularity=q.PerTensor()), "int8 per tensor"),
        (q.int8(granularity=q.PerChannel(axes=(-2,))), "int8 per axes (-2,)"),
        (q.fp8_e4m3(granularity=q.Block2D(out=32, contract=16)), "fp8_e4m3 32x16"),
        (q.table(UNEVEN, name="uneven"), "uneven"),
        (q.log(4), "log4"),
        (q.normal(3), "normal3"),
        (q.lloyd(3), "lloyd_max3"),
        (q.mxfp8(element=q.E5M2), "mxfp8_e5m2"),
        (q.nvfp4(), "nvfp4"),
        (
            q.int8(activations=q.dynamic(q.Integer(bits=8))),
            "int8 + int8 activations per token",
        ),
        (
            q.fp8_e4m3(activations=q.static(q.E4M3)),
            "fp8_e4m3 + fp8_e4m3 activations static",
        ),
    ],
)
def test_reports_name_formats_as_the_field_does(fmt: Any, name: str) -> None:
    assert fmt.name == name
