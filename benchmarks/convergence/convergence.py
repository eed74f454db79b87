"""Held-out loss at equal tokens: AdamW, GaLore, APOLLO, LoRA, ReLoRA, and RSO with its options.

    python benchmarks/convergence/convergence.py run methods --data ../shared/data/eltec-eng \
        --tokens-per-parameter 0.25 2 --results convergence.jsonl --jobs 2
    python benchmarks/convergence/convergence.py table convergence.jsonl
    python benchmarks/convergence/convergence.py picture convergence.jsonl convergence.svg
    python benchmarks/convergence/convergence.py frontier convergence.jsonl frontier.svg

Every variant has two learning rates: that of what is trained in the matrices of the blocks, and that of the rest
(embedding, head, norms) as a multiple of it. With the first seed both are searched on a grid of powers of 2, from the
best of the budget next to this one or from ``--start``: the four neighbours are run, the best becomes the centre, until
none is better by more than ``NOISE``. With ``--rest`` the rate of the rest is given, and only that in the matrices is
searched. The best goes on with the other seeds. With ``--at`` nothing is searched. A seed decides the initial weights,
the order of the data and P. Results are appended to RESULTS; what is there is not run again, so that an interrupted
study goes on, and studies share runs. One thread a run, ``--jobs`` runs at a time. GaLore needs ``galore-torch``,
APOLLO ``apollo-torch``, LoRA and ReLoRA ``peft``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from convergence_memory import held
from convergence_methods import build
from convergence_report import frontier, options_of, picture, rates_of, table, variants
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rso_ds.models import llama_config
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import PackedTokens, token_file
from rso_ds.recipes.data.tokenization import load_tokenizer

SEQ_LEN, BATCH = 128, 16
HELD_OUT_TOKENS, ON_THE_WAY = 100_000, 16_384  # at the end, and before
WARM_UP, FINAL, CLIP = 0.05, 0.1, 1.0
SEEDS = (0, 1, 2)
START = (4e-3, 2.0)
MOVES = 8
NOISE = 0.004  # a loss lower by less is no reason to go on

Rates = tuple[float, float]  # in the matrices of the blocks, and the rest's as a multiple of it

PAPER = {"carry_over": "reset", "interval": 50}
RULES = ("reset", "keep_second", "row_mean_second", "project")
QUARTER, SIXTEENTH = {"rank_ratio": 1 / 4}, {"rank_ratio": 1 / 16}


def _rso(**options: Any) -> dict[str, Any]:
    return {"method": "rso", **QUARTER, **options}


# Study -> what is compared in it: a name, and what ``train`` makes of the rest.
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {
        "AdamW": {"method": "adamw"},
        "Muon": {"method": "muon"},
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
    "interval": {f"interval {n}": _rso(interval=n) for n in (1, 2, 5, 10, 20, 50, 200)},
    "rank": {
        **{f"h/{n}": _rso(rank_ratio=1 / n) for n in (2, 4, 8, 16)},
        # The down projection's input is 2.75 times the hidden size, and r otherwise a part of the smaller side.
        "in/4": _rso(rank_of="input"),
    },
    "sampler": {
        f"{sampler}, h/{n}": _rso(sampler=sampler, rank_ratio=1 / n)
        for sampler in ("haar", "gaussian", "coordinate")
        for n in (4, 16)
    },
    "share": {f"shared by {how}": _rso(share_projection=how) for how in ("input", "shape")},
    "proximal": {f"proximal {x:g}": _rso(proximal=x) for x in (0.0, 1e-3, 1e-1)},
    # Not in the package: benchmarks/convergence/trial_rules.py.
    "rules": {
        **{
            rule.replace("_", " "): _rso(trial=rule)
            for rule in ("rotate_row_mean", "row_second", "full_first_step", "growing_interval", "principal", "sweep")
        },
        **{f"main directions, {part:g}": _rso(trial="main_directions", part=part) for part in (0.25, 0.5, 0.75)},
        "main directions, 0.5, project": _rso(trial="main_directions", part=0.5, carry_over="project"),
        "polar": _rso(trial="polar"),
        **{f"polar, interval {n}": _rso(trial="polar", interval=n) for n in (20, 50)},
        "polar, interval 5": _rso(trial="polar", interval=5, mu=0.8),
        "polar, coordinate": _rso(trial="polar", sampler="coordinate"),
        "polar, h/16": _rso(trial="polar", rank_ratio=1 / 16),
        "inner warm up, interval 50": _rso(trial="inner_warm_up", interval=50),
        "sweep, coordinate": _rso(trial="sweep", sampler="coordinate"),
        "important, coordinate": _rso(trial="important", sampler="coordinate"),
    },
    # Where a difference to AdamW comes from: its moments' decay, or a part of RSO without the subspace.
    "why": {
        **{
            f"AdamW, beta1 {b1:g}, beta2 {b2:g}": {"method": "adamw", "betas": [b1, b2]}
            for b1, b2 in ((0.9, 0.95), (0.9, 0.99), (0.5, 0.999))
        },
        "RSO, full rank, coordinate": _rso(rank_ratio=1.0, sampler="coordinate"),
        "RSO, full rank, haar": _rso(rank_ratio=1.0),
        "RSO, one subspace": _rso(interval=1_000_000),  # never redrawn: of LoRA, B alone
    },
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

    def batch(self, step: int, size: int) -> Tensor:
        return self.train.micro_batches(step * size, 1, 1, 0, size)[0]


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
    batch = batch_of(spec)
    steps = max(8, round(spec["tokens"] / (batch * SEQ_LEN)))
    method = build(spec, model, steps)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    marks = {steps // 8, steps // 4, steps // 2, steps}
    curve = []
    start = time.perf_counter()
    for step in range(steps):
        method.set_rates(step, schedule(step, steps))
        ids = data.batch(step, batch)
        loss = method.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        method.before()
        method.optimizer.step()
        method.optimizer.zero_grad()
        if method.after is not None:
            method.after(step + 1)
        if not math.isfinite(loss.item()):
            break
        if step + 1 in marks:
            part = data.held_out if step + 1 == steps else data.held_out[: ON_THE_WAY // SEQ_LEN]
            curve.append([(step + 1) * batch * SEQ_LEN, held_out_loss(method.model, part)])
    complete = bool(curve) and curve[-1][0] == steps * batch * SEQ_LEN
    return {
        **spec, "held_out_loss": curve[-1][1] if complete else None, "curve": curve, "steps": steps,
        "trained": sum(p.numel() for p in trained), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def batch_of(spec: dict[str, Any]) -> int:
    """Sequences in a step; a result says it where it is not the usual number."""
    return int(spec.get("batch", BATCH))


def key(spec: dict[str, Any]) -> str:
    options = {k: float(v) if k == "outside" else v for k, v in spec["options"].items()}
    rest = [spec[k] for k in ("lr", "seed", "tokens", "shape", "vocab", "data")]
    return json.dumps([options, batch_of(spec), *rest], sort_keys=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {key(result): result for result in map(json.loads, lines)}


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.results: Path = args.results
        self.cache: Path = args.cache
        self.seeds: int = args.seeds
        self.start: Rates = (args.start[0], args.start[1])
        self.rest: float | None = args.rest
        self.at: Rates | None = args.at and (args.at[0], args.at[1])
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

    def search(self, variants: dict[str, dict[str, Any]], base: dict[str, Any]) -> None:
        """The two rates of each variant with the first seed, then the best of each with the others."""
        best = {name: self.at or self._begin(base, options) for name, options in variants.items()}
        moving = set() if self.at else set(variants)
        for _ in range(MOVES):
            stars = {name: [best[name], *self._neighbours(best[name])] for name in variants if name in moving}
            self.run(self._spec(base, variants[n], rates, SEEDS[0]) for n, star in stars.items() for rates in star)
            for name, star in stars.items():
                losses = [self._loss(base, variants[name], rates) for rates in star]
                if min(losses) < losses[0] - NOISE:
                    best[name] = star[losses.index(min(losses))]
                else:
                    moving.remove(name)
        if moving:
            print(f"not at their best after {MOVES} moves: {', '.join(sorted(moving))}", flush=True)
        self.run(self._spec(base, variants[n], r, seed) for n, r in best.items() for seed in SEEDS[: self.seeds])

    def _begin(self, base: dict[str, Any], options: dict[str, Any]) -> Rates:
        lr, outside = self._known_best(base, options) or self.start
        return lr, outside if self.rest is None else self.rest / lr

    def _neighbours(self, rates: Rates) -> list[Rates]:
        lr, outside = rates
        if self.rest is not None:
            return [(lr / 2, outside * 2), (lr * 2, outside / 2)]
        return [(lr / 2, outside), (lr * 2, outside), (lr, outside / 2), (lr, outside * 2)]

    def _known_best(self, base: dict[str, Any], options: dict[str, Any]) -> Rates | None:
        """The best rates of this variant at the budget next to this one, of those that have been run."""
        found: dict[int, tuple[float, Rates]] = {}
        for r in self.done.values():
            alike = all(r[k] == base[k] for k in ("shape", "vocab", "data")) and batch_of(r) == batch_of(base)
            if alike and options_of(r) == options and r["seed"] == SEEDS[0] and r["held_out_loss"] is not None:
                mine = (r["held_out_loss"], rates_of(r))
                found[r["tokens"]] = min(found.get(r["tokens"], mine), mine)
        nearest = min(found, key=lambda tokens: abs(math.log(tokens / base["tokens"])), default=None)
        return None if nearest is None else found[nearest][1]

    def _spec(self, base: dict[str, Any], options: dict[str, Any], rates: Rates, seed: int) -> dict[str, Any]:
        lr, outside = rates
        ratio = {} if outside == 1 else {"outside": outside}
        return {**base, "options": {**options, **ratio}, "lr": lr, "seed": seed}

    def _loss(self, base: dict[str, Any], options: dict[str, Any], rates: Rates) -> float:
        result = self.done.get(key(self._spec(base, options, rates, SEEDS[0])))
        return math.inf if result is None or result["held_out_loss"] is None else result["held_out_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("studies", nargs="+", choices=STUDIES)
    run.add_argument("--variants", nargs="+", help="names of the study's variants; all if left out")
    run.add_argument("--seeds", type=int, default=len(SEEDS), help="1 is enough to choose what is worth the others")
    run.add_argument("--start", type=float, nargs=2, default=START, help="rate and multiple where searches begin")
    run.add_argument("--rest", type=float, help="rate of embedding, head, norms: only the other is searched")
    run.add_argument("--at", type=float, nargs=2, help="rate and multiple of every variant: nothing is searched")
    run.add_argument("--batch", type=int, default=BATCH, help=f"sequences of {SEQ_LEN} tokens in a step")
    run.add_argument("--data", required=True)
    run.add_argument("--shape", default="llama-9m")
    run.add_argument("--vocab", type=int, default=4096)
    run.add_argument("--tokens-per-parameter", type=float, nargs="+", default=[0.25, 2.0])
    run.add_argument("--results", type=Path, required=True)
    run.add_argument("--cache", type=Path, default=Path("runs/cache"))
    run.add_argument("--jobs", type=int, default=1)
    shown = commands.add_parser("table")
    shown.add_argument("results", type=Path)
    drawn = commands.add_parser("picture", help="loss by rate, and loss by trained parameters, of the largest budget")
    drawn.add_argument("results", type=Path)
    drawn.add_argument("out", type=Path)
    edge = commands.add_parser("frontier", help="loss of the largest budget against memory, of what has several seeds")
    edge.add_argument("results", type=Path)
    edge.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        known = {variant for name in args.studies for variant in STUDIES[name]}
        if unknown := sorted(set(args.variants or ()) - known):
            parser.error(f"--variants {unknown[0]!r}: the studies have {', '.join(sorted(known))}")
        parameters = AutoModelForCausalLM.from_config(llama_config(args.shape, args.vocab, SEQ_LEN)).num_parameters()
        Data(args.data, args.vocab, args.cache, 0)  # once, before several processes want it
        study = Study(args)
        for ratio in args.tokens_per_parameter:
            base = {"shape": args.shape, "vocab": args.vocab, "data": args.data, "tokens": round(ratio * parameters)}
            if args.batch != BATCH:  # results of the usual batch do not name it
                base["batch"] = args.batch
            for name in args.studies:
                study.search({v: o for v, o in STUDIES[name].items() if v in (args.variants or known)}, base)
    names: dict[str, str] = {}  # several studies contain the defaults: the first names them
    for study_name, found in STUDIES.items():
        for variant, options in found.items():
            names.setdefault(json.dumps(options, sort_keys=True), f"{study_name}: {variant}")
    results = list(read(args.results).values())
    if args.command == "picture":
        picture(results, names, args.out)
    elif args.command == "frontier":
        usual = [r for r in results if "batch" not in r]
        largest = [r for r in usual if r["tokens"] == max(r["tokens"] for r in usual)]
        chosen = {
            place: [v for v in found if len(v.losses) > 1 and "trial" not in v.options]
            for place, found in variants(largest, names).items()
        }
        measured = {
            place: [(v, held({**largest[0], "options": v.options}, BATCH, SEQ_LEN)) for v in found]
            for place, found in chosen.items()
        }
        print(frontier(measured, args.out))
    else:
        print(table(results, names))


if __name__ == "__main__":
    main()
