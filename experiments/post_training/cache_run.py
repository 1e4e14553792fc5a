"""stories260k with a quantized cache: mean NLL on stories 1200-1229, greedy text.

python -m experiments.post_training.cache_run
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training.report import Report
from experiments.post_training.stories_run import LAYERS, TEST, VALIDATION

TOKENS = 200
FORMATS = {
    "float": None,
    "int8": jc.quant.int8(),
    "fp8_e4m3": jc.quant.fp8_e4m3(),
    "int4, asymmetric": jc.quant.integer(4, symmetric=False),
}


def empty(fmt: Any) -> Callable[..., Any]:
    """What makes the parts of a cache."""
    return jax.numpy.zeros if fmt is None else lambda s: jc.quant.kv_cache(s, fmt)


def same(ids: list[int], expected: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(ids, expected, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="not on the test part")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    part = data.stories(*(VALIDATION if options.validate else TEST), root)
    apply: Any = jc.lift(model.apply)
    expected = text.greedy(model.apply, params, [text.BOS], TOKENS)
    report = Report("cache_validation" if options.validate else "cache", __doc__)
    packed = jc.compress(params, {LAYERS: jc.quant.int8(axes=-2)})

    def cached(fmt: Any, weights: Any, tokens: Any) -> Any:
        cache = stories.init_cache(*tokens.shape, empty=empty(fmt))
        return apply(weights, cache, tokens, 0, method="decode")[0]

    for name, fmt in FORMATS.items():
        for kind, weights in {"float": params, "W8": packed}.items():
            nll = text.mean_nll(functools.partial(cached, fmt), weights, part)
            cache = stories.init_cache(1, TOKENS, empty=empty(fmt))
            ids = text.greedy(apply, weights, [text.BOS], TOKENS, cache=cache)
            report.add(kind, f"cache {name}", "", nll, same=same(ids, expected))


if __name__ == "__main__":
    main()
