"""LeNet-300-100 and LeNet-5 for MNIST, as Deep Compression has them.

    model = lenet.LeNet5()
    variables = model.init(key, jnp.zeros((1, 28, 28, 1)))

References:
  LeCun et al., `Gradient-Based Learning
  <http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf>`_, 1998. LeNet-5 is Caffe's, of
  20, 50 and 500 features, with relu after the third layer alone.
"""

from __future__ import annotations

import flax.linen as nn
import jax


class LeNet300(nn.Module):
    """784-300-100-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[batch, 10]`` of images ``float[batch, 28, 28, 1]``."""
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(300, name="ip1")(x))
        x = nn.relu(nn.Dense(100, name="ip2")(x))
        return nn.Dense(10, name="ip3")(x)


def pool(x: jax.Array) -> jax.Array:
    """The largest of every two by two pixels; on a CPU twice as fast as a window."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


class LeNet5(nn.Module):
    """Two convolutions with max pooling, two linear layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[batch, 10]`` of images ``float[batch, 28, 28, 1]``."""
        for i, width in enumerate((20, 50), 1):
            x = nn.Conv(width, (5, 5), padding="VALID", name=f"conv{i}")(x)
            x = pool(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(500, name="ip1")(x))
        return nn.Dense(10, name="ip2")(x)
