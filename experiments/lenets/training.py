"""How the LeNets are trained and pruned, and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation.mnist_run import jittered
from experiments.models import lenet

RESULTS = Path(__file__).parent / "results"
HELD_OUT, BATCH, TEMPERATURE, SEEDS = 5000, 128, 4.0, (0, 1, 2)


class Settings(NamedTuple):
    """A net, the fraction of each layer's weights that stays, and the budget.

    Attributes:
      model: The net.
      kept: By layer, as published.
      published: Percent of errors, dense and pruned (Han et al., 2015, Table 1).
      dense_epochs: Epochs of dense training.
      epochs: Epochs of training while it is pruned and after.
      ramp: Fraction of those until the sparsity is reached.
      learning_rate: Of dense training; the pruned net starts with half of it.
      decay: Weight decay of dense training.
      pruned_decay: And while the net is pruned: few weights that must fit what many did
        fit it too closely.
      share: Of the loss that the teacher has while the net is pruned.
      outside: Whether the teacher is `teacher`, else the dense net itself.
    """

    model: Any
    kept: dict[str, float]
    published: tuple[float, float]
    dense_epochs: int
    epochs: int
    ramp: float = 0.5
    learning_rate: float = 1.5e-3
    decay: float = 1e-2
    pruned_decay: float = 0.3
    share: float = 0.7
    outside: bool = True


NETS = {
    "lenet300": Settings(
        model=lenet.LeNet300(),
        kept={"ip1": 0.08, "ip2": 0.09, "ip3": 0.26},
        published=(1.64, 1.59),
        dense_epochs=25,
        epochs=40,
    ),
    "lenet5": Settings(
        model=lenet.LeNet5(),
        kept={"conv1": 0.66, "conv2": 0.12, "ip1": 0.08, "ip2": 0.19},
        published=(0.80, 0.77),
        dense_epochs=8,
        epochs=10,
    ),
}


def batches(
    images: data.Images, said: np.ndarray | None, epochs: int, seed: int
) -> Iterator[Any]:
    """Images, labels and a teacher's logits, shuffled anew for every epoch."""
    rng = np.random.default_rng(seed)
    x, y = images.x.astype(np.float32) / 255, images.y
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jax.tree.map(lambda a, at=chosen: a[at], (x, y, said))


def train(
    net: Settings,
    params: Any,
    images: data.Images,
    seed: int,
    *,
    epochs: int,
    rate: float,
    decay: float,
    scheme: jc.Transform | None = None,
    said: np.ndarray | None = None,
    share: float = 0.0,
    shift: int = 0,
) -> tuple[Any, Any]:
    """AdamW with a cosine schedule, a scheme inside: params and the scheme's state.

    Args:
      net: What is trained.
      params: To begin with.
      images: To train on.
      seed: Of their order.
      epochs: Passes over them.
      rate: Learning rate at the start.
      decay: Weight decay.
      scheme: How the params are compressed meanwhile.
      said: ``float32[images, 10]`` a teacher's logits: its probabilities at
        temperature 4 are learned.
      share: Of the loss that the teacher has; the labels have the rest.
      shift: Pixels that images are shifted by at most, each way.
    """
    scheme = jc.identity() if scheme is None else scheme
    steps = epochs * (len(images.x) // BATCH)
    schedule = optax.cosine_decay_schedule(rate, steps)
    tx = jc.optim.attach(optax.adamw(schedule, weight_decay=decay), scheme)
    apply = jc.lift(net.model.apply)

    key = jax.random.key(seed)

    def loss(params: Any, opt: Any, i: Any, x: Any, y: Any, said: Any) -> jax.Array:
        x = jittered(x, jax.random.fold_in(key, i), shift) if shift else x
        logits = apply(scheme.view(params, jc.optim.state(opt)), x)
        if said is None:
            found = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        else:
            found = jc.distill.mix(
                logits, said, y, temperature=TEMPERATURE, alpha=share
            )
        return found.mean()

    @jax.jit
    def step(params: Any, opt: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, opt, *batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, value = tx.init(params), 0.0
    for i, batch in enumerate(batches(images, said, epochs, seed), 1):
        params, opt, value = step(params, opt, i, *batch)
        if i % max(1, steps // 5) == 0:
            print(f"  step {i} of {steps}: loss {float(value):.4f}", flush=True)
    return params, jc.optim.state(opt)


def dense(net: Settings, images: data.Images, seed: int) -> Any:
    """Params of the net before it is compressed."""
    blank = jnp.zeros((1, 28, 28, 1))
    params = jax.jit(net.model.init)(jax.random.key(seed), blank)
    params, _ = train(
        net,
        params,
        images,
        seed,
        epochs=net.dense_epochs,
        rate=net.learning_rate,
        decay=net.decay,
    )
    return params


def teacher(images: data.Images, path: Path | None = None) -> tuple[Settings, Any]:
    """A LeNet-5 that sees shifted images, and its params, which a file may keep.

    It makes fewer errors than the nets that are compressed.
    """
    net = NETS["lenet5"]
    if path and path.exists():
        return net, jc.io.load(path)
    start = jax.jit(net.model.init)(jax.random.key(100), jnp.zeros((1, 28, 28, 1)))
    params, _ = train(
        net, start, images, 100, epochs=15, rate=1.5e-3, decay=1e-2, shift=2
    )
    if path:
        jc.io.save(path, params)
    return net, params


def logits_of(net: Settings, params: Any, x: np.ndarray) -> np.ndarray:
    """Of images ``uint8[n, 28, 28, 1]``, by a dense or a compressed net."""
    run = jax.jit(jc.lift(net.model.apply))
    parts = np.array_split(x, max(1, len(x) // 1000))
    return np.concatenate([run(params, p.astype(np.float32) / 255) for p in parts])


def errors(net: Settings, params: Any, images: data.Images) -> float:
    """Percent of images that get another class."""
    wrong = logits_of(net, params, images.x).argmax(-1) != images.y
    return 100.0 * float(wrong.mean())


def scheme_of(net: Settings, steps: int, kept: dict[str, float]) -> jc.Transform:
    """Magnitude pruning, each layer to its own density."""
    end = int(net.ramp * steps)

    def rule(layer: str, axes: Any) -> jc.Transform:
        ramp = jc.schedules.cubic(0.0, 1.0 - kept[layer], begin=0, end=end)
        every = max(1, steps // 300)
        return jc.prune.magnitude(sparsity=ramp, every=every, axes=axes)

    return rules(net, rule)


def rules(net: Settings, rule: Callable[[str, Any], jc.Transform]) -> jc.Transform:
    """``rule(layer, axes)`` for the kernel of every layer."""
    axes = {n: (-4, -3, -2) if n.startswith("conv") else -2 for n in net.kept}
    return jc.select({f"params/{n}/kernel": rule(n, axes[n]) for n in net.kept})


def pruned(
    net: Settings,
    params: Any,
    images: data.Images,
    seed: int,
    *,
    said: np.ndarray | None = None,
    kept: dict[str, float] | None = None,
) -> Any:
    """A dense net's params after pruning, stored.

    Args:
      net: What is trained.
      params: Of the dense net.
      images: To train on.
      seed: Of their order.
      said: Logits of the teacher, if it is not the dense net.
      kept: Fraction of each layer's weights that stays, if not as published.
    """
    steps = net.epochs * (len(images.x) // BATCH)
    if said is None and net.share:
        said = logits_of(net, params, images.x)
    scheme = scheme_of(net, steps, kept or net.kept)
    left, state = train(
        net,
        params,
        images,
        seed,
        epochs=net.epochs,
        rate=net.learning_rate / 2,
        decay=net.pruned_decay,
        scheme=scheme,
        said=said,
        share=net.share,
    )
    return scheme.compress(left, state)


def load(validate: bool, root: Path | None) -> tuple[data.Images, data.Images]:
    """Images to train on, and to score."""
    images, test = (data.mnist(p, root) for p in ("train", "test"))
    if not validate:
        return images, test
    return (
        data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT]),
        data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:]),
    )
