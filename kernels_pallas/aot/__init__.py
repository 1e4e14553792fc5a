"""Compiling every kernel ahead of time, for chips that are not there."""
