"""ResNets for CIFAR-10, of depth ``6n + 2``, with shortcuts that have no weights.

    model, variables = resnet.load(20)
    logits = resnet.logits(model.apply, variables, data.cifar10("test").x)
    (logits.argmax(-1) == labels).sum()  # 915 of 1,000

References:
  He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2016, section
  4.2, option A. Weights: Idelbayev, pytorch_resnet_cifar10.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from experiments import data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (16, 32, 64)

Convolution = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False)


def shortcut(x: jax.Array, width: int, stride: int) -> jax.Array:
    """Every `stride`-th pixel, zero channels on either side as many as are missing."""
    missing = (width - x.shape[-1]) // 2
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing, missing)))


class Block(nn.Module):
    """Two convolutions, added to what entered them."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5)
        y = Convolution(self.width, strides=self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = norm(name="bn2")(Convolution(self.width, name="conv2")(y))
        return nn.relu(y + shortcut(x, self.width, self.stride))


class ResNet(nn.Module):
    """Three stages of blocks, mean over the pixels, one linear layer.

    Attributes:
      depth: Layers with weights: 20, 32, 44, 56, 110.
    """

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``[batch, 10]`` of images that `normalize` gave.

        With `train`, batch norm uses the batch's statistics, and the running ones are
        updated where `apply` has ``mutable=["batch_stats"]``.
        """
        x = Convolution(WIDTHS[0], name="conv1")(x)
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="bn1")
        x = nn.relu(norm(x))
        for stage, width in enumerate(WIDTHS, 1):
            for i in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and i == 0 else 1
                x = Block(width, stride, name=f"layer{stage}_{i}")(x, train)
        return nn.Dense(10, name="linear")(x.mean((1, 2)))


LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def load(depth: int = 20, *, root: Path | str | None = None) -> tuple[ResNet, Any]:
    """The model, and the variables that its `apply` takes first.

    Args:
      depth: 20 or 56.
      root: The data folder.

    Returns:
      `ResNet` and its ``params`` and ``batch_stats``; kernels are ``[3, 3, in, out]``.
    """
    flat = {}
    for name, w in data.load_npz(f"cifar_resnets/resnet{depth}.npz", root).items():
        *modules, kind = name.split(".")
        collection, leaf = LEAVES[kind]
        if w.ndim == 4:
            leaf, w = "kernel", w.transpose(2, 3, 1, 0)  # Stored (out, in, kh, kw).
        elif w.ndim == 2:
            leaf, w = "kernel", w.T
        if modules[0].startswith("layer"):
            modules[:2] = ["_".join(modules[:2])]
        flat["/".join([collection, *modules, leaf])] = jnp.asarray(w)
    return ResNet(depth), unflatten_dict(flat, sep="/")


def normalize(images: np.ndarray) -> np.ndarray:
    """``uint8[n, 32, 32, 3]`` as the nets were trained on them, in float32."""
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    return (images.astype(np.float32) / 255 - mean) / std


def logits(
    apply: Callable[..., Any],
    variables: Any,
    images: np.ndarray,
    *,
    batch_size: int = 250,
) -> np.ndarray:
    """Logits ``float32[n, 10]`` of images ``uint8[n, 32, 32, 3]``.

    Args:
      apply: ``apply(variables, x)``: `ResNet.apply`, or that lifted. It is jitted here.
      variables: What `apply` takes first, its ``params`` compressed or not.
      images: As `data.cifar10` gives them.
      batch_size: Images at a time; the last batch is filled up with black.
    """
    run = jax.jit(apply)
    result = np.zeros((len(images), 10), np.float32)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * 3
        out = run(variables, normalize(np.pad(batch, padding)))
        result[start : start + batch_size] = np.asarray(out)[: len(batch)]
    return result


def correct(logits: np.ndarray, labels: np.ndarray) -> int:
    """How many images have their largest logit at their label."""
    return int((logits.argmax(-1) == labels).sum())
