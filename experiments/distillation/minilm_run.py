"""MiniLM teaches encoders of three and of two of its six layers, on STS-B.

The teacher is all-MiniLM-L6-v2 after one epoch on STS-B's scores. Students begin as
layers of the teacher and keep its embeddings, which are not trained; they see every
second pair once.

    python -m experiments.distillation.minilm_run [--validate] [--resume]
        [--teacher FILE]

Scores are Spearman correlations x100 on STS-B test (`--validate`: dev).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation.training import SEEDS, Seen, train
from experiments.models import minilm, sentences
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
LENGTHS, BATCH, EPOCHS, WARMUP = (16, 32), 32, 1, 20
TEACHER_RATE, LEARNING_RATE = 3e-5, 1e-4
STUDENTS = (3, 2)
HIDDEN = "MiniLM/**/output_norm"
Method = Callable[[Seen], jax.Array]


class Batch(NamedTuple):
    """Pairs of sentences, all the first ones before all the second ones.

    Attributes:
      ids: ``int32[2 pairs, length]``.
      mask: ``bool[2 pairs, length]``, false for padding.
      scores: ``float32[pairs]`` in [0, 1].
      vectors: ``float32[2 pairs, 384]`` of the teacher.
    """

    ids: np.ndarray
    mask: np.ndarray
    scores: np.ndarray
    vectors: np.ndarray


def people(seen: Seen) -> jax.Array:
    """Squared difference of cosines from what people said."""
    first, second = jnp.split(seen.student, 2)
    return jnp.square((first * second).sum(-1) - seen.labels.scores).mean()


def scores_of_pairs(seen: Seen) -> jax.Array:
    """The teacher's cosines, and people's."""
    (a, b), (c, d) = (jnp.split(v, 2) for v in (seen.student, seen.teacher))
    return people(seen) + jc.distill.pair_cosine((a, b), (c, d)).mean()


def cosine(seen: Seen) -> jax.Array:
    """The directions of the teacher's vectors, and people's scores."""
    found = jc.distill.cosine_embedding(seen.student, seen.teacher)
    return people(seen) + found.mean()


def relational(seen: Seen) -> jax.Array:
    """Distances within a batch, and people's scores."""
    found = jc.distill.relational_distance(seen.student, seen.teacher)
    return people(seen) + found.mean()


def hidden(seen: Seen) -> jax.Array:
    """Every layer the teacher's it stands for, the vectors, and people's scores."""
    (student,), (teacher,) = seen.student_taps.values(), seen.teacher_taps.values()
    chosen = np.array(jc.distill.layer_map(len(student), len(teacher)))
    where = jnp.broadcast_to(seen.labels.mask, student.shape[:-1])
    found = jc.distill.hint(student, teacher[chosen], normalize=True, where=where)
    return cosine(seen) + found.sum() / where.sum()


METHODS: dict[str, Method] = {
    "plain": people,
    "scores of pairs": scores_of_pairs,
    "vectors": cosine,
    "relational": relational,
    "vectors, hidden": hidden,
}


def batches(pairs: data.Pairs, vectors: np.ndarray, seed: int) -> Iterator[Batch]:
    """Pairs of like length together, cut at the longest; shuffled for every epoch."""
    n, rng = len(pairs.scores), np.random.default_rng(seed)
    encodings = sentences.tokenizer().encode_batch(pairs.first + pairs.second)
    rows = [encoding.ids[: LENGTHS[-1]] for encoding in encodings]
    longest = np.maximum(*np.split(np.array([len(row) for row in rows]), 2))
    bucket = np.searchsorted(LENGTHS, longest)
    for _ in range(EPOCHS):
        order = rng.permutation(n)
        parts = [order[bucket[order] == b] for b in range(len(LENGTHS))]
        cuts = [
            (LENGTHS[b], part[start : start + BATCH])
            for b, part in enumerate(parts)
            for start in range(0, len(part) - BATCH + 1, BATCH)
        ]
        for i in rng.permutation(len(cuts)):
            length, chosen = cuts[i]
            both = np.concatenate([chosen, chosen + n])
            ids = np.zeros((2 * BATCH, length), np.int32)
            mask = np.zeros(ids.shape, bool)
            for row, j in enumerate(both):
                ids[row, : len(rows[j])], mask[row, : len(rows[j])] = rows[j], True
            scores = pairs.scores[chosen].astype(np.float32) / 5
            yield Batch(ids, mask, scores, vectors[both])


def fit(
    params: Any,
    layers: int,
    pairs: data.Pairs,
    vectors: np.ndarray,
    seed: int,
    method: Method,
    rate: float,
    teacher: Any = None,
) -> Any:
    """Train all layers by a method; embeddings stay as they are."""
    embeddings = params["params"]["embeddings"]
    model, big = minilm.MiniLM(scan=True, layers=layers), minilm.MiniLM(scan=True)
    run = jc.distill.features(model.apply, HIDDEN)
    teach = jc.distill.features(big.apply, HIDDEN)

    def loss(part: Any, aux: Any, batch: Batch, i: jax.Array) -> tuple[jax.Array, Any]:
        del i
        whole = {"params": {"embeddings": embeddings, "layers": part}}
        found, taps = run(whole, batch.ids, batch.mask)
        taught = teach(teacher, batch.ids, batch.mask)[1] if method is hidden else taps
        seen = Seen(found, batch.vectors, batch, taps, taught, None)
        return method(seen), aux

    found = list(batches(pairs, vectors, seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, WARMUP, len(found))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    trained, _ = train(params["params"]["layers"], loss, found, tx, steps=len(found))
    return {"params": {"embeddings": embeddings, "layers": trained}}


def tuned(params: Any, pairs: data.Pairs, path: Path | None) -> Any:
    """The teacher after its epoch, from its file if there is one."""
    if path and path.exists():
        return jc.io.load(path)
    nothing = np.zeros((2 * len(pairs.scores), minilm.WIDTH), np.float32)
    params = fit(params, minilm.LAYERS, pairs, nothing, 0, people, TEACHER_RATE)
    if path:
        jc.io.save(path, params)
    return params


def main() -> None:
    """The teacher, then every student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--teacher", type=Path, help="a file to keep the teacher in")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--layers", nargs="+", type=int, default=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    name = "minilm_validation" if options.validate else "minilm"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    training = data.sts("stsb_train", options.data_dir)
    test = data.sts("stsb_dev" if options.validate else "stsb_test", options.data_dir)

    def score(params: Any, layers: int) -> float:
        apply = minilm.MiniLM(scan=True, layers=layers).apply
        vectors = sentences.encode(apply, params, test.first + test.second)
        return round(sentences.spearman(test, vectors), 2)

    model, teacher = minilm.load(scan=True)
    if ("teacher", "pretrained") not in report:
        report.add("teacher", "pretrained", "", score(teacher, minilm.LAYERS))
    teacher = tuned(teacher, training, options.teacher)
    if ("teacher", "tuned") not in report:
        report.add("teacher", "tuned", "", score(teacher, minilm.LAYERS))
    scores, first, second = training
    seen = data.Pairs(scores[::2], first[::2], second[::2])
    vectors = sentences.encode(model.apply, teacher, seen.first + seen.second)
    for layers in options.layers:
        which = jc.distill.layer_map(layers, minilm.LAYERS)
        start = jc.distill.take_layers(teacher, "params/layers", which)
        if (f"{layers} layers", "not trained") not in report:
            report.add(f"{layers} layers", "not trained", "", score(start, layers))
        for seed, method in ((s, m) for s in options.seeds for m in options.methods):
            if (f"{layers} layers", row := f"{method}, seed {seed}") in report:
                continue
            params = fit(
                start,
                layers,
                seen,
                vectors,
                seed,
                METHODS[method],
                LEARNING_RATE,
                teacher,
            )
            report.add(f"{layers} layers", row, "", score(params, layers))
        report.add_means(f"{layers} layers")


if __name__ == "__main__":
    main()
