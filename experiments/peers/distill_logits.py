"""Our losses of logits beside torchdistill's, on the same random logits.

    python -m experiments.peers.distill_logits ours logits.npz
    # torch and torchdistill in an environment of their own:
    python -m experiments.peers.distill_logits peers logits.npz found.json

The first writes logits with our losses and gradients, the second the largest
differences from torchdistill's, relative to the largest entry. What is defined
differently is brought to one definition here, in `METHODS`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TEMPERATURE = 4.0
EXAMPLES, CLASSES = 32, 100
METHODS = ("soft_targets", "mix", "dist", "standardize")


def ours(path: str) -> None:
    """Mean losses over the batch and their gradients."""
    import jax
    import jax.numpy as jnp

    from jaxcompress import distill as d

    rng = np.random.default_rng(0)
    size = (EXAMPLES, CLASSES)
    s, t = (jnp.asarray(3 * rng.normal(size=size), jnp.float32) for _ in range(2))
    labels = jnp.asarray(rng.integers(CLASSES, size=EXAMPLES))
    T: Any = {"temperature": TEMPERATURE}
    losses = {
        "soft_targets": lambda s: d.soft_targets(s, t, **T),
        "mix": lambda s: d.mix(s, t, labels, alpha=0.3, **T),
        "dist": lambda s: d.dist(s, t, inter=0.7, intra=2.0, **T),
        "standardize": lambda s: d.soft_targets(
            d.standardize(s), d.standardize(t), temperature=2.0
        ),
    }
    found: dict[str, Any] = {"student": s, "teacher": t, "labels": labels}
    for name, loss in losses.items():
        value = jax.value_and_grad(lambda s, loss=loss: loss(s).mean())
        found[f"{name}/value"], found[f"{name}/gradient"] = jax.jit(value)(s)
    np.savez(path, **found)


def peer(name: str, s: Any, t: Any, labels: Any) -> Any:
    """torchdistill's loss, in our definition."""
    import torch
    from torchdistill.losses import mid_level

    paths = {}
    for who in ("student", "teacher"):
        paths |= {f"{who}_module_path": "m", f"{who}_module_io": "output"}
    outputs = {"m": {"output": s}}, {"m": {"output": t}}
    # Without hard labels, torchdistill leaves out the temperature squared.
    only = {"alpha": 0.0, "beta": 1.0}
    if name == "soft_targets":
        loss = mid_level.KDLoss(**paths, temperature=TEMPERATURE, **only)
        return loss(*outputs, labels) * TEMPERATURE**2
    if name == "mix":
        loss = mid_level.KDLoss(**paths, temperature=TEMPERATURE, alpha=0.7, beta=0.3)
        return loss(*outputs, labels)
    if name == "dist":
        # It multiplies by the temperature squared.
        loss = mid_level.DISTLoss(**paths, beta=0.7, gamma=2.0, tau=TEMPERATURE, eps=0)
        return loss(*outputs) / TEMPERATURE**2
    # Its standard deviation is that of a sample; the paper's is the population's.
    factor = float(torch.sqrt(torch.tensor((CLASSES - 1) / CLASSES)))
    loss = mid_level.LogitStdKDLoss(**paths, temperature=2.0 * factor, eps=0.0, **only)
    return loss(*outputs, labels) * 2.0**2


def peers(path: str, results: str) -> None:
    """Largest differences of value and gradient; in float64 on their side."""
    import torch

    data, found = np.load(path), {}
    labels = torch.tensor(data["labels"], dtype=torch.int64)
    for name in METHODS:
        s = torch.tensor(data["student"], dtype=torch.float64, requires_grad=True)
        t = torch.tensor(data["teacher"], dtype=torch.float64)
        value = peer(name, s, t, labels)
        value.backward()
        assert s.grad is not None
        theirs = {"value": value.detach().numpy(), "gradient": s.grad.numpy()}
        found[name] = {
            k: float(np.abs(data[f"{name}/{k}"] - v).max() / np.abs(v).max())
            for k, v in theirs.items()
        }
    versions = {p: importlib.metadata.version(p) for p in ("torch", "torchdistill")}
    report = {"versions": versions, "relative_differences": found}
    Path(results).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    {"ours": ours, "peers": peers}[sys.argv[1]](*sys.argv[2:])
