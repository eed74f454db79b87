"""Two ranks, one engine: save, go on training, then try to load many damaged copies of the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from rso_ds.checkpoint.folder import LATEST, MANIFEST
from rso_ds.comm.rank_context import start
from rso_ds.errors import RSOCheckpointError
from rso_ds.models import find_start
from rso_ds.recipes.training.arguments import parse_arguments
from rso_ds.recipes.training.engines import build_engine
from rso_ds.recipes.training.fill_json import fill, read_json

OUT = Path()  # of the case that runs
PLAN: dict[str, Any] = {}
VOCAB = 64
Case = tuple[str, str, Callable[[Path], Any]]  # file at fault, what is done, how it is done to a copied folder


def build(seed: int, context: Any) -> Any:
    model = OUT / "shape"
    if context.rank == 0:
        LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2).save_pretrained(model)  # fmt: skip
    dist.barrier()
    flags = ["--model", str(model), "--init", "random", "--seq-len", "16", "--global-batch", "4", "--micro-batch", "2"]
    args = parse_arguments([*flags, "--seed", str(seed), "--max-steps", "9", *PLAN["engine"]])
    ds_json = fill(read_json(args), args, context.world_size, 9, context.on_gpu)
    return build_engine(args, ds_json, find_start(str(model), init="random"), VOCAB, context)


def train(engine: Any, seed: int, steps: int, context: Any) -> None:
    source = torch.Generator().manual_seed(1000 * seed + context.rank)
    for _ in range(steps):
        ids = torch.randint(VOCAB, (2, 16), generator=source)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def hashed(engine: Any) -> str:
    """Of every tensor that this rank would save, and of the plain numbers."""
    digest = hashlib.sha256(json.dumps(engine.checkpoints._state.describe(), sort_keys=True).encode())
    for name, piece in sorted(engine.checkpoints._state.pieces().items()):
        digest.update(name.encode() + piece.flat.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tree(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def file_cases(checkpoint: Path, foreign: Path) -> list[Case]:
    cases: list[Case] = []
    chance = random.Random(PLAN["seed"])
    for name in sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()):
        size = (checkpoint / name).stat().st_size

        def add(what: str, change: Callable[[Path], Any], name: str = name) -> None:
            cases.append((name, what, lambda copy: change(copy / "step3" / name)))

        for what, length in (("cut to half", size // 2), ("last byte cut off", size - 1), ("emptied", 0)):
            add(what, lambda f, n=length: os.truncate(f, n))
        for bit in (0, 8 * size - 1, *(chance.randrange(8 * size) for _ in range(PLAN["flips"]))):
            add(f"bit {bit} flipped", lambda f, b=bit: flip(f, b))
        add("one byte appended", lambda f: f.write_bytes(f.read_bytes() + b"\0"))
        add("removed", lambda f: f.unlink())
        add("a folder instead", lambda f: (f.unlink(), f.mkdir()))
        if (foreign / name).is_file() and (foreign / name).read_bytes() != (checkpoint / name).read_bytes():
            add("that of another run", lambda f, n=name: shutil.copy(foreign / n, f))
    return cases


def folder_cases(foreign: Path) -> list[Case]:
    def write(name: str, content: bytes) -> Callable[[Path], Any]:
        return lambda copy: (copy / name).write_bytes(content)

    def another_run(copy: Path) -> None:
        shutil.rmtree(copy / "step3")
        shutil.copytree(foreign, copy / "step3")

    def another_piece(copy: Path) -> None:
        shutil.copy(copy / "step3" / "__0_0.distcp", copy / "step3" / "__9_0.distcp")

    def latest_is_a_folder(copy: Path) -> None:
        (copy / LATEST).unlink()
        (copy / LATEST).mkdir()

    return [
        ("foreign.bin", "file added", write("step3/foreign.bin", b"x")),
        ("__9_0.distcp", "file added", another_piece),
        ("step3", "folder removed", lambda copy: shutil.rmtree(copy / "step3")),
        ("step3", "folder emptied", lambda copy: (shutil.rmtree(copy / "step3"), (copy / "step3").mkdir())),
        ("step3", "the whole checkpoint of another run", another_run),
        (LATEST, "removed", lambda copy: (copy / LATEST).unlink()),
        (LATEST, "emptied", write(LATEST, b"")),
        (LATEST, "random bytes", write(LATEST, bytes(range(128, 160)))),
        (LATEST, "names a checkpoint that is not there", write(LATEST, b"step7")),
        (LATEST, "names a folder elsewhere", write(LATEST, b"../step3")),
        (LATEST, "a folder instead", latest_is_a_folder),
        (LATEST, "names the intact older checkpoint (legitimate)", write(LATEST, b"step2")),
        ("", "nothing (control)", lambda copy: None),
    ]  # fmt: skip


def same_run(client: dict[str, Any]) -> None:
    if client["seed"] != 0:
        raise RSOCheckpointError(f"step3: that run had seed = {client['seed']}, this one 0.")


def attempt(engine: Any, context: Any, original: Path, case: Case) -> dict[str, Any]:
    name, what, change = case
    copy = OUT / "copy"
    if context.rank == 0:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        change(copy)
    dist.barrier()
    before, files = hashed(engine), tree(copy)
    error = None
    try:
        engine.checkpoints.load(copy, None, same_run)
    except RSOCheckpointError as e:
        error = str(e)
    except Exception as e:
        error = f"CRASH {type(e).__name__}: {e}"
    untouched = [hashed(engine) == before, tree(copy) == files]
    gathered: list[Any] = [None] * context.world_size
    dist.all_gather_object(gathered, (error, untouched))
    result = {"file": name, "change": what, "error": None if error is None else error.replace(str(OUT), "OUT")}
    result["same_words_on_all_ranks"] = len({e for e, _ in gathered}) == 1
    result["names_the_file"] = error is not None and (name.removesuffix(".json") if name == MANIFEST else name) in error
    result["model_untouched"] = all(u[0] for _, u in gathered)
    result["checkpoint_untouched"] = all(u[1] for _, u in gathered)
    return result


def run(case: str, folder: Path) -> list[dict[str, Any]]:
    """What became of each damaged copy. ``case``, as JSON: {"engine": flags of the main command, "flips": random bit
    flips a file, "seed": of their places}."""
    global OUT
    OUT = folder
    PLAN.update(json.loads(case))
    context = start(60)
    other = build(1, context)
    train(other, 1, 3, context)
    other.checkpoints.save(OUT / "other", "step3", {"seed": 1})
    engine = build(0, context)
    for step in (2, 3):
        train(engine, step, 2 if step == 2 else 1, context)
        engine.checkpoints.save(OUT / "original", f"step{step}", {"seed": 0})
    train(engine, 9, 1, context)  # what is in memory differs from every checkpoint
    original, foreign = OUT / "original", OUT / "other" / "step3"
    assert (original / "step3" / MANIFEST).is_file()
    return [
        attempt(engine, context, original, damage)
        for damage in [*file_cases(original / "step3", foreign), *folder_cases(foreign)]
    ]
