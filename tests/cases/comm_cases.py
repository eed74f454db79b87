"""Engines and methods whose bytes are counted and compared with the closed form."""

from __future__ import annotations

from typing import Any

STEPS, INTERVAL = 4, 4

TOKENS = ["default", "embeddings", "head"]
# What a model too large to stay gathered does: every parameter is gathered in forward and again in backward.
LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def case(engine: str, method: str = "rso", stage: int = 0, **options: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "engine": engine,
        "method": method,
        "stage": stage,
        "rso": {"rank_ratio": 0.25},
        "zero": {"reduce_bucket_size": 50_000_000},
        "json": {},
        "gas": 1,
        "checkpointing": False,
        "replicas": 1,
        "rank": 32,
        "model": "llama-9m",
        "vocab": 515,
        "blocks": 2,
    }
    unknown = set(options) - set(spec)
    assert not unknown, unknown
    found = {**spec, **options}
    return {**found, "rso": {"form": "two_path", **found["rso"]}}


def cases(world: int) -> dict[str, dict[str, Any]]:
    """By name; the vocabulary is odd so that rows and flat buffers need padding."""
    found: dict[str, dict[str, Any]] = {}
    small = {"rank_ratio": 0.0625}
    for stage in range(4):
        found[f"zero{stage}-adamw"] = case("zero", "adamw", stage)
        found[f"zero{stage}-rso"] = case("zero", "rso", stage)
        found[f"zero{stage}-rso-h16"] = case("zero", "rso", stage, rso=small)
    for engine in ("ddp", "fsdp2"):
        found[f"{engine}-adamw"] = case(engine, "adamw")
        found[f"{engine}-rso"] = case(engine)
        found[f"{engine}-rso-h16"] = case(engine, rso=small)
    tokens = {"rank_ratio": 0.0625, "targets": TOKENS}
    for engine, stage in (("zero", 2), ("zero", 3), ("ddp", 0), ("fsdp2", 0)):
        found[f"{engine}{stage}-rso-h16-tokens"] = case(engine, "rso", stage, rso=tokens)
    found["ddp-lora"] = case("ddp", "lora")
    found["ddp-powersgd"] = case("ddp", "powersgd")
    found["ddp-local"] = case("ddp", rso={"rank_ratio": 0.25, "communicate": "boundary"})
    found["ddp-gas2"] = case("ddp", gas=2)
    found["fsdp2-gas2"] = case("fsdp2", gas=2)
    if world == 2:
        for stage in (0, 1, 2, 3):
            found[f"zero{stage}-gas2"] = case("zero", "rso", stage, gas=2)
        folded = {"rank_ratio": 0.25, "form": "folded"}
        for stage in (0, 1, 2, 3):
            found[f"zero{stage}-folded"] = case("zero", "rso", stage, rso=folded)
        for stage in (2, 3):
            found[f"zero{stage}-choice"] = case("zero", "rso", stage, rso={"rank_ratio": 0.25, "form": None})
        found["fsdp2-folded"] = case("fsdp2", rso=folded)
        found["ddp-folded"] = case("ddp", rso=folded)
        # Buckets as small, next to the model, as usual ones are next to a large model: sent while backward goes on.
        buckets = {"reduce_bucket_size": 20_000, "overlap_comm": True}
        for stage in (2, 3):
            found[f"zero{stage}-overlap"] = case("zero", "rso", stage, zero=buckets, blocks=4)
        found["ddp-overlap"] = case("ddp", rso={"rank_ratio": 0.5}, blocks=4)
        found["fsdp2-overlap"] = case("fsdp2", blocks=4)
        found["zero2-bf16"] = case("zero", "rso", 2, json={"bf16": {"enabled": True}})
        found["zero2-comm-bf16"] = case("zero", "rso", 2, json={"communication_data_type": "bf16"})
        zero = {"stage3_param_persistence_threshold": 0}
        found["zero3-nothing-kept"] = case("zero", "rso", 3, zero=zero)
        found["zero3-twice"] = case("zero", "rso", 3, zero=LARGE)
        found["zero3-twice-gas2"] = case("zero", "rso", 3, zero=LARGE, gas=2)
        found["zero3-twice-checkpointing"] = case("zero", "rso", 3, zero=LARGE, gas=2, checkpointing=True)
        found["zero3-kept-checkpointing"] = case("zero", "rso", 3, zero=zero, checkpointing=True)
        found["zero2-checkpointing"] = case("zero", "rso", 2, checkpointing=True)
        masters = {"rso": {"rank_ratio": 0.25, "master_weights": "cpu"}, "json": {"bf16": {"enabled": True}}}
        for stage in (0, 1, 3):
            found[f"zero{stage}-bf16-masters"] = case("zero", "rso", stage, **masters)
        found["ddp-bf16-masters"] = case("ddp", **masters)
    if world == 4:
        hpz = {**LARGE, "zero_hpz_partition_size": 2}
        found["hsdp-adamw"] = case("fsdp2", "adamw", replicas=2)
        found["hsdp-rso"] = case("fsdp2", replicas=2)
        found["hsdp-rso-h16"] = case("fsdp2", replicas=2, rso=small)
        found["hsdp-local"] = case("fsdp2", replicas=2, rso={"rank_ratio": 0.25, "communicate": "boundary"})
        found["zero3-hpz-adamw"] = case("zero", "adamw", 3, zero=hpz)
        found["zero3-hpz-rso"] = case("zero", "rso", 3, zero=hpz)
        found["zero3-hpz-rso-gas2"] = case("zero", "rso", 3, zero=hpz, gas=2)
        found["zero3-hpz-choice"] = case("zero", "rso", 3, zero=hpz, rso={"rank_ratio": 0.25, "form": None})
        found["zero3-hpz-folded"] = case("zero", "rso", 3, zero=hpz, rso={"rank_ratio": 0.25, "form": "folded"})
        found["zero3-hpz-small"] = case("zero", "rso", 3, zero={"zero_hpz_partition_size": 2})
        found["zero3-hpz-checkpointing"] = case("zero", "rso", 3, zero=hpz, gas=2, checkpointing=True)
    return found


def full_cases(world: int) -> dict[str, dict[str, Any]]:
    """The table of docs/communication.md: the llama-9m shape with 4096 tokens, every engine and method."""
    shape = {"vocab": 4096, "blocks": None}
    methods: dict[str, dict[str, Any]] = {
        "AdamW": {"method": "adamw"},
        "RSO h/4": {"rso": {"rank_ratio": 0.25}},
        "RSO h/16": {"rso": {"rank_ratio": 0.0625}},
        "RSO h/16, embeddings and head too": {"rso": {"rank_ratio": 0.0625, "targets": TOKENS}},
    }
    found: dict[str, dict[str, Any]] = {}
    engines: dict[str, dict[str, Any]] = {f"ZeRO-{stage}": {"engine": "zero", "stage": stage} for stage in range(4)}
    engines |= {"DDP": {"engine": "ddp"}, "FSDP2": {"engine": "fsdp2"}}
    if world == 4:
        engines["HSDP 2x2"] = {"engine": "fsdp2", "replicas": 2}
    for where, engine in engines.items():
        for name, options in methods.items():
            found[f"{where} | {name}"] = case(**{**shape, **engine, **options})
    found["DDP | PowerSGD, rank h/4"] = case("ddp", "powersgd", **shape)
    found["DDP | PowerSGD, rank h/16"] = case("ddp", "powersgd", rank=8, **shape)
    found["DDP | GaLore"] = case("ddp", "galore", **shape)
    found["DDP | LoRA h/4"] = case("ddp", "lora", **shape)
    local = {"rank_ratio": 0.25, "communicate": "boundary"}
    found["DDP | RSO h/4, local steps"] = case("ddp", rso=local, **shape)
    if world == 4:
        found["HSDP 2x2 | RSO h/4, local steps"] = case("fsdp2", rso=local, replicas=2, **shape)
        configurations = {
            "as a large model": LARGE,
            "all persistent": {"stage3_param_persistence_threshold": 10**9},
            "hpZ 2": {**LARGE, "zero_hpz_partition_size": 2},  # last: DeepSpeed keeps its groups for later engines
        }
        for where, zero in configurations.items():
            for name, options in (("AdamW", {"method": "adamw"}), ("RSO h/4", {})):
                found[f"ZeRO-3, {where} | {name}"] = case("zero", stage=3, zero=zero, **shape, **options)
    return found
