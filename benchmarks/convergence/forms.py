"""Loss curves of the two forms against each other, for each sampler: what rounding makes of one computation.

    python benchmarks/convergence/forms.py --data ../shared/data/eltec-eng --json forms.json --picture forms.svg

All models begin with the same weights and are given the same batches, step by step. "Two-path, nudged" begins with
weights that differ by one rounding (a factor of 1 + eps in one weight): how far rounding alone takes two runs of one
and the same form.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from convergence import BATCH, CLIP, SEQ_LEN, Data, held_out_loss, schedule
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.models import llama_config

SAMPLERS = ("haar", "coordinate")
FORMS = ("two-path", "two-path, nudged", "folded")


class Run:
    """One model in one form with its optimizer; ``losses`` of training by step."""

    def __init__(self, form: str, sampler: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = llama_config(args.shape, args.vocab, SEQ_LEN)
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
        if "nudged" in form:
            first = next(m.weight for n, m in self.model.named_modules() if isinstance(m, nn.Linear))
            with torch.no_grad():
                first[0, 0] *= 1 + 2 * torch.finfo(first.dtype).eps
        rso = rso_ds.RSOConfig(
            lr=args.lr, dense_lr=args.rest, sampler=sampler, form="folded" if form == "folded" else "two_path"
        )
        rso_ds.convert(self.model, rso)
        self.optimizer = rso_ds.RSO(self.model, rso)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.losses: list[float] = []

    def step(self, ids: torch.Tensor, scale: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def picture(found: dict[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    curves, apart = figure.subplots(1, 2)
    for sampler in SAMPLERS:
        base = torch.tensor(found["losses"][f"{sampler}, two-path"], dtype=torch.float64)
        for form, dashes in zip(FORMS, ("-", ":", "--"), strict=True):
            name = f"{sampler}, {form}"
            losses = torch.tensor(found["losses"][name], dtype=torch.float64)
            curves.plot(losses, dashes, linewidth=1, label=name)
            if form != "two-path":
                apart.plot((losses - base).abs().clamp_min(1e-16), dashes, linewidth=1, label=f"{name} to two-path")
    curves.set(xlabel="step", ylabel="training loss")
    apart.set(xlabel="step", ylabel="difference of training loss", yscale="log")
    for panel in (curves, apart):
        panel.legend(fontsize=7)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--shape", default="llama-9m")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--rest", type=float, default=1.6e-2, help="rate of embedding, head, norms")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    data = Data(args.data, args.vocab, args.cache, 0)
    runs = {f"{sampler}, {form}": Run(form, sampler, args) for sampler in SAMPLERS for form in FORMS}
    for step in tqdm(range(args.steps), disable=None):
        ids = data.batch(step, BATCH)
        for run in runs.values():
            run.step(ids, schedule(step, args.steps))
    found: dict[str, Any] = {"setup": {k: str(v) for k, v in vars(args).items()}, "torch": torch.__version__}
    found["held_out"] = {name: held_out_loss(run.model, data.held_out) for name, run in runs.items()}
    found["losses"] = {name: run.losses for name, run in runs.items()}
    print("| | largest difference of the training loss to two-path | held-out loss |\n|---|---|---|")
    for name in runs:
        base = found["losses"][f"{name.split(', ')[0]}, two-path"]
        apart = max(abs(a - b) for a, b in zip(found["losses"][name], base, strict=True))
        print(f"| {name} | {apart:.1e} | {found['held_out'][name]:.5f} |")
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    if args.picture:
        picture(found, args.picture)


if __name__ == "__main__":
    main()
