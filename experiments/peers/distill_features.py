"""Losses on features beside torchdistill's and PyTorch's: values and gradients.

    python -m experiments.peers.distill_features draw drawn.npz
    # In an environment with torch and torchdistill, without jax:
    python -m experiments.peers.distill_features peers drawn.npz peers.npz
    python -m experiments.peers.distill_features compare drawn.npz peers.npz

Peers run in float64 and reduce to one number; ours is the mean of its shares. Where a
peer sums, its sum is divided by the number of terms that are not zero by definition.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "distill_features.json"
BATCH, EXAMPLES, NEGATIVES = 8, 32, 12


def l1_similarity(s: np.ndarray, t: np.ndarray) -> float:
    """Similarity preserving with rows of absolute sum 1; the paper's have length 1."""
    rows = [x @ x.T / np.abs(x @ x.T).sum(1, keepdims=True) for x in (s, t)]
    return float(np.square(rows[0] - rows[1]).sum() / BATCH**2)


def own_neighbours(s: np.ndarray, t: np.ndarray) -> float:
    """Probabilistic transfer in which each example is its own neighbour too."""
    x = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (s, t)]
    k = [(a @ a.T + 1) / 2 for a in x]
    q, p = (a / a.sum(1, keepdims=True) for a in k)
    return float((p * np.log(p / q)).sum() / BATCH)


DEFINED_OTHERWISE = {
    "similarity_preserving": l1_similarity,
    "probabilistic_transfer": own_neighbours,
}
"""What these losses are in torchdistill: not ours, nor the paper's."""


def draw(path: str) -> None:
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    arrays = {
        "student": rng.normal(size=(BATCH, 10)),
        "teacher": 3 * rng.normal(size=(BATCH, 10)) + 1,
        "student_map": rng.normal(size=(BATCH, 6, 6, 5)),
        "teacher_map": rng.normal(size=(BATCH, 6, 6, 7)),
        "raw_variance": rng.normal(size=10),
        "student_memory": unit(rng.normal(size=(EXAMPLES, 10))),
        "teacher_memory": unit(rng.normal(size=(EXAMPLES, 10))),
    }
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    arrays["indices"] = rng.choice(EXAMPLES, BATCH, replace=False)
    arrays["negatives"] = rng.integers(0, EXAMPLES, (BATCH, NEGATIVES))
    np.savez(path, **arrays)


def peer_losses(x: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """Of the student's features, or its map, as torch tensors."""
    import torch
    from torchdistill.losses import mid_level

    teacher = x["teacher"]
    pair = {"io": "output", "path": "p"}
    pairs = {"pair": {"student": pair, "teacher": pair}}
    of = lambda y: {"p": {"output": y, "input": y}}
    first = lambda y: y.movedim(-1, 1)
    variance = torch.nn.functional.softplus(x["raw_variance"]) + 1e-5
    rkd = lambda d, a: mid_level.RKDLoss("p", "p", d, a, "sum")
    losses = {
        "attention_transfer": (mid_level.ATLoss(pairs), 1),
        "similarity_preserving": (mid_level.SPKDLoss("p", "p", "batchmean"), 1),
        "relational_distance": (rkd(1, 0), BATCH * (BATCH - 1)),
        "relational_angle": (rkd(0, 1), BATCH * (BATCH - 1) * (BATCH - 2)),
        "probabilistic_transfer": (
            mid_level.PKTLoss("p", "output", "p", "output"),
            1 / BATCH,
        ),
    }

    def run(name: str) -> Callable[[Any], Any]:
        loss, terms = losses[name]
        if name == "attention_transfer":
            target = first(x["teacher_map"])
            return lambda s: loss(of(first(s)), of(target)) / terms
        return lambda s: loss(of(s), of(teacher)) / terms

    ones = torch.ones(BATCH, dtype=torch.float64)
    vid = mid_level.VIDLoss(pairs)
    return {
        **{name: run(name) for name in losses},
        "hint": lambda s: torch.nn.functional.mse_loss(s, teacher),
        "cosine_embedding": lambda s: torch.nn.functional.cosine_embedding_loss(
            s, teacher, ones
        ),
        "variational_information": lambda s: vid(of((s, variance)), of(teacher)),
        "contrastive": lambda s: peer_contrastive(x, s),
    }


def peer_contrastive(x: dict[str, Any], s: Any) -> Any:
    import torch
    from torchdistill.losses import mid_level

    unit = lambda y: torch.nn.functional.normalize(y, dim=1)
    loss = mid_level.CRDLoss("n", "e", "n", 10, EXAMPLES, NEGATIVES, EXAMPLES, eps=0.0)
    loss = loss.double()
    loss.memory_v1.copy_(x["student_memory"])
    loss.memory_v2.copy_(x["teacher_memory"])
    rows = torch.cat([x["indices"][:, None], x["negatives"]], 1)
    where = {"pos_idx": x["indices"], "contrast_idx": rows}
    student = {"n": {"output": unit(s)}, "e": {"input": where}}
    return loss(student, {"n": {"output": unit(x["teacher"])}})


def peers(drawn: str, path: str) -> None:
    import torch

    x = {
        name: torch.tensor(
            a, dtype=torch.int64 if a.dtype.kind == "i" else torch.float64
        )
        for name, a in np.load(drawn).items()
    }
    found = {}
    for name, loss in peer_losses(x).items():
        source = "student_map" if name == "attention_transfer" else "student"
        s = x[source].clone().requires_grad_()
        value = loss(s)
        value.sum().backward()
        found[name] = value.detach().numpy().reshape(())
        found[f"{name} gradient"] = s.grad.numpy()
    for package in ("torch", "torchdistill"):
        found[f"version {package}"] = np.array(importlib.metadata.version(package))
    np.savez(path, **found)


def our_losses(x: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    import jax.numpy as jnp

    from jaxcompress import distill

    crd = distill.contrastive(examples=EXAMPLES, features=10, negatives=NEGATIVES)
    memory = distill.ContrastiveMemory(
        x["student_memory"], x["teacher_memory"], jnp.zeros(2), jnp.zeros((), bool)
    )
    names = (
        "hint",
        "cosine_embedding",
        "similarity_preserving",
        "relational_distance",
        "relational_angle",
        "probabilistic_transfer",
    )
    variance = distill.GaussianVariance(x["raw_variance"])
    return {
        **{n: lambda s, n=n: getattr(distill, n)(s, x["teacher"]) for n in names},
        "attention_transfer": lambda s: distill.attention_transfer(s, x["teacher_map"]),
        "variational_information": lambda s: distill.variational_information(
            s, x["teacher"], variance
        ),
        "contrastive": lambda s: crd.loss(
            memory, s, x["teacher"], x["indices"], x["negatives"]
        ),
    }


def compare(drawn: str, found: str) -> None:
    import jax
    import jax.numpy as jnp

    x = {name: jnp.asarray(a) for name, a in np.load(drawn).items()}
    peer = dict(np.load(found).items())
    table = {}
    for name, loss in our_losses(x).items():
        source = "student_map" if name == "attention_transfer" else "student"
        total = lambda s, loss=loss: loss(s).mean()
        value, grad = jax.jit(jax.value_and_grad(total))(x[source])
        slope = peer[f"{name} gradient"]
        table[name] = {
            "ours": float(value),
            "peer": float(peer[name]),
            "relative difference": abs(float(value) / float(peer[name]) - 1),
            "gradient, relative difference": float(
                np.linalg.norm(grad - slope) / np.linalg.norm(slope)
            ),
        }
        if name in DEFINED_OTHERWISE:
            s, t = (np.asarray(x[n], np.float64) for n in ("student", "teacher"))
            table[name]["the peer's definition, in NumPy"] = DEFINED_OTHERWISE[name](
                s, t
            )
        print(name, *(f"{k} {v:.3g};" for k, v in table[name].items()))
    versions = {
        package: str(peer[f"version {package}"])
        for package in ("torch", "torchdistill")
    }
    versions["jax"] = jax.__version__
    RESULTS.write_text(json.dumps({"versions": versions, "losses": table}, indent=1))


if __name__ == "__main__":
    commands = {"draw": draw, "peers": peers, "compare": compare}
    commands[sys.argv[1]](*sys.argv[2:])
