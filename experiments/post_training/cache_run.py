"""stories260k with a quantized cache: mean NLL on stories 1200-1229, greedy text.

Means and deviations of the keys' channels are those of stories 0-15. Formats were
compared by the error of the logits on those stories.

    python -m experiments.post_training.cache_run [--validate]
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training.report import Report
from experiments.post_training.stories_run import LAYERS, TEST, VALIDATION

TOKENS = 200
CALIBRATION = (0, 16)


class Kind(NamedTuple):
    """A format of keys and values, and whether the keys' channels are normalized."""

    fmt: Any
    normalized: bool


ASYMMETRIC = jc.quant.integer(8, symmetric=False, group_size=4)
KINDS = {
    "float": Kind(None, False),
    "int8": Kind(jc.quant.int8(), False),
    "int8, normalized": Kind(jc.quant.int8(), True),
    "int8 g4": Kind(jc.quant.int8(group_size=4), False),
    "int8 g4, normalized": Kind(jc.quant.int8(group_size=4), True),
    "uint8 g4, normalized": Kind(ASYMMETRIC, True),
    "fp8_e4m3": Kind(jc.quant.fp8_e4m3(), False),
    "uint4, normalized": Kind(jc.quant.integer(4, symmetric=False), True),
    "uint4": Kind(jc.quant.integer(4, symmetric=False), False),
}


def channels(model: stories.Stories, params: Any, root: Path | None) -> dict[str, Any]:
    """Mean and deviation of each channel of the keys, ``[layers, 1, 1, heads, 8]``."""
    ids = np.concatenate(data.stories(*CALIBRATION, root))
    rows = ids[: len(ids) // stories.CONTEXT * stories.CONTEXT]
    tokens = jnp.asarray(rows.reshape(-1, stories.CONTEXT), jnp.int32)
    empty = stories.init_cache(len(tokens))
    cache: Any = model.apply(params, empty, tokens, 0, method="decode")[1]
    over = {"axis": (1, 2), "keepdims": True}
    return {"mean": cache.key.mean(**over), "deviation": cache.key.std(**over)}


def init_cache(kind: Kind, sides: dict[str, Any], *size: int) -> stories.Cache:
    """An empty cache for a batch and length."""
    dense = stories.init_cache(*size)
    if kind.fmt is None:
        return dense
    make: Any = functools.partial(jc.quant.kv_cache, dense.key.shape, kind.fmt)
    return stories.Cache(make(**sides if kind.normalized else {}), make())


def nbytes(cache: stories.Cache) -> int:
    """Bytes of a cache."""
    return sum(a.nbytes for a in jax.tree.leaves(cache))


def same(ids: list[int], expected: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(ids, expected, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="not on the test part")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    sides = channels(model, params, root)
    part = data.stories(*(VALIDATION if options.validate else TEST), root)
    apply: Any = jc.lift(model.apply)
    expected = text.greedy(model.apply, params, [text.BOS], TOKENS)
    seen = jnp.asarray([np.concatenate(data.stories(*CALIBRATION, root))[:512]])
    logits = model.apply(params, seen)
    name = "cache_validation" if options.validate else "cache"
    report = Report(name, __doc__, resume=options.resume)
    packed = jc.compress(params, {LAYERS: jc.quant.int8(axes=-2)})
    full = nbytes(stories.init_cache(1, TOKENS))

    def cached(kind: Kind, weights: Any, tokens: Any) -> Any:
        cache = init_cache(kind, sides, *tokens.shape)
        return apply(weights, cache, tokens, 0, method="decode")[0]

    for name, kind in KINDS.items():
        for model_name, weights in {"float": params, "W8": packed}.items():
            if (model_name, f"cache {name}") in report:
                continue
            run = functools.partial(cached, kind)
            gap = jax.jit(run)(weights, seen) - logits
            nll = text.mean_nll(run, weights, part)
            cache = init_cache(kind, sides, 1, TOKENS)
            ids = text.greedy(apply, weights, [text.BOS], TOKENS, cache=cache)
            report.add(
                model_name,
                f"cache {name}",
                "",
                round(nll, 4),
                logits_rms=round(float(jnp.sqrt(jnp.square(gap).mean())), 4),
                same=same(ids, expected),
                percent=round(100 * nbytes(cache) / full, 1),
            )


if __name__ == "__main__":
    main()
