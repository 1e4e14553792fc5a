"""Errors that every operation raises alike."""

from __future__ import annotations

from typing import Any


def refuse(operation: str, argument: str, rule: str, got: Any, remedy: str) -> None:
    """Raise a `ValueError` that names all of it."""
    raise ValueError(f"{operation}: {argument} must {rule}; got {got}. {remedy}")
