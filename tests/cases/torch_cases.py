"""The configurations in which DDP, FSDP2 and HSDP training is compared with the reference."""

from __future__ import annotations

from typing import Any

from support import tiny_moe

STEPS, RANK, MICRO = 13, 5, 2
RSO_DEFAULTS = {"lr": 1e-3, "eps": 1e-5, "rank": RANK, "interval": 3, "form": "two_path"}

FOLDED, CHOICE = {"form": "folded"}, {"form": None}
COLUMNS = {"form": "folded", "sampler": "coordinate"}
TOKENS = {"targets": ["default", "embeddings", "head"]}


def case(
    engine: str,
    rso: dict[str, Any] | None = None,
    gas: int = 1,
    clip: float = 0.0,
    intermediate: int = 86,
    checkpointing: str | None = None,
    evaluate: bool = False,
    reshard: bool = True,
    hook: str | None = None,
    precision: str = "fp32",
    tolerance: float = 2e-5,
    weight_tolerance: float | None = None,
    steps: int = STEPS,
    model: dict[str, Any] | None = None,
    poisoned: tuple[int, ...] = (),
    compiled: bool = False,
) -> dict[str, Any]:
    """``model``: arguments of ``tiny_llama.build``; ``evaluate``: a forward pass without backward between backward
    and step; ``tolerance``: of losses, and of weights unless ``weight_tolerance`` is given; ``poisoned``: steps in
    which the loss of rank 1 is infinite; ``reshard``: FSDP2's ``reshard_after_forward``; ``hook``: DDP
    communication hook; ``compiled``: each block by torch.compile. Cases of local steps end at a boundary, where the
    reference has one model."""
    return {
        "engine": engine,
        "rso": {**RSO_DEFAULTS, **(rso or {})},
        "gas": gas,
        "clip": clip,
        "intermediate": intermediate,
        "checkpointing": checkpointing,
        "evaluate": evaluate,
        "reshard": reshard,
        "hook": hook,
        "precision": precision,
        "tolerance": tolerance,
        "weight_tolerance": tolerance if weight_tolerance is None else weight_tolerance,
        "steps": steps,
        "model": model or {},
        "poisoned": poisoned,
        "compiled": compiled,
    }


def quick_two_rank_cases() -> dict[str, dict[str, Any]]:
    """Every option once under either engine, several in a case. ``two_rank_cases`` has them one by one as well."""
    cases = {}
    for engine in ("ddp", "fsdp2"):
        cases[engine] = case(engine)
        cases[f"{engine}-gas2-clip-adam-gaussian-keep_second-dense_lr-embeddings"] = case(
            engine,
            {**TOKENS, "solver": "adam", "sampler": "gaussian", "carry_over": "keep_second", "dense_lr": 3e-4},
            gas=2,
            clip=0.3,
            model={"vocab": 63},
        )
        cases[f"{engine}-uneven-sgd-project"] = case(
            engine, {"solver": "sgd", "carry_over": "project", "lr": 1e-2}, intermediate=85
        )
        cases[f"{engine}-project-uneven"] = case(engine, {"carry_over": "project"}, intermediate=85)
        cases[f"{engine}-folded-tied-coordinate-reset-decay"] = case(
            engine,
            {**FOLDED, **TOKENS, "sampler": "coordinate", "carry_over": "reset", "weight_decay": 0.1},
            model={"vocab": 63, "tie": True},
        )
        cases[f"{engine}-shared_by_shape-srht-stock_block-checkpointing-reentrant"] = case(
            engine,
            {"share_projection": "shape", "sampler": "srht", "carry_over": "project", "lean": "none"},
            checkpointing="reentrant",
        )
        cases[f"{engine}-folded-checkpointing"] = case(engine, FOLDED, checkpointing="non_reentrant", evaluate=True)
        cases[f"{engine}-compiled"] = case(engine, CHOICE, compiled=True)
        cases[f"{engine}-decay-proximal"] = case(engine, {"weight_decay": 0.1, "proximal": 0.3})
        cases[f"{engine}-poisoned"] = case(engine, poisoned=(4, 5), steps=15)
        cases[f"{engine}-bf16_weights-coordinate"] = case(
            engine,
            {**COLUMNS, "merge_rounding": "stochastic"},
            precision="bf16_weights",
            tolerance=1e-2,
            weight_tolerance=3e-2,
        )
    return cases


def moe_case(engine: str, kind: str, rso: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return case(engine, {"targets": tiny_moe.TARGETS, **(rso or {})}, intermediate=24, model={"moe": kind}, **options)


QUICK_ONE_BY_ONE = {
    "fsdp2-gpt_oss-uneven", "fsdp2-experts-empty_shard-project",
    "ddp-local", "ddp-local-momentum", "ddp-compressed-bf16", "ddp-compressed-int8", "fsdp2-evaluate-kept",
    "fsdp2-bf16", "ddp-choice", "fsdp2-choice",
}  # fmt: skip
QUICK_FOUR = {
    "hsdp", "hsdp-clip-gas2-project", "hsdp-coordinate-decay", "hsdp-poisoned", "hsdp-tied", "hsdp-folded",
    "hsdp-choice", "hsdp-local", "fsdp2-uneven", "fsdp2-empty_shards",
}  # fmt: skip


def two_rank_cases() -> dict[str, dict[str, Any]]:
    cases = quick_two_rank_cases()
    for engine in ("ddp", "fsdp2"):
        cases[engine] = case(engine)
        cases[f"{engine}-gas2"] = case(engine, gas=2)
        cases[f"{engine}-compiled"] = case(engine, rso=CHOICE, compiled=True)
        cases[f"{engine}-clip"] = case(engine, clip=0.3)
        cases[f"{engine}-uneven"] = case(engine, intermediate=85)
        cases[f"{engine}-project-uneven"] = case(engine, {"carry_over": "project"}, intermediate=85)
        cases[f"{engine}-reset"] = case(engine, {"carry_over": "reset"})
        cases[f"{engine}-keep_second"] = case(engine, {"carry_over": "keep_second"})
        cases[f"{engine}-decay-proximal"] = case(engine, {"weight_decay": 0.1, "proximal": 0.3})
        cases[f"{engine}-dense_lr-gaussian"] = case(engine, {"dense_lr": 3e-4, "sampler": "gaussian"})
        cases[f"{engine}-adam-coordinate"] = case(engine, {"solver": "adam", "sampler": "coordinate"})
        cases[f"{engine}-srht-project"] = case(engine, {"sampler": "srht", "carry_over": "project"})
        cases[f"{engine}-sgd"] = case(engine, {"solver": "sgd", "carry_over": "project", "lr": 1e-2})
        cases[f"{engine}-shared_by_shape"] = case(engine, {"share_projection": "shape", "carry_over": "project"})
        cases[f"{engine}-stock_block"] = case(engine, {"lean": "none"})
        for kind in ("reentrant", "non_reentrant"):
            cases[f"{engine}-checkpointing-{kind}"] = case(engine, checkpointing=kind)
        cases[f"{engine}-embeddings"] = case(engine, TOKENS, model={"vocab": 63})
        cases[f"{engine}-tied"] = case(engine, {**TOKENS, "carry_over": "project"}, model={"vocab": 63, "tie": True})
        cases[f"{engine}-poisoned"] = case(engine, poisoned=(4, 5), steps=15)
        cases[f"{engine}-evaluate"] = case(engine, evaluate=True)
        cases[f"{engine}-folded"] = case(engine, FOLDED, gas=2, clip=0.3)
        cases[f"{engine}-folded-uneven"] = case(engine, {**FOLDED, "carry_over": "project"}, intermediate=85)
        cases[f"{engine}-folded-coordinate"] = case(engine, {**FOLDED, "sampler": "coordinate", "weight_decay": 0.1})
        cases[f"{engine}-folded-tied"] = case(engine, {**FOLDED, **TOKENS}, model={"vocab": 63, "tie": True})
        cases[f"{engine}-folded-checkpointing"] = case(engine, FOLDED, checkpointing="non_reentrant", evaluate=True)
        cases[f"{engine}-choice"] = case(engine, CHOICE)
        # Dense parameters are in bf16 too, and have no masters here: they bound how near the reference is.
        cases[f"{engine}-bf16_weights-coordinate"] = case(
            engine,
            {**COLUMNS, "merge_rounding": "stochastic"},
            precision="bf16_weights",
            tolerance=1e-2,
            weight_tolerance=3e-2,
        )
    cases["fsdp2-bf16_weights-coordinate-masters"] = case(
        "fsdp2",
        {**COLUMNS, "master_weights": "device"},
        precision="bf16_weights",
        tolerance=1e-2,
        weight_tolerance=3e-2,
    )
    cases["fsdp2-gpt_oss-uneven"] = moe_case("fsdp2", "gpt_oss", {"carry_over": "project"}, gas=2, clip=0.3)
    cases["fsdp2-experts-empty_shard-project"] = moe_case("fsdp2", "one_expert", {"carry_over": "project"})
    for engine in ("ddp", "fsdp2"):
        for kind in ("mixtral", "qwen3_moe", "gpt_oss"):
            cases[f"{engine}-{kind}-choice"] = moe_case(engine, kind, CHOICE)
            cases[f"{engine}-{kind}-coordinate-evaluate"] = moe_case(
                engine, kind, {**COLUMNS, "carry_over": "project"}, evaluate=True
            )
            cases[f"{engine}-{kind}-checkpointing"] = moe_case(engine, kind, checkpointing="non_reentrant")
    cases["ddp-local-mixtral"] = moe_case(
        "ddp", "mixtral", {"communicate": "boundary", "outer_momentum": 0.5}, steps=12
    )
    cases["ddp-local"] = case("ddp", {"communicate": "boundary"}, steps=12)
    cases["ddp-local-momentum"] = case("ddp", {"communicate": "boundary", "outer_momentum": 0.5}, steps=12)
    # By SGD: a step of Adam is the same for a sum of gradients as for their mean.
    sgd = {"solver": "sgd", "carry_over": "project", "lr": 1e-2}
    cases["ddp-compressed-bf16"] = case("ddp", sgd, hook="bf16", tolerance=2e-3)
    cases["ddp-compressed-int8"] = case("ddp", sgd, hook="int8", tolerance=1e-2)
    cases["fsdp2-evaluate-kept"] = case("fsdp2", evaluate=True, reshard=False)
    # Adam's step for a gradient near zero has the sign of bf16's rounding: 3.5e-3 and 8.5e-3 were seen on two CPUs.
    cases["fsdp2-bf16"] = case("fsdp2", precision="bf16", tolerance=5e-3, weight_tolerance=2e-2)
    return cases


def four_rank_cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for engine in ("hsdp", "fsdp2"):
        cases[engine] = case(engine)
        cases[f"{engine}-uneven"] = case(engine, intermediate=85)
        cases[f"{engine}-clip-gas2-project"] = case(engine, {"carry_over": "project"}, gas=2, clip=0.3)
        cases[f"{engine}-coordinate-decay"] = case(engine, {"sampler": "coordinate", "weight_decay": 0.1})
    # 5 rows on 4 ranks: pieces of 2, 2, 1 and none.
    cases["fsdp2-empty_shards"] = case("fsdp2", {"rank": 2}, intermediate=5)
    cases["hsdp-evaluate-kept"] = case("hsdp", evaluate=True, reshard=False)
    cases["hsdp-poisoned"] = case("hsdp", poisoned=(4, 5), steps=15)
    cases["hsdp-tied"] = case("hsdp", TOKENS, model={"vocab": 63, "tie": True})
    cases["hsdp-folded"] = case("hsdp", {**FOLDED, "sampler": "coordinate"}, intermediate=85)
    cases["hsdp-choice"] = case("hsdp", CHOICE)
    cases["hsdp-mixtral"] = moe_case("hsdp", "mixtral")
    cases["fsdp2-experts-empty_shards"] = moe_case("fsdp2", "gpt_oss")
    cases["hsdp-local"] = case("hsdp", {"communicate": "boundary"}, steps=12)
    cases["ddp"] = case("ddp")
    return cases
