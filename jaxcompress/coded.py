"""Leaves of one code an element, which another leaf may store in its own order."""

from __future__ import annotations

import abc
from typing import Any, Self

import jax

from jaxcompress.layout import Layout
from jaxcompress.leaf import Leaf
from kernels_pallas import packing


class CodedLeaf(Leaf):
    """A leaf that has an integer code for every element, and a *frame*: all else."""

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @abc.abstractmethod
    def elements(self) -> jax.Array:
        """``uint8[*stack, *out, K]`` codes in storage order."""

    @abc.abstractmethod
    def with_elements(self, codes: jax.Array) -> Self:
        """The leaf with other codes ``uint8[*stack, *out, K]``, unpacked."""

    @abc.abstractmethod
    def without_elements(self) -> Self:
        """The leaf without its codes, which are stored elsewhere."""


def split(values: Any, layout: Layout) -> tuple[jax.Array, CodedLeaf | None]:
    """Elements ``[*stack, *out, K]`` of an array or coded leaf, and its frame."""
    if isinstance(values, CodedLeaf):
        return values.elements(), values.without_elements()
    return layout.to_storage(values), None


def pack(elements: jax.Array, frame: CodedLeaf | None) -> jax.Array:
    """Codes packed along the last axis; values of no frame as they are."""
    return elements if frame is None else packing.pack(elements, bits=frame.bits)


def unpack(elements: jax.Array, frame: CodedLeaf | None, count: int) -> jax.Array:
    """Undo `pack`, of so many elements along the last axis."""
    if frame is None:
        return elements
    return packing.unpack(elements, bits=frame.bits, count=count)
