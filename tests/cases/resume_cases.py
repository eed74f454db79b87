"""Runs that are saved in the middle of a subspace and continued: by new processes, other ranks, other engines."""

from __future__ import annotations

from typing import Any

from support import tiny_moe

STEPS, SAVE, GLOBAL_BATCH = 13, 7, 8
CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
OFFLOAD, DS_ADAM = {"offload_optimizer": CPU}, {"torch_adam": False}
TOKENS = {"targets": ["default", "embeddings", "head"]}


def case(engine: str, rso: dict[str, Any] | None = None, zero: dict[str, Any] | None = None, **more: Any) -> dict:
    """``more``: dropout (probability), background (saved while training goes on), precision, and keys of the JSON."""
    options = {"dropout": 0.0, "background": False, "precision": "fp32", "intermediate": 86, "moe": None}
    return {
        "engine": engine,
        "rso": {
            "lr": 1e-3,
            "eps": 1e-5,
            "rank": 5,
            "interval": 3,
            "form": "two_path",
            "torch_adam": True,
            **(rso or {}),
        },
        "zero": zero or {},
        **{key: more.pop(key, value) for key, value in options.items()},
        "json": more,
    }


def two_rank_cases() -> dict[str, dict]:
    cases = {name: case(name) for name in ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2")}
    for stage in range(4):
        z = f"zero{stage}"
        cases[f"{z}-bf16"] = case(z, precision="bf16", **BF16)
        cases[f"{z}-uneven"] = case(z, intermediate=85)
        cases[f"{z}-fp16"] = case(
            z,
            precision="fp16",
            fp16={"enabled": True, "initial_scale_power": 15, "loss_scale_window": 3, "hysteresis": 1},
        )
        if stage:
            cases[f"{z}-offload"] = case(z, DS_ADAM, OFFLOAD)
            cases[f"{z}-bf16-offload"] = case(z, DS_ADAM, OFFLOAD, precision="bf16", **BF16)
    cases["zero3-offload_param"] = case("zero3", DS_ADAM, {**OFFLOAD, "offload_param": CPU})
    for engine in ("zero1", "zero3", "ddp", "fsdp2"):
        cases[f"{engine}-dropout"] = case(engine, dropout=0.2)
        cases[f"{engine}-background"] = case(engine, background=True)
        cases[f"{engine}-sgd"] = case(engine, {"solver": "sgd", "carry_over": "reset", "lr": 0.1})
        cases[f"{engine}-tokens-project"] = case(engine, {**TOKENS, "carry_over": "project", "weight_decay": 0.1})
    for engine in ("zero0", "zero2", "zero3"):
        masters = {"master_weights": "cpu"}
        cases[f"{engine}-bf16-masters"] = case(engine, masters, precision="bf16", intermediate=85, **BF16)
        cases[f"{engine}-bf16-folded"] = case(
            engine, {"form": "folded", "merge_rounding": "stochastic"}, precision="bf16", **BF16
        )
    for engine in ("zero2", "zero3", "ddp", "fsdp2"):
        cases[f"{engine}-folded"] = case(engine, {"form": "folded"})
    for engine in ("zero1", "zero3", "fsdp2"):
        cases[f"{engine}-gpt_oss"] = case(engine, {"targets": tiny_moe.TARGETS}, intermediate=24, moe="gpt_oss")
    cases["zero1-rank3"] = case("zero1", {"rank": 3, "seed": 5, "sampler": "srht"})
    cases["ddp-local"] = case("ddp", {"communicate": "boundary", "outer_momentum": 0.3})
    cases["fsdp2-bf16"] = case("fsdp2", precision="bf16")
    return cases


def four_rank_cases() -> dict[str, dict]:
    local = {"communicate": "boundary", "outer_momentum": 0.3}
    return {"hsdp": case("hsdp"), "hsdp-uneven": case("hsdp", intermediate=85), "hsdp-local": case("hsdp", local)}


# (saved by, continued by), both on two ranks
CROSSINGS = [
    ("zero1", "zero2"), ("zero2", "zero3"), ("zero3", "zero1"), ("zero0", "zero3"), ("zero3", "fsdp2"),
    ("fsdp2", "zero2"), ("ddp", "zero3"), ("zero2", "ddp"), ("fsdp2", "ddp"), ("zero3", "zero0"),
    ("zero1-bf16", "zero3-bf16"), ("zero3-bf16", "zero2-bf16"), ("zero2-bf16", "zero0-bf16"),
    ("zero2-offload", "zero3"), ("zero3-offload", "zero1"), ("zero1-uneven", "zero3-uneven"),
    ("zero3-bf16-masters", "zero2-bf16-masters"), ("zero1-sgd", "fsdp2-sgd"),
    ("zero3-tokens-project", "ddp-tokens-project"), ("zero1-fp16", "zero3-fp16"),
    ("zero3-gpt_oss", "fsdp2-gpt_oss"), ("fsdp2-gpt_oss", "zero1-gpt_oss"),
    ("zero1", "zero3-folded"), ("zero3", "ddp-folded"), ("ddp", "fsdp2-folded"), ("zero2-folded", "fsdp2"),
    ("fsdp2-folded", "zero1"), ("zero3-folded", "zero2-folded"), ("zero2-bf16", "zero3-bf16-folded"),
]  # fmt: skip

# One run over four sets of processes, each a different number of ranks, saved inside subspaces.
WORLDS, CUTS = (1, 2, 4, 1), (0, 4, 7, 11, STEPS)
CHAINS = {name: [name] * 4 for name in ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2")} | {
    "zero1-fsdp2-zero3-ddp": ["zero1", "fsdp2", "zero3", "ddp"],
    "ddp-zero2-fsdp2-zero1": ["ddp", "zero2", "fsdp2", "zero1"],
    "zero3-ddp-zero1-fsdp2": ["zero3", "ddp", "zero1", "fsdp2"],
}
