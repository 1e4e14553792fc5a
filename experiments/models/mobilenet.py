"""MobileNetV2 for images of 32 by 32 pixels, not trained.

    model = mobilenet.MobileNetV2()
    variables = model.init(key, jnp.zeros((1, 32, 32, 3)))

References:
  Sandler et al., `MobileNetV2 <https://arxiv.org/abs/1801.04381>`_, 2018, Table 2.
  Differs: strides of 1 in the first convolution and the second stage, for small images.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax


class Stage(NamedTuple):
    """Blocks of one width: expansion, channels, how many, stride of the first."""

    expansion: int
    width: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 1),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
STEM, HEAD = 32, 1280

Convolution = functools.partial(nn.Conv, use_bias=False)


class InvertedResidual(nn.Module):
    """Expand, filter every channel by itself, project; added if the shape allows."""

    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5)
        y, inner = x, x.shape[-1] * self.stage.expansion
        if self.stage.expansion > 1:
            y = Convolution(inner, (1, 1), name="expand")(y)
            y = nn.relu6(norm(name="expand_norm")(y))
        y = Convolution(
            inner,
            (3, 3),
            strides=self.stride,
            feature_group_count=inner,
            name="depthwise",
        )(y)
        y = nn.relu6(norm(name="depthwise_norm")(y))
        y = Convolution(self.stage.width, (1, 1), name="project")(y)
        y = norm(name="project_norm")(y)
        return x + y if y.shape == x.shape else y


class MobileNetV2(nn.Module):
    """The whole net.

    Attributes:
      classes: Logits.
      stages: Its blocks.
      head: Channels of the last convolution.
    """

    classes: int = 10
    stages: tuple[Stage, ...] = STAGES
    head: int = HEAD

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``[batch, classes]`` of ``float[batch, height, width, 3]``."""
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5)
        x = Convolution(STEM, (3, 3), name="stem")(x)
        x = nn.relu6(norm(name="stem_norm")(x))
        for i, stage in enumerate(self.stages):
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                x = InvertedResidual(stage, stride, name=f"stage{i}_{j}")(x, train)
        x = Convolution(self.head, (1, 1), name="head")(x)
        x = nn.relu6(norm(name="head_norm")(x)).mean((1, 2))
        return nn.Dense(self.classes, name="classifier")(x)
