"""Draws the figures of docs/how-it-works.md.

    python docs/figures/draw.py [FOLDER]

``layer.svg``: the matrices of one layer, to scale. ``subspaces.svg``: a real run of ``rso_ds.RSO`` on a small
regression (float64, seed 0). Needs ``pip install -e ".[plot]"``.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import rso_ds

FROZEN, TRAINED, REMADE, KEPT, GONE = "#c9d3df", "#f2a65a", "#9ad0a5", "#8fb8ff", "#eeeeee"
IN, OUT, RANK, LAYERS = 48, 32, 12, 3
INTERVAL, STEPS, LR = 10, 240, 0.02


def layer(path: Path) -> None:
    """x, W, P, B and x P of one layer at r = hidden/4, side by side; areas are to scale."""
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots()
    tokens, size, rank = 1.3, 2.0, 0.5
    shapes = [
        ("x", tokens, size, GONE, "[tokens, in]\nnot kept"),
        ("W", size, size, FROZEN, "[out, in]\nfrozen until\nthe boundary"),
        ("P", size, rank, REMADE, "[in, r]\nremade\nfrom a seed"),
        ("B", size, rank, TRAINED, "[out, r]\ntrained: gradient,\nstate, traffic"),
        ("x P", tokens, rank, KEPT, "[tokens, r]\nkept for\nbackward"),
    ]
    left = 0.0
    for name, height, width, colour, text in shapes:
        axes.add_patch(Rectangle((left, -height / 2), width, height, facecolor=colour, edgecolor="#444444"))
        axes.text(left + width / 2, 0, name, ha="center", va="center", fontsize=13)
        axes.text(left + width / 2, -1.15, text, ha="center", va="top", fontsize=8.5)
        left += width + 1.25
    axes.set_title("y = x Wᵀ + (x P) Bᵀ,  r = in/4", fontsize=12)
    axes.set_xlim(-0.7, left - 0.5)
    axes.set_ylim(-2.1, 1.25)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A regression that a stack of linear layers can solve exactly."""
    torch.manual_seed(0)
    sizes = [IN, *[OUT] * LAYERS]
    stack = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    inputs = torch.randn(512, IN, dtype=torch.float64)
    return nn.Sequential(*stack).double(), inputs, inputs @ torch.randn(IN, OUT, dtype=torch.float64) / IN**0.5


def descend(rank: int | None) -> tuple[list[float], list[float]]:
    """Loss after each step, and the norm of the first layer's B P^T: AdamW for None, else RSO."""
    model, inputs, targets = problem()
    optimizer: torch.optim.Optimizer
    if rank is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    else:
        config = rso_ds.RSOConfig(lr=LR, rank=rank, interval=INTERVAL, targets="all-linear")
        rso_ds.convert(model, config)
        optimizer = rso_ds.RSO(model, config)
    losses, updates = [], []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(inputs), targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank is not None:
            first = model[0]
            updates.append((first.B @ first.subspace.P.to(first.B.dtype).T).norm().item())
    return losses, updates


def subspaces(path: Path) -> None:
    figure = Figure(figsize=(9, 3.3))
    left, right = figure.subplots(1, 2)
    for rank, name in ((None, "AdamW"), (16, "RSO, r = 16"), (4, "RSO, r = 4")):
        losses, updates = descend(rank)
        left.plot(losses, label=name)
        if rank == 16:
            right.plot(range(1, 1 + len(updates[:60])), updates[:60], color="#d9822b", marker=".", linewidth=1)
    left.set(yscale="log", xlabel="step", ylabel="loss", title="Three layers of 32 outputs, one learning rate")
    left.legend(frameon=False)
    right.set(xlabel="step", ylabel="size of B Pᵀ, first layer", title="Merged and reset every 10 steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "rso_ds"  # the same file each time
    layer(folder / "layer.svg")
    subspaces(folder / "subspaces.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
