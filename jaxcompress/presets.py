"""Schemes by the names the field gives them: weight bits, activation bits.

Each is a rule as `compress`, `plan` and `select` take it. Weights are symmetric;
``A16`` leaves activations in the model's own floating dtype.
"""

from __future__ import annotations

from jaxcompress.quant import (
    E4M3,
    Integer,
    dynamic,
    fp8_e4m3,
    int4,
    int8,
    mxfp4,
    nvfp4,
    static,
)

_INT8 = Integer(bits=8)

W8A16 = int8()
"""int8 weights, a scale for each output channel."""

W4A16 = int4(group_size=128)
"""int4 weights, a scale for each 128 inputs."""

W8A8 = int8(activations=dynamic(_INT8))
"""int8 weights a channel, int8 activations a token."""

W4A8 = int4(activations=dynamic(_INT8))
"""int4 weights a channel, int8 activations a token."""

FP8 = fp8_e4m3(activations=static(E4M3))
"""e4m3 weights a channel, e4m3 activations with one calibrated scale."""

FP8_DYNAMIC = fp8_e4m3(activations=dynamic(E4M3))
"""e4m3 weights a channel, e4m3 activations a token."""

MXFP4 = mxfp4()
"""OCP microscaling fp4 weights."""

NVFP4 = nvfp4()
"""NVIDIA's two-level fp4 weights."""
