"""The two pictures of the digits experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import jaxcompress as jc


def trade_off(points: list[Any], teacher: dict[str, Any], path: Path) -> None:
    """Validation accuracy against bytes on disk."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    sizes = [p["bytes"] / 1024 for p in points]
    scores = [p["validation_accuracy"] for p in points]
    axis.plot(sizes, scores, "o-", color="tab:blue", label="packed int4 student")
    for point, size, score in zip(points, sizes, scores, strict=True):
        axis.annotate(
            f"{point['sparsity']:.0%} pruned",
            (size, score),
            textcoords="offset points",
            xytext=(4, 6),
            rotation=45,
            fontsize=8,
        )
    axis.plot(
        teacher["bytes"] / 1024,
        teacher["validation_accuracy"],
        "s",
        color="tab:red",
        label="dense float32 teacher",
    )
    axis.margins(x=0.1, y=0.25)
    axis.set_xscale("log")
    axis.set_xticks([32, 64, 128, 256, 512, 1024])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("KiB on disk")
    axis.set_ylabel("validation accuracy, %")
    axis.set_title("Handwritten digits: accuracy and size")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def histograms(before: Any, after: Any, path: Path) -> None:
    """Weights of each kernel before and after the grid; exact zeros left out."""
    kernels = {
        p: (np.asarray(w), np.asarray(jc.tree.flatten(after)[0][p]))
        for p, w in jc.tree.flatten(before)[0].items()
        if p.endswith("kernel")
    }
    figure, axes = plt.subplots(
        1, len(kernels), figsize=(4 * len(kernels), 3.2), layout="constrained"
    )
    for axis, (name, (old, new)) in zip(axes, kernels.items(), strict=True):
        limit = float(np.abs(old).max())
        bins = np.linspace(-limit, limit, 81)
        axis.hist(old[old != 0], bins, alpha=0.5, label="trained float32")
        axis.hist(new[new != 0], bins, alpha=0.5, label="stored int4")
        axis.set_title(f"{name}\n{np.mean(new == 0):.0%} exact zeros", fontsize=9)
        axis.set_xlabel("weight")
        axis.set_yscale("log")
    axes[0].set_ylabel("weights that are not zero")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
