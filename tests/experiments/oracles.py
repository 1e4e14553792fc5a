"""The models' forward passes in NumPy float64, from the papers, on the files' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def erf(x: Array) -> Array:
    from scipy.special import erf as scipy_erf

    return scipy_erf(x)


def bert(path: Path, sentences: list[list[int]]) -> list[Array]:
    """Vectors of sentences, one by one, by a loop over layers and heads."""
    w = load_file(path)
    return [bert_sentence(w, ids) for ids in sentences]


def bert_sentence(w: dict[str, Array], ids: list[int]) -> Array:

    def linear(name: str, x: Array) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / np.sqrt(var + 1e-12)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    tables = "embeddings.{}_embeddings.weight"
    x = w[tables.format("word")][ids].astype(np.float64)
    x = x + w[tables.format("position")][: len(ids)]
    x = norm("embeddings.LayerNorm", x + w[tables.format("token_type")][0])
    for i in range(6):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(f"{layer}.attention.self.{part}", x)
            for part in ("query", "key", "value")
        )
        heads = []
        for h in range(12):
            cut = slice(32 * h, 32 * (h + 1))
            weights = softmax(q[:, cut] @ k[:, cut].T / np.sqrt(32))
            heads.append(weights @ v[:, cut])
        y = linear(f"{layer}.attention.output.dense", np.concatenate(heads, 1))
        x = norm(f"{layer}.attention.output.LayerNorm", x + y)
        y = linear(f"{layer}.intermediate.dense", x)
        y = linear(f"{layer}.output.dense", y * 0.5 * (1 + erf(y / np.sqrt(2))))
        x = norm(f"{layer}.output.LayerNorm", x + y)
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def llama(arrays: dict[str, Array], ids: Array) -> Array:
    """Logits of one story, RoPE as a turn of complex numbers."""
    w = {name: value.astype(np.float64) for name, value in arrays.items()}

    def norm(x: Array, scale: Array) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x: Array) -> Array:
        frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
        angles = np.arange(len(x))[:, None] * frequencies
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["tok_embeddings"][ids]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(5):
        y = norm(x, w["attention_norm"][i])
        q, k, v = (y @ w[name][i].T for name in ("wq", "wk", "wv"))
        heads = []
        for h in range(8):
            mine, shared = (
                slice(8 * h, 8 * h + 8),
                slice(8 * (h // 2), 8 * (h // 2) + 8),
            )
            scores = turn(q[:, mine]) @ turn(k[:, shared]).T / np.sqrt(8)
            heads.append(softmax(scores + future) @ v[:, shared])
        x = x + np.concatenate(heads, 1) @ w["wo"][i].T
        y = norm(x, w["ffn_norm"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["norm"]) @ w["tok_embeddings"].T


def nll(logits: Array, ids: Array) -> Array:
    """Of each token but the first."""
    chances = softmax(logits[:-1])
    return -np.log(chances[np.arange(len(ids) - 1), ids[1:]])


def convolve(x: Array, weight: Array, stride: int = 1) -> Array:
    """3x3, padding 1; ``x`` is NHWC, the weight ``(out, in, kh, kw)``."""
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, height, width, len(weight)))
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + height, j : j + width]
            out += part @ weight[:, :, i, j].T.astype(np.float64)
    return out[:, ::stride, ::stride]


def resnet(arrays: dict[str, Array], images: Array, depth: int) -> Array:
    """Logits of ``uint8`` images."""
    w = {name: value.astype(np.float64) for name, value in arrays.items()}

    def norm(name: str, x: Array) -> Array:
        y = (x - w[f"{name}.running_mean"]) / np.sqrt(w[f"{name}.running_var"] + 1e-5)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = np.maximum(norm("bn1", convolve(x, w["conv1.weight"])), 0)
    for stage in (1, 2, 3):
        for i in range((depth - 2) // 6):
            block, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = norm(f"{block}.bn1", convolve(x, w[f"{block}.conv1.weight"], stride))
            y = convolve(np.maximum(y, 0), w[f"{block}.conv2.weight"])
            y = norm(f"{block}.bn2", y)
            if stride == 2:
                planes = y.shape[-1]
                short = np.zeros(y.shape)
                short[..., planes // 4 : planes // 4 * 3] = x[:, ::2, ::2]
                x = short
            x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ w["linear.weight"].T + w["linear.bias"]
