"""Weights as entries of a codebook: shared scalars, and vectors."""
