"""The structured experiments in small: a smaller net is trained on, and scored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.lenets import training
from experiments.models import resnet
from experiments.structured import resnet_run, transformers_run
from jaxcompress import prune

RNG = np.random.default_rng(0)


def test_a_smaller_resnet_learns_with_its_own_statistics() -> None:
    model = resnet.ResNet(8)
    x = jnp.asarray(RNG.normal(size=(8, 8, 8, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    smaller = prune.structured(
        model.apply, variables, jax.ShapeDtypeStruct((2, 8, 8, 3), x.dtype), flops=0.4
    )
    y = jnp.arange(8, dtype=jnp.int32)
    batches = iter([(x, y)] * 12)
    with jax.numpy_dtype_promotion("standard"):
        tuned = resnet_run.fine_tune(smaller.fn, smaller.params, batches, 12, None)
    shapes = lambda t: jax.tree.map(jnp.shape, t)
    assert shapes(tuned) == shapes(smaller.params)
    before, after = (smaller.params["batch_stats"], tuned["batch_stats"])
    assert (before["bn1"]["mean"] != after["bn1"]["mean"]).all()
    run = jax.jit(lambda v: smaller.fn(v, x, True, mutable=["batch_stats"])[0])
    picked = lambda v: jnp.take_along_axis(run(v), y[:, None], 1).mean()
    assert picked(tuned) > picked(smaller.params)


def test_the_lowest_units_of_every_layer_go() -> None:
    scores = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    expected = [[False, True, False, True], [True, True, False, False]]
    assert transformers_run.lowest(scores, 0.5).tolist() == expected


@pytest.mark.parametrize("name", training.NETS)
def test_a_lenet_sees_the_images_as_they_are(name: str) -> None:
    model = training.NETS[name].model
    images = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32)
    found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert found.shape == (5, 10)
    assert set(variables["params"]) == set(training.NETS[name].kept)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_lenet_is_pruned_to_its_densities(share: float) -> None:
    x = RNG.integers(0, 256, (256, 28, 28, 1)).astype(np.uint8)
    images = data.Images(x, RNG.integers(0, 10, 256).astype(np.int32))
    net = training.NETS["lenet300"]._replace(dense_epochs=1, epochs=3, share=share)
    with jax.numpy_dtype_promotion("standard"):
        params = training.dense(net, images, 0)
        packed = training.pruned(net, params, images, 0)
    for layer, density in net.kept.items():
        w = np.asarray(packed["params"][layer]["kernel"].materialize())
        assert abs((w != 0).mean() - density) <= 0.5 / w.size + 1e-9
    assert 0.0 <= training.errors(net, packed, images) <= 100.0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_lenet_learns_from_labels_or_from_its_teacher(share: float) -> None:
    """Whichever has the whole loss decides; the other changes nothing."""
    x = RNG.integers(0, 256, (128, 28, 28, 1)).astype(np.uint8)
    y = RNG.integers(0, 10, 128).astype(np.int32)
    net = training.NETS["lenet300"]
    start, other = (
        jax.jit(net.model.init)(jax.random.key(k), jnp.zeros((1, 28, 28, 1)))
        for k in range(2)
    )

    said = lambda teacher: training.logits_of(net, teacher, x)

    def trained(labels: np.ndarray, teacher: Any) -> np.ndarray:
        images = data.Images(x, labels)
        options: dict[str, Any] = {"epochs": 2, "rate": 1e-2, "decay": 0.0}
        params, _ = training.train(
            net, start, images, 0, said=said(teacher), share=share, **options
        )
        return np.asarray(params["params"]["ip3"]["kernel"])

    with jax.numpy_dtype_promotion("standard"):
        base = trained(y, start)
        other_labels, other_teacher = trained((y + 1) % 10, start), trained(y, other)
    assert (other_labels == base).all() == (share == 1.0)
    assert (other_teacher == base).all() == (share == 0.0)
