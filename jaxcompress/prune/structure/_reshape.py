"""A reshape as the smallest pieces of axes with equal products."""

from __future__ import annotations

from collections.abc import Sequence


def pieces(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes become which; axes of size 1 are in none.

    Examples:
      >>> pieces((8, 6, 64), (8, 2, 3, 64))
      [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    olds = [i for i, n in enumerate(old) if n != 1]
    news = [j for j, n in enumerate(new) if n != 1]
    found = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(olds.pop(0))
                a *= old[left[-1]]
            else:
                right.append(news.pop(0))
                b *= new[right[-1]]
        found.append((left, right))
    return found
