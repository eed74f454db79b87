"""Held-out loss at equal tokens: AdamW, GaLore, APOLLO, LoRA, ReLoRA, and RSO with its options.

    python benchmarks/convergence.py run methods --data ../shared/data/eltec-eng --tokens-per-parameter 0.25 2 \
        --results convergence.jsonl --jobs 2
    python benchmarks/convergence.py table convergence.jsonl

Every variant of a study is run at each learning rate of a grid with the first seed; while the best rate is the first or
last one the grid grows by a factor of 2 on that side; the best goes on with the other seeds. A seed decides the initial
weights, the order of the data and P. Results are appended to RESULTS; what is there is not run again, so that an
interrupted study goes on, and studies share runs. One thread a run, ``--jobs`` runs at a time. GaLore needs
``galore-torch``, APOLLO ``apollo-torch``, LoRA and ReLoRA ``peft``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

import rso_ds
from rso_ds.models import llama_config
from rso_ds.training.corpus import Corpus
from rso_ds.training.dataset import PackedTokens, token_file
from rso_ds.training.tokenization import load_tokenizer

SEQ_LEN, BATCH = 128, 16
HELD_OUT_TOKENS, ON_THE_WAY = 100_000, 16_384  # at the end, and before
WARM_UP, FINAL, CLIP = 0.05, 0.1, 1.0
SEEDS = (0, 1, 2)
GRID = (2e-3, 4e-3)
EXTENSIONS = 4
RELORA_RESETS, RELORA_WARM_UP = 8, 10  # resets in a run, steps of warm-up after each

PAPER = {"carry_over": "reset", "interval": 50}
RULES = ("reset", "keep_second", "row_mean_second", "project")
QUARTER, SIXTEENTH = {"rank_ratio": 1 / 4}, {"rank_ratio": 1 / 16}


def _rso(**options: Any) -> dict[str, Any]:
    return {"method": "rso", **QUARTER, **options}


# Study -> what is compared in it: a name, and what ``train`` makes of the rest.
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {
        "AdamW": {"method": "adamw"},
        **{
            f"{name}, {label}": {"method": name.lower(), **rank}
            for label, rank in (("h/4", QUARTER), ("h/16", SIXTEENTH))
            for name in ("GaLore", "APOLLO", "LoRA", "ReLoRA", "RSO")
        },
        "RSO of the paper, h/4": _rso(**PAPER),
    },
    "carry_over": {
        f"{rule}, interval {interval}": _rso(carry_over=rule, interval=interval)
        for rule in RULES
        for interval in (10, 50)
    },
    "interval": {f"interval {n}": _rso(interval=n) for n in (1, 5, 10, 50, 200)},
    "rank": {f"h/{n}": _rso(rank_ratio=1 / n) for n in (2, 4, 8, 16)},
    "sampler": {
        f"{sampler}, h/{n}": _rso(sampler=sampler, rank_ratio=1 / n)
        for sampler in ("haar", "gaussian", "coordinate")
        for n in (4, 16)
    },
    "share": {f"shared by {how}": _rso(share_projection=how) for how in ("input", "shape")},
    "proximal": {f"proximal {x:g}": _rso(proximal=x) for x in (0.0, 1e-3, 1e-1)},
}


class Data:
    """Tokens of ``source``, by a BPE trained on it."""

    def __init__(self, source: str, vocab: int, cache: Path, seed: int) -> None:
        corpus = Corpus(source)
        tokenizer = load_tokenizer(None, corpus, vocab, cache)
        self.train = PackedTokens(token_file(corpus, "train", tokenizer, cache), SEQ_LEN, seed)
        held_out = PackedTokens(token_file(corpus, "held_out", tokenizer, cache), SEQ_LEN)
        count = min(held_out.count, HELD_OUT_TOKENS // SEQ_LEN)
        self.held_out = held_out.sequences(torch.arange(count).numpy())

    def batch(self, step: int) -> Tensor:
        return self.train.micro_batches(step, 1, 1, 0, BATCH)[0]


def block_linears(model: nn.Module) -> list[nn.Linear]:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]


class Method:
    """A model with its optimizer; ``after`` is called with the number of steps taken."""

    def __init__(self, model: nn.Module, optimizer: Any, after: Callable[[int], None] | None = None) -> None:
        self.model, self.optimizer, self.after = model, optimizer, after
        self.groups = optimizer.param_groups
        self.rates = [group["lr"] for group in self.groups]
        self.scale: Callable[[int], float] = lambda step: 1.0


def build(spec: dict[str, Any], model: PreTrainedModel, steps: int) -> Method:
    options = dict(spec["options"])
    method, lr = options.pop("method"), spec["lr"]
    if method == "adamw":
        return Method(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
    if method == "rso":
        config = rso_ds.RSOConfig(lr=lr, seed=spec["seed"], **options)
        rso_ds.convert(model, config)
        return Method(model, rso_ds.RSO(model, config))
    rank = max(1, round(options.pop("rank_ratio") * model.config.hidden_size))
    assert not options, options
    if method in ("galore", "apollo"):
        return Method(model, _projected(method, model, rank, lr))
    return _adapted(method, model, rank, lr, steps)


def _projected(method: str, model: nn.Module, rank: int, lr: float) -> Any:
    """Optimizers of dense layers that keep their state in a subspace; constants are their authors'."""
    inside = [layer.weight for layer in block_linears(model)]
    ids = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in ids]
    low = {"params": inside, "rank": rank, "update_proj_gap": 200}
    if method == "galore":
        from galore_torch import GaLoreAdamW

        groups = [{"params": rest}, {**low, "scale": 0.25, "proj_type": "std"}]
        return GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    low |= {"scale": 1.0, "scale_type": "channel", "proj": "random", "proj_type": "std"}
    return APOLLOAdamW([{"params": rest}, low], lr=lr, weight_decay=0.0)


def _adapted(method: str, model: PreTrainedModel, rank: int, lr: float, steps: int) -> Method:
    """LoRA from random weights, embeddings, head and norms dense; ReLoRA merges and begins again now and then."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if m in set(block_linears(model))})
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0))
    layers = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    frozen = {id(layer.get_base_layer().weight) for layer in layers}
    for p in adapted.parameters():
        p.requires_grad_(id(p) not in frozen)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    if method == "lora":
        return Method(adapted, optimizer)
    every = max(1, steps // RELORA_RESETS)

    @torch.no_grad()
    def restart(done: int) -> None:
        if done % every or done == steps:
            return
        for layer in layers:
            layer.get_base_layer().weight += layer.get_delta_weight("default")
            layer.reset_lora_parameters("default", True)
            for factors in (layer.lora_A, layer.lora_B):
                optimizer.state.pop(factors["default"].weight, None)

    result = Method(adapted, optimizer, restart)
    result.scale = lambda step: 1.0 if step < every else min(1.0, (step % every + 1) / RELORA_WARM_UP)
    return result


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Tensor) -> float:
    model.eval()
    total = 0.0
    for ids in held_out.split(BATCH):
        logits = model(input_ids=ids, use_cache=False).logits
        total += cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="sum").item()
    model.train()
    return total / (held_out.shape[0] * (SEQ_LEN - 1))


def train(spec: dict[str, Any], cache: Path) -> dict[str, Any]:
    """One run: ``spec`` with its held-out loss, and on fewer tokens at an eighth, a quarter and half of the run."""
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    data = Data(spec["data"], spec["vocab"], cache, spec["seed"])
    model = AutoModelForCausalLM.from_config(llama_config(spec["shape"], spec["vocab"], SEQ_LEN))
    steps = max(8, round(spec["tokens"] / (BATCH * SEQ_LEN)))
    method = build(spec, model, steps)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    marks = {steps // 8, steps // 4, steps // 2, steps}
    curve = []
    start = time.perf_counter()
    for step in range(steps):
        for group, rate in zip(method.groups, method.rates, strict=True):
            group["lr"] = rate * schedule(step, steps) * method.scale(step)
        ids = data.batch(step)
        loss = method.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        method.optimizer.step()
        method.optimizer.zero_grad()
        if method.after is not None:
            method.after(step + 1)
        if not math.isfinite(loss.item()):
            break
        if step + 1 in marks:
            part = data.held_out if step + 1 == steps else data.held_out[: ON_THE_WAY // SEQ_LEN]
            curve.append([(step + 1) * BATCH * SEQ_LEN, held_out_loss(method.model, part)])
    complete = bool(curve) and curve[-1][0] == steps * BATCH * SEQ_LEN
    return {
        **spec, "held_out_loss": curve[-1][1] if complete else None, "curve": curve, "steps": steps,
        "trained": sum(p.numel() for p in trained), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def key(spec: dict[str, Any]) -> str:
    return json.dumps([spec[k] for k in ("options", "lr", "seed", "tokens", "shape", "vocab", "data")], sort_keys=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {key(result): result for result in map(json.loads, lines)}


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.results: Path = args.results
        self.cache: Path = args.cache
        self.pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
        self.done = read(self.results)

    def run(self, specs: Iterable[dict[str, Any]]) -> None:
        """Those that have not been run, and write down each as it ends."""
        waiting = {key(s): s for s in specs if key(s) not in self.done}
        for future in as_completed([self.pool.submit(train, spec, self.cache) for spec in waiting.values()]):
            result = future.result()
            self.done[key(result)] = result
            with open(self.results, "a") as f:
                f.write(json.dumps(result) + "\n")
            loss = result["held_out_loss"]
            shown = "diverged" if loss is None else f"{loss:.4f}"
            print(f"{result['options']}  lr {result['lr']:g}  seed {result['seed']}  {shown}", flush=True)

    def sweep(self, variants: dict[str, dict[str, Any]], base: dict[str, Any]) -> None:
        """The rates with the first seed, then the best of each with the others."""
        grids = {name: list(GRID) for name in variants}
        for _ in range(EXTENSIONS + 1):
            self.run(self._spec(base, variants[n], lr, SEEDS[0]) for n, grid in grids.items() for lr in grid)
            for name, grid in grids.items():
                losses = [self._loss(base, variants[name], lr) for lr in grid]
                best = losses.index(min(losses))
                if best == 0:
                    grid.insert(0, grid[0] / 2)
                if best == len(losses) - 1:
                    grid.append(grid[-1] * 2)
        found = {n: min(grid, key=lambda lr: self._loss(base, variants[n], lr)) for n, grid in grids.items()}
        self.run(self._spec(base, variants[n], lr, seed) for n, lr in found.items() for seed in SEEDS)

    def _spec(self, base: dict[str, Any], options: dict[str, Any], lr: float, seed: int) -> dict[str, Any]:
        return {**base, "options": options, "lr": lr, "seed": seed}

    def _loss(self, base: dict[str, Any], options: dict[str, Any], lr: float) -> float:
        result = self.done.get(key(self._spec(base, options, lr, SEEDS[0])))
        return math.inf if result is None or result["held_out_loss"] is None else result["held_out_loss"]


def table(results: Iterable[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds at the best rate (of seed 0), and the loss at every rate."""
    names = {json.dumps(o, sort_keys=True): f"{study}: {n}" for study, vs in STUDIES.items() for n, o in vs.items()}
    found: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for r in results:
        place = (r["shape"], r["data"], r["tokens"])
        found.setdefault(place, {}).setdefault(json.dumps(r["options"], sort_keys=True), []).append(r)
    lines = []
    for (shape, data, tokens), variants in found.items():
        lines += [f"\n{shape}, {Path(data).name}, {tokens:,} tokens\n"]
        lines += ["| | held-out loss | lr | trained | loss by rate, seed 0 |", "|---|---|---|---|---|"]
        for options, runs in variants.items():
            first = {r["lr"]: r["held_out_loss"] for r in runs if r["seed"] == SEEDS[0]}
            best = min(first, key=lambda lr: math.inf if first[lr] is None else first[lr])
            losses = [r["held_out_loss"] for r in runs if r["lr"] == best and r["held_out_loss"] is not None]
            spread = f" ± {stdev(losses):.4f} ({len(losses)})" if len(losses) > 1 else ""
            shown = f"{mean(losses):.4f}{spread}" if losses else "diverged"
            rates = ", ".join(f"{lr:g}: {'-' if x is None else f'{x:.4f}'}" for lr, x in sorted(first.items()))
            lines.append(f"| {names.get(options, options)} | {shown} | {best:g} | {runs[0]['trained']:,} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("studies", nargs="+", choices=STUDIES)
    run.add_argument("--data", required=True)
    run.add_argument("--shape", default="llama-9m")
    run.add_argument("--vocab", type=int, default=4096)
    run.add_argument("--tokens-per-parameter", type=float, nargs="+", default=[0.25, 2.0])
    run.add_argument("--results", type=Path, required=True)
    run.add_argument("--cache", type=Path, default=Path("runs/cache"))
    run.add_argument("--jobs", type=int, default=1)
    shown = commands.add_parser("table")
    shown.add_argument("results", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        parameters = AutoModelForCausalLM.from_config(llama_config(args.shape, args.vocab, SEQ_LEN)).num_parameters()
        Data(args.data, args.vocab, args.cache, 0)  # once, before several processes want it
        study = Study(args)
        for ratio in args.tokens_per_parameter:
            base = {"shape": args.shape, "vocab": args.vocab, "data": args.data, "tokens": round(ratio * parameters)}
            for name in args.studies:
                study.sweep(STUDIES[name], base)
    print(table(read(args.results).values()))


if __name__ == "__main__":
    main()
