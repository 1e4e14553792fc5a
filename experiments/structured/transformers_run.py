"""Heads, MLP width and layers removed from MiniLM and stories260k, without tuning.

Units go by group norms, or by the Taylor scores of a loss: next tokens of stories, and
how near cosines come to what people said of sentence pairs. Layers go by influence.
MiniLM: Spearman correlation x100 on STS-B test; stories: mean NLL on stories 1200-1229.
What is left is compared with the whole model with zeros in place of what went; where a
layer went, with the unstacked model that passes it over.

    python -m experiments.structured.transformers_run [--resume] [--models stories]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import minilm, sentences, stories, text
from experiments.post_training import stories_run
from experiments.post_training.report import Report
from experiments.structured.resnet_run import RESULTS, seconds_of, speed_up

LENGTH, ROWS, BATCHES = 32, 32, 8
STORIES_LENGTH, STORIES_BATCHES = 256, 8
FRACTIONS = (0.25, 0.5)


class Case(NamedTuple):
    """A model, its data and what is called head and MLP width in it.

    Attributes:
      fn: ``fn(params, *batch)``.
      params: Dense.
      batches: For scores of layers and equality, arguments of `fn`.
      saliency: Taylor scores of all weights.
      score: Of ``(fn, params)`` on the test part.
      heads: A weight, an axis of it and how many positions of that are one head.
      width: A weight and an axis of it.
      layers: A weight whose axis 0 counts the layers.
      without_layer: The unstacked model without layer i, as a function of the batch.
    """

    fn: Callable[..., Any]
    params: Any
    batches: list[Any]
    saliency: Any
    score: Callable[[Any, Any], float]
    heads: tuple[str, int, int]
    width: tuple[str, int]
    layers: str
    without_layer: Callable[[int], Callable[..., jax.Array]]


def passing_over(
    model: Any, params: Any, unchanged: Callable[[Any], Any]
) -> Callable[[int], Callable[..., jax.Array]]:
    """Runs of an unstacked model that pass one of its layers over.

    Args:
      model: Of modules `layers_0`, `layers_1` and so on.
      params: Its params.
      unchanged: What a layer that does nothing returns, of its arguments.
    """

    def without(i: int) -> Callable[..., jax.Array]:
        def call(go_on: Any, args: Any, kwargs: Any, context: Any) -> Any:
            here = context.module.name == f"layers_{i}"
            return unchanged(args) if here else go_on(*args, **kwargs)

        def run(*batch: jax.Array) -> jax.Array:
            with nn.intercept_methods(call):
                return model.apply(params, *batch)

        return run

    return without


def stories_case(root: Path | None) -> Case:
    """Groups of two query heads with the keys and values that they share."""
    model, params = stories.load(root=root)
    apply: Any = model.apply
    windows = stories_run.windows(root, STORIES_LENGTH + 1, mixed=True)
    chosen = windows[:STORIES_BATCHES]

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(apply(params, tokens[:, :-1]))
        found = jnp.take_along_axis(logs, tokens[:, 1:, None], -1)
        return -found.mean()

    test = data.stories(1200, 1230, root)
    return Case(
        fn=model.apply,
        params=params,
        batches=[(tokens[:, :-1],) for (tokens,) in chosen],
        saliency=jc.prune.saliency("taylor", loss, params, chosen),
        score=lambda fn, params: text.mean_nll(fn, params, test),
        heads=("params/layers/attention/wk/kernel", 2, stories.HEAD),
        width=("params/layers/w1/kernel", 2),
        layers="params/layers/w1/kernel",
        without_layer=passing_over(
            *stories.load(scan=False, root=root), lambda args: (args[0], args[2])
        ),
    )


def padded(texts: list[str]) -> tuple[jax.Array, jax.Array]:
    """Ids and mask, cut or filled up to `LENGTH`."""
    ids = np.zeros((len(texts), LENGTH), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, found in enumerate(sentences.tokenizer().encode_batch(texts)):
        n = min(LENGTH, len(found.ids))
        ids[row, :n], mask[row, :n] = found.ids[:n], True
    return jnp.asarray(ids), jnp.asarray(mask)


def minilm_case(root: Path | None) -> Case:
    """Twelve heads a layer."""
    model, params = minilm.load(scan=True)
    embed: Any = model.apply
    train, test = (data.sts(f"stsb_{part}", root) for part in ("train", "test"))
    order = np.random.default_rng(0).permutation(len(train.first))
    pairs = []
    for i in range(BATCHES):
        rows = order[i * ROWS : (i + 1) * ROWS]
        first, second = (
            padded([side[r] for r in rows]) for side in (train.first, train.second)
        )
        pairs.append((*first, *second, jnp.asarray(train.scores[rows], jnp.float32)))

    def loss(params: Any, a: Any, am: Any, b: Any, bm: Any, said: Any) -> jax.Array:
        cosines = (embed(params, a, am) * embed(params, b, bm)).sum(-1)
        return jnp.square(cosines - said / 5.0).mean()

    def score(fn: Any, params: Any) -> float:
        vectors = sentences.encode(fn, params, test.first + test.second)
        return sentences.spearman(test, vectors)

    return Case(
        fn=model.apply,
        params=params,
        batches=[pair[:2] for pair in pairs],
        saliency=jc.prune.saliency("taylor", loss, params, pairs),
        score=score,
        heads=("params/layers/attention/key/kernel", 2, minilm.WIDTH // minilm.HEADS),
        width=("params/layers/intermediate/kernel", 2),
        layers="params/layers/intermediate/kernel",
        without_layer=passing_over(*minilm.load(), lambda args: args[0]),
    )


def group_of(graph: Any, path: str, axis: int, each: int = 1) -> Any:
    """The group whose units are `each` positions of a weight's axis."""
    (found,) = {
        g.number
        for g in graph.removable
        for m in g.members
        if (m.path, m.axis, m.positions.shape[1]) == (path, axis, each)
        and g.size * each == graph.shapes[path][axis]
        and len(g.members) > 2
    }
    return graph.groups[found]


def lowest(importance: np.ndarray, fraction: float) -> np.ndarray:
    """The least important units, of every layer as many."""
    count = round(fraction * importance.shape[-1])
    order = np.argsort(importance, -1, kind="stable")
    gone = np.zeros(importance.shape, bool)
    np.put_along_axis(gone, order[..., :count], True, axis=-1)
    return gone


def run(case: Case, name: str, report: Report) -> None:
    """Every part, every fraction, both scores."""
    graph = jc.prune.dependency_graph(case.fn, case.params, *case.batches[0])
    flat = jc.tree.flatten(case.params)[0]
    groups = {
        "heads": group_of(graph, *case.heads),
        "MLP width": group_of(graph, *case.width),
    }
    dense = seconds_of(case.fn, case.params, *case.batches[0])

    def add(method: str, units: dict[int, np.ndarray], same: Any = None) -> None:
        if (name, method) in report:
            return
        removal = jc.prune.Removal.of(graph, units)
        fn, small = removal.smaller(case.fn), removal.take(case.params)
        found = jax.jit(fn)(small, *case.batches[0])
        same = same or functools.partial(case.fn, removal.mask(case.params))
        masked = jax.jit(same)(*case.batches[0])
        difference = float(jnp.abs(found - masked).max() / jnp.abs(masked).max())
        cost = jc.prune.Cost(graph)
        report.add(
            name,
            method,
            "",
            case.score(fn, small),
            from_masked=difference,
            parameters_ratio=round(cost({}).parameters / cost(units).parameters, 3),
            flops_ratio=round(cost({}).flops / cost(units).flops, 3),
            speed_up=speed_up(dense, seconds_of(fn, small, *case.batches[0])),
        )

    if (name, "dense") not in report:
        report.add(name, "dense", "", case.score(case.fn, case.params))
    importances = {
        "group norm": jc.prune.group_norm(),
        "Taylor": jc.prune.saliency_sum(case.saliency),
    }
    for kind, importance in importances.items():
        scores = {n: importance(graph, g, flat) for n, g in groups.items()}
        for fraction in FRACTIONS:
            chosen = {n: lowest(s, fraction) for n, s in scores.items()}
            for part, gone in chosen.items():
                units = {groups[part].number: gone}
                add(f"{part} -{fraction:.0%}, {kind}", units)
        both = {groups[n].number: lowest(s, FRACTIONS[0]) for n, s in scores.items()}
        add(f"heads and width -{FRACTIONS[0]:.0%}, {kind}", both)
    layers = next(
        g
        for g in graph.removable
        for m in g.members
        if (m.path, m.axis) == (case.layers, 0)
    )
    for i in range(layers.size):
        gone = {layers.number: np.arange(layers.size) == i}
        add(f"layer {i}", gone, case.without_layer(i))


CASES = {"stories": stories_case, "minilm": minilm_case}


def main() -> None:
    """Both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    report = Report("transformers", __doc__, folder=RESULTS, resume=options.resume)
    for name in options.models:
        run(CASES[name](options.data_dir), name, report)


if __name__ == "__main__":
    main()
