"""Weights that share values by hashing: no index is stored."""
