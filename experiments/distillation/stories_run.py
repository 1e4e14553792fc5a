"""stories260K teaches a language model of half its width, 73,376 parameters.

Students begin from random weights and see stories 0-1159, in windows of 128 tokens, as
often as each other. What the teacher says of every window is computed once.

    python -m experiments.distillation.stories_run [--validate] [--resume]

Scores are mean NLL on stories 1200-1599 (`--validate`: 1160-1199).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation import losses
from experiments.distillation.training import SEEDS, Seen, train
from experiments.models import stories, text
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
TRAINING, VALIDATION, TEST = (0, 1160), (1160, 1200), (1200, 1600)
TOKENS, BATCH, EPOCHS, LEARNING_RATE, WARMUP = 128, 16, 4, 4e-3, 50
SOFT = 0.9
LAST = "Stories/Stories._run/norm"
PROJECTOR = jc.distill.linear_projector(stories.HALF.width, stories.FULL.width)
STUDENT = stories.Stories(sizes=stories.HALF)
Method = Callable[[Seen], jax.Array]


def with_labels(divergence: Callable[..., jax.Array]) -> Method:
    """Mostly a divergence from the teacher's distributions, and the next token."""

    def loss(seen: Seen) -> jax.Array:
        soft = divergence(seen.student, seen.teacher, temperature=1.0).mean()
        return SOFT * soft + (1 - SOFT) * losses.labels_only(seen)

    return loss


METHODS: dict[str, Method] = {
    "plain": losses.labels_only,
    "soft targets": with_labels(jc.distill.soft_targets),
    "logit MSE": losses.logit_mse,
    "decoupled": functools.partial(losses.decoupled, temperature=1.0, beta=1.0),
    "Jensen-Shannon": with_labels(jc.distill.jensen_shannon),
    "hints": functools.partial(losses.hints, projector=PROJECTOR),
}


def windows(root: Path | None) -> np.ndarray:
    """All training stories in a row, cut to ``int32[n, 129]``."""
    ids = np.concatenate(data.stories(*TRAINING, root, length=10_000))
    count = (len(ids) - 1) // TOKENS
    starts = TOKENS * np.arange(count)[:, None]
    return ids[starts + np.arange(TOKENS + 1)[None]]


def lessons(root: Path | None, rows: np.ndarray) -> Any:
    """What the teacher says of all windows."""
    model, params = stories.load(root=root)
    ask = jax.jit(jc.distill.features(model.apply, LAST))
    cut = np.array_split(rows[:, :-1], len(rows) // BATCH)
    parts = [ask(params, part) for part in cut]
    return jax.tree.map(lambda *part: np.concatenate(part), *parts)


def batches(rows: np.ndarray, said: Any, seed: int) -> Iterator[Any]:
    """Windows and what was said of them, shuffled anew for every epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jax.tree.map(lambda a, at=chosen: a[at], (rows, said))


def student(method: Method, rows: np.ndarray, said: Any, seed: int) -> Any:
    """A student's params after training."""

    run = jc.distill.features(STUDENT.apply, LAST)

    def loss(params: Any, aux: Any, batch: Any, i: jax.Array) -> tuple[jax.Array, Any]:
        del i
        tokens, (teacher, taught) = batch
        logits, taps = run(params["student"], tokens[:, :-1])
        seen = Seen(logits, teacher, tokens[:, 1:], taps, taught, params["projector"])
        return method(seen), aux

    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "student": jax.jit(STUDENT.init)(first, rows[:1, :-1]),
        "projector": PROJECTOR.init(second),
    }
    steps = EPOCHS * (len(rows) // BATCH)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    found = batches(rows, said, seed)
    return train(params, loss, found, tx, steps=steps)[0]["student"]


def main() -> None:
    """The teacher, then every student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    name = "stories_validation" if options.validate else "stories"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    part = VALIDATION if options.validate else TEST
    texts = data.stories(*part, options.data_dir)
    nll = lambda model, params: round(text.mean_nll(model.apply, params, texts), 4)
    if ("teacher", "pretrained") not in report:
        report.add(
            "teacher", "pretrained", "", nll(*stories.load(root=options.data_dir))
        )
    rows = windows(options.data_dir)
    said = lessons(options.data_dir, rows)
    for method in options.methods:
        for seed in options.seeds:
            if ("student", row := f"{method}, seed {seed}") not in report:
                params = student(METHODS[method], rows, said, seed)
                report.add("student", row, "", nll(STUDENT, params))
    report.add_means("student")


if __name__ == "__main__":
    main()
