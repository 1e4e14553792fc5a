"""The float scores of the real models: what every compressed score is held against.

Each score is computed by our own forward pass from the published weights, and printed
beside the score that is known for them.

    python -m experiments.float_scores.run
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments import data
from experiments.models import minilm, resnet, sentences, stories, text

RESULTS = Path(__file__).parent / "results.json"
SPEARMAN = {  # Times 100; cosines against what people said.
    "stsb_dev": 86.72,
    "stsb_test": 82.03,
    "sts13": 80.60,
    "sts14": 75.60,
    "sts15": 85.39,
}
STORIES, MEAN_NLL = (1200, 1230), 1.5578  # Nats a token.
CORRECT = {20: 915, 56: 926}  # Of the first 1,000 test images.


def similarity(name: str, root: Path | None) -> float:
    """MiniLM on a set of sentence pairs."""
    model, params = load_minilm()
    pairs = data.sts(name, root)
    vectors = sentences.encode(model.apply, params, pairs.first + pairs.second)
    return sentences.spearman(pairs, vectors)


@functools.cache
def load_minilm() -> tuple[minilm.MiniLM, Any]:
    """One model for all sets, so that it is compiled once."""
    return minilm.load(scan=True)


def likelihood(root: Path | None) -> float:
    """stories260K on stories that it was not tuned on."""
    model, params = stories.load(root=root)
    return text.mean_nll(model.apply, params, data.stories(*STORIES, root))


def classes(depth: int, root: Path | None) -> float:
    """ResNet on CIFAR-10."""
    model, variables = resnet.load(depth, root=root)
    images = data.cifar10("test", root)
    return resnet.correct(resnet.logits(model.apply, variables, images.x), images.y)


def measure(root: Path | None) -> Iterator[dict[str, Any]]:
    """A row for each model and data set."""
    calls: list[tuple[str, float, Callable[[Path | None], float]]] = [
        ("stories260K, mean NLL", MEAN_NLL, likelihood),
        *(
            (f"ResNet-{depth}, correct", expected, functools.partial(classes, depth))
            for depth, expected in CORRECT.items()
        ),
        *(
            (f"MiniLM, {name}", expected, functools.partial(similarity, name))
            for name, expected in SPEARMAN.items()
        ),
    ]
    for name, expected, score in calls:
        start = time.perf_counter()
        measured = round(score(root), 4)
        seconds = round(time.perf_counter() - start, 1)
        print(f"{name:<24}{expected:>9}{measured:>9}{seconds:>9}", flush=True)
        yield {"score": name, "expected": expected, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the data folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, in JSON")
    options = parser.parse_args()
    print(f"{'score':<24}{'expected':>9}{'measured':>9}{'seconds':>9}")
    report = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "scores": list(measure(options.data)),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
