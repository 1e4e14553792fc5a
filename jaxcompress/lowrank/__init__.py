"""Weights as products of thin factors."""
