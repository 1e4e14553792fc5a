"""Drop and grow as SET and RigL write it down: loops over sorted lists."""

from __future__ import annotations

import numpy as np


def dropped(w: np.ndarray, kept: np.ndarray, rate: float) -> list[int]:
    """Positions of the fraction of the kept weights that is smallest."""
    among = [i for i in range(w.size) if kept.flat[i]]
    count = int(np.floor(rate * len(among) + 0.5))
    return sorted(among, key=lambda i: (abs(float(w.flat[i])), i))[:count]


def moved(
    w: np.ndarray, kept: np.ndarray, score: np.ndarray, rate: float, *, again: bool
) -> np.ndarray:
    """The next mask; ``again``: what was just dropped may grow at once."""
    gone = dropped(w, kept, rate)
    mask = kept.copy()
    mask.flat[gone] = False
    free = [i for i in range(w.size) if not mask.flat[i]]
    if not again:
        free = [i for i in free if i not in gone]
    # Of equal scores the last in order of position is kept, as by every pattern.
    order = sorted(free, key=lambda i: (-float(score.flat[i]), -i))
    mask.flat[order[: len(gone)]] = True
    return mask
