"""Compress a digit classifier end to end: prune, distil and quantize in one step.

A dense float32 teacher is trained on scikit-learn's bundled handwritten digits; a
student, pruned on a cubic schedule, distilled from the teacher and int4-quantized
while it trains, is stored, loaded back, and run by `lift`. Settings are chosen on the
validation part; the test part is used once, for the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcompress as jc
from experiments.digits import plots
from jaxcompress.progress import track

TRAIN_IMAGES, VALIDATION_IMAGES = 1197, 300  # The other 300 are the test part.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that was chosen, on the validation part."""

    seeds: tuple[int, ...] = (0, 1, 2)
    teacher_width: int = 512
    student_width: int = 320
    teacher_epochs: int = 60
    student_epochs: int = 100
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    jitter: float = 0.2
    sparsity: float = 0.7
    bits: int = 4
    group_size: int = 64
    temperature: float = 4.0
    alpha: float = 0.9
    sweep: tuple[float, ...] = (0.9, 0.97)

    def steps(self, epochs: int) -> int:
        """Optimizer steps of a training run."""
        return epochs * (TRAIN_IMAGES // self.batch)


class MLP(nn.Module):
    """Two hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class Part(NamedTuple):
    """Images ``[n, 64]`` in [0, 1] and labels ``[n]``, or what else goes with them."""

    x: jax.Array
    y: Any


def load() -> tuple[Part, Part, Part]:
    """Train, validation and test parts: 1,197, 300 and 300 images."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return tuple(  # type: ignore[return-value]
        Part(jnp.asarray(x[i] / 16.0, jnp.float32), jnp.asarray(y[i], jnp.int32))
        for i in np.split(order, [TRAIN_IMAGES, TRAIN_IMAGES + VALIDATION_IMAGES])
    )


def minimize(
    loss: Callable[..., jax.Array],
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    part: Part,
    key: jax.Array,
    steps: int,
    settings: Settings,
) -> tuple[Any, Any]:
    """Minimize ``loss(params, opt_state, x, y)``, all steps in one `lax.scan`."""
    n = len(part.x)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        choose, jitter = jax.random.split(key)
        index = jax.random.choice(choose, n, (settings.batch,), replace=False)
        x = part.x[index]
        x = x + settings.jitter * jax.random.normal(jitter, x.shape)
        y = jax.tree.map(lambda a: a[index], part.y)
        grads = jax.grad(loss)(params, opt_state, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0]


def optimizer(settings: Settings, n: int) -> optax.GradientTransformationExtraArgs:
    """AdamW with a cosine schedule."""
    schedule = optax.cosine_decay_schedule(settings.learning_rate, n)
    return optax.with_extra_args_support(
        optax.adamw(
            schedule, weight_decay=settings.weight_decay, mask=jc.weight_decay_mask
        )
    )


def train_teacher(settings: Settings, part: Part, key: jax.Array) -> Any:
    """A dense float32 network."""
    model = MLP(settings.teacher_width)

    def loss(params: Any, _: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    n = settings.steps(settings.teacher_epochs)
    params = model.init(key, part.x[:1])
    return minimize(loss, optimizer(settings, n), params, part, key, n, settings)[0]


def compression(settings: Settings, sparsity: Any) -> jc.Transform:
    """Prune on a cubic schedule over the middle of training, then int4."""
    n = settings.steps(settings.student_epochs)
    magnitude = jc.prune.magnitude(
        sparsity=jc.schedules.cubic(0.0, sparsity, begin=n // 10, end=7 * n // 10),
        every=settings.steps(1),
    )
    grid = jc.quant.int4(group_size=settings.group_size, scale_dtype=jnp.bfloat16)
    return jc.select({"**/kernel": jc.chain(magnitude, grid)})


def train_student(
    settings: Settings,
    part: Part,
    teacher: Any,
    key: jax.Array,
    sparsity: float | jax.Array,
) -> tuple[Any, Any]:
    """Prune, distil and quantize in each step; returns params and scheme state."""
    model = MLP(settings.student_width)
    teach: Callable[..., Any] = MLP(settings.teacher_width).apply
    apply: Callable[..., Any] = jc.lift(model.apply)
    n = settings.steps(settings.student_epochs)
    scheme = compression(settings, sparsity)

    def loss(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jc.distill.mix(
            apply(scheme.view(params, jc.optim.state(opt_state)), x),
            teach(teacher, x),
            y,
            temperature=settings.temperature,
            alpha=settings.alpha,
        ).mean()

    tx = jc.optim.attach(optimizer(settings, n), scheme)
    params, _ = scheme.init(model.init(key, part.x[:1]))
    params, opt_state = minimize(loss, tx, params, part, key, n, settings)
    return params, jc.optim.state(opt_state)


def accuracy(apply: Callable[..., Any], params: Any, part: Part) -> float:
    """Percent of images classified right."""
    right = jax.jit(apply)(params, part.x).argmax(-1) == part.y
    return 100.0 * float(right.mean())


def latency_us(apply: Callable[..., Any], params: Any, x: jax.Array) -> float:
    """Median time of one jitted call."""
    run = jax.jit(apply)
    jax.block_until_ready(run(params, x))
    times = []
    for _ in range(100):
        start = time.perf_counter()
        jax.block_until_ready(run(params, x))
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


class Row(NamedTuple):
    """One line of the table; lists hold one entry a seed."""

    name: str
    accuracy: list[float]
    parameters: int
    nonzeros: int
    disk_bytes: int
    latency_us: float


def measure(name: str, width: int, trees: list[Any], test: Part, out: Path) -> Row:
    """Store each tree, load it back, and measure what was loaded."""
    apply = jc.lift(MLP(width).apply)
    file = out / f"{name.replace(' ', '_')}.jc"
    accuracies = []
    for tree in trees:
        jc.io.save(file, tree, overwrite=True)
        accuracies.append(accuracy(apply, jc.io.load(file), test))
    loaded = jc.io.load(file)
    dense = jax.tree.leaves(jc.materialize(loaded))
    return Row(
        name=name,
        accuracy=accuracies,
        parameters=sum(a.size for a in dense),
        nonzeros=sum(int(jnp.count_nonzero(a)) for a in dense),
        disk_bytes=file.stat().st_size,
        latency_us=latency_us(apply, loaded, test.x[:128]),
    )


def table(rows: list[Row]) -> str:
    """The rows beside the first, the teacher."""
    header = (
        f"{'model':<18}{'test accuracy %':>18}{'parameters':>12}{'non-zero':>10}"
        f"{'bytes on disk':>15}{'ratio':>8}{'us/128 images':>15}"
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        spread = max(row.accuracy) - min(row.accuracy)
        mean = f"{statistics.mean(row.accuracy):.2f} (spread {spread:.2f})"
        lines.append(
            f"{row.name:<18}{mean:>18}{row.parameters:>12,}{row.nonzeros:>10,}"
            f"{row.disk_bytes:>15,}{rows[0].disk_bytes / row.disk_bytes:>7.1f}x"
            f"{row.latency_us:>15.0f}"
        )
    return "\n".join(lines)


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Train, store, measure, plot; returns what is saved as results."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    train_part, validation, test = load()
    fit_teacher = jax.jit(functools.partial(train_teacher, settings, train_part))
    fit_student = jax.jit(functools.partial(train_student, settings, train_part))

    def student(teacher: Any, seed: int, sparsity: float) -> tuple[Any, Any]:
        """Parameters as trained, and as stored."""
        params, state = fit_student(teacher, jax.random.key(seed), sparsity)
        return params, compression(settings, sparsity).compress(params, state)

    teachers = [
        fit_teacher(jax.random.key(s)) for s in track(settings.seeds, "teachers")
    ]
    students = [
        student(teacher, seed, settings.sparsity)
        for teacher, seed in track(
            list(zip(teachers, settings.seeds, strict=True)), "students"
        )
    ]
    packed = [p for _, p in students]
    rows = [
        measure("teacher", settings.teacher_width, teachers, test, out),
        measure("packed student", settings.student_width, packed, test, out),
    ]
    print(table(rows))
    print()
    print(jc.report.size(packed[0]))

    apply: Callable[..., Any] = jc.lift(MLP(settings.student_width).apply)
    curve = [(settings.sparsity, packed[0])]
    for sparsity in track(settings.sweep, "trade-off"):
        curve.append((sparsity, student(teachers[0], settings.seeds[0], sparsity)[1]))
    points = [
        {
            "sparsity": sparsity,
            "bytes": jc.report.size(tree).disk_bytes,
            "validation_accuracy": accuracy(apply, tree, validation),
        }
        for sparsity, tree in sorted(curve, key=lambda c: c[0])
    ]
    teacher_point = {
        "bytes": rows[0].disk_bytes,
        "validation_accuracy": accuracy(
            MLP(settings.teacher_width).apply, teachers[0], validation
        ),
    }
    plots.trade_off(points, teacher_point, out / "trade_off.png")
    plots.histograms(students[0][0], jc.materialize(packed[0]), out / "histograms.png")
    return {
        "settings": dataclasses.asdict(settings),
        "rows": [row._asdict() for row in rows],
        "trade_off": points,
        "seconds": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    """Run with the settings above and save results and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    out = parser.parse_args(argv).out
    results = run(Settings(), out)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{results['seconds']} s; results and pictures are in {out}/")


if __name__ == "__main__":
    main()
