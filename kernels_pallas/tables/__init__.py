"""Block sizes measured to be best, by device kind and shape: see `kernels_pallas.tune`.

``<device kind>.json`` beside this file maps a key of `key` to the settings of the form
that runs there. Where there is no entry, the heuristic of the form decides.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

from kernels_pallas.layouts import Stored, width

FOLDER = pathlib.Path(__file__).parent


def key(m: int, stored: Stored) -> str:
    """What a measurement holds for: 1, up to 8, 16, 32 ... rows of one weight shape.

    Examples:
      >>> from kernels_pallas.formats import INT4
      >>> key(9, Stored(INT4, 4096, 4096, 32))
      'portable 4 bits, 32 groups, 4096 x 4096, 16 rows'
    """
    rows = 1 if m == 1 else max(8, 1 << (m - 1).bit_length())
    return (
        f"{stored.layout.name} {width(stored.fmt)} bits, {stored.groups} groups, "
        f"{stored.n} x {stored.k}, {rows} rows"
    )


def tuned(kind: str, m: int, stored: Stored) -> dict[str, Any] | None:
    """The best settings measured on this kind of device, or None.

    Args:
      kind: As `Target.kind`.
      m: Rows of x.
      stored: The weight.
    """
    return _table(kind).get(key(m, stored))


def path(kind: str) -> pathlib.Path:
    """The file of a kind of device."""
    return FOLDER / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def _table(kind: str) -> dict[str, dict[str, Any]]:
    file = path(kind)
    if not file.exists():
        return {}
    entries = json.loads(file.read_text())["entries"]
    return {name: entry["settings"] for name, entry in entries.items()}
