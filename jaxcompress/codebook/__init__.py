"""Weights as entries of a codebook: shared scalars, and vectors."""

from ._array import CodebookArray as CodebookArray
