"""The configurations in which DeepSpeed training is compared with the reference."""

from __future__ import annotations

import copy
from typing import Any

from support import tiny_moe

STEPS, RANK, MICRO = 13, 5, 2
FORCED = (4, 5)  # steps at which the fp16 tests force an overflow

# With these layers and intermediate 85, the B's have an odd number of rows together, so that the cut of
# their flat tensor into two pieces falls inside a row.
ODD_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "layers.0.mlp.gate_proj"]

# Embedding and head in a subspace too; a vocabulary of 63 does not divide by two ranks.
TOKENS = {"targets": ["default", "embeddings", "head"]}
ODD_VOCAB = {"vocab": 63}
TIED = {"tie": True}
FOLDED, CHOICE = {"form": "folded"}, {"form": None}
EXPERTS = {"targets": tiny_moe.TARGETS}

RSO_DEFAULTS = {
    "lr": 1e-3, "eps": 1e-5, "rank": RANK, "interval": 3, "form": "two_path", "torch_adam": True,
}  # fmt: skip
CPU = {"device": "cpu"}


def case(
    stage: int,
    rso: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    tolerance: float = 2e-5,
    gas: int = 1,
    clip: float = 0.0,
    intermediate: int = 86,
    zero_init: bool = False,
    checkpointing: str | None = None,
    model: dict[str, Any] | None = None,
    compiled: str | None = None,
    claims: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """``model``: arguments of ``tiny_llama.build``; ``compiled``: backend of ``engine.compile``; ``claims``: what the
    run must have been, or the comparison proves nothing of it; ``extra``: further top-level keys of the DeepSpeed JSON.
    """
    return {
        "stage": stage,
        "rso": {**RSO_DEFAULTS, **(rso or {})},
        "gas": gas,
        "clip": clip,
        "intermediate": intermediate,
        "zero_init": zero_init,
        "checkpointing": checkpointing,
        "model": model or {},
        "compiled": compiled,
        "tolerance": tolerance,
        "claims": claims or {},
        "json": {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": gas,
            "gradient_clipping": clip,
            "zero_optimization": {
                "stage": stage,
                **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
                **(zero or {}),
            },
            **extra,
        },
    }


SCHEDULE = {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 3}}


def quick_cases() -> dict[str, dict[str, Any]]:
    """Every option once at every stage, several in a case. ``fp32_cases`` has them one by one as well."""
    cases: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        z = f"zero{stage}"
        cases[z] = case(stage, claims={"solver": "AdamW"})
        cases[f"{z}-gas2-clip-scheduler-adam-gaussian-keep_second-dense_lr-embeddings"] = case(
            stage,
            {**TOKENS, "solver": "adam", "sampler": "gaussian", "carry_over": "keep_second", "dense_lr": 3e-4},
            gas=2,
            clip=0.3,
            model=ODD_VOCAB,
            scheduler=SCHEDULE,
            claims={"solver": "Adam"},
        )
        cases[f"{z}-split_rows-sgd-project"] = case(
            stage,
            {"targets": ODD_TARGETS, "solver": "sgd", "carry_over": "project", "lr": 1e-2},
            intermediate=85,
            claims={"solver": "SGD", "cut_rows": stage > 0},
        )
        cases[f"{z}-split_rows-project"] = case(
            stage,
            {"targets": ODD_TARGETS, "carry_over": "project"},
            intermediate=85,
            claims={"cut_rows": stage > 0},
        )
        cases[f"{z}-folded-tied-coordinate-reset-decay"] = case(
            stage,
            {**FOLDED, **TOKENS, "sampler": "coordinate", "carry_over": "reset", "weight_decay": 0.1},
            gas=2,
            model={**TIED, **ODD_VOCAB},
            claims={"form": "folded"},
        )
        cases[f"{z}-fused-shared_by_shape-folded-srht"] = case(
            stage,
            {**FOLDED, "torch_adam": False, "share_projection": "shape", "sampler": "srht"},
            claims={"solver": "FusedAdam", "form": "folded"},
        )
        # One block will do: compiling is what takes the time.
        cases[f"{z}-compiled-one_block"] = case(
            stage,
            CHOICE,
            compiled="aot_eager" if stage < 3 else "eager",
            model={"layers": 1},
            claims={"form": "folded"},
        )
        cases[f"{z}-decay-proximal-stock_block"] = case(
            stage, {"weight_decay": 0.1, "proximal": 0.3, "lean": "none"}, claims={"form": "two_path"}
        )
    for stage in (1, 2, 3):
        # DeepSpeedCPUAdam takes its square roots in an approximate vector form.
        cases[f"zero{stage}-offload"] = case(
            stage,
            {"torch_adam": False, "carry_over": "reset"},
            {"offload_optimizer": CPU},
            claims={"solver": "DeepSpeedCPUAdam"},
        )
    for stage, kind in ((2, "non_reentrant"), (3, "reentrant")):
        cases[f"zero{stage}-checkpointing-{kind}"] = case(stage, checkpointing=kind)
    for stage, kind in ((2, "reentrant"), (3, "non_reentrant")):
        cases[f"zero{stage}-tied-checkpointing-{kind}"] = case(stage, TOKENS, checkpointing=kind, model=TIED)
    cases |= moe_cases(True)
    both = {"offload_optimizer": CPU, "offload_param": CPU}
    cases["zero3-choice-offload-param"] = case(3, {**CHOICE, "torch_adam": False}, both, claims={"form": "two_path"})
    cases["zero3-init-embeddings"] = case(
        3, TOKENS, zero_init=True, model=ODD_VOCAB, claims={"cut_rows": 2}
    )  # cut rows: of the embedding and of the head
    cases["zero3-folded-persistent"] = case(3, FOLDED, zero={"stage3_param_persistence_threshold": 100000})
    cases["zero3-choice-hpz"] = case(
        3, CHOICE, zero={"zero_hpz_partition_size": 2}, claims={"form": "two_path"}
    )  # last: DeepSpeed keeps its groups for later engines
    return cases


def moe_cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Stacked experts."""
    if quick:
        return {
            "zero2-mixtral-project": moe_case(2, "mixtral", {"carry_over": "project"}, gas=2),
            "zero3-qwen3_moe": moe_case(3, "qwen3_moe"),
            "zero3-gpt_oss-folded-decay": moe_case(3, "gpt_oss", {**FOLDED, "weight_decay": 0.1}),
        }
    cases = {}
    for kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        for stage in range(4):
            cases[f"zero{stage}-{kind}-reset"] = moe_case(stage, kind, {"carry_over": "reset"})
        cases[f"zero2-{kind}-choice-coordinate"] = moe_case(2, kind, {**CHOICE, "sampler": "coordinate"})
        cases[f"zero3-{kind}-init-srht"] = moe_case(3, kind, {"sampler": "srht"}, zero_init=True)
        cases[f"zero3-{kind}-checkpointing"] = moe_case(3, kind, checkpointing="non_reentrant")
        cases[f"zero1-{kind}-stock_block"] = moe_case(1, kind, {"lean": "none"})
    cases["zero2-mixtral-down_alone"] = moe_case(2, "mixtral", {"targets": tiny_moe.DOWN_ALONE})
    cases["zero3-gpt_oss-offload"] = moe_case(
        3, "gpt_oss", {"torch_adam": False, "carry_over": "reset"}, zero={"offload_optimizer": CPU}
    )
    return cases


def moe_case(stage: int, kind: str, rso: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return case(stage, {**EXPERTS, **(rso or {})}, intermediate=24, model={"moe": kind}, **options)


def fp32_cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        z = f"zero{stage}"
        cases[z] = case(stage)
        cases[f"{z}-gas2"] = case(stage, gas=2)
        cases[f"{z}-compiled"] = case(stage, CHOICE, compiled="aot_eager")
        cases[f"{z}-clip"] = case(stage, clip=0.3)
        cases[f"{z}-uneven"] = case(stage, intermediate=85)
        odd = {"targets": ODD_TARGETS}
        cases[f"{z}-split_rows"] = case(stage, odd, intermediate=85)
        cases[f"{z}-split_rows-project"] = case(stage, {**odd, "carry_over": "project"}, intermediate=85)
        cases[f"{z}-project"] = case(stage, {"carry_over": "project"})
        cases[f"{z}-reset"] = case(stage, {"carry_over": "reset"})
        cases[f"{z}-keep_second"] = case(stage, {"carry_over": "keep_second"})
        cases[f"{z}-decay-proximal"] = case(stage, {"weight_decay": 0.1, "proximal": 0.3})
        cases[f"{z}-dense_lr-gaussian"] = case(stage, {"dense_lr": 3e-4, "sampler": "gaussian"})
        cases[f"{z}-adam-coordinate"] = case(stage, {"solver": "adam", "sampler": "coordinate"})
        cases[f"{z}-srht-project"] = case(stage, {"sampler": "srht", "carry_over": "project"})
        cases[f"{z}-sgd"] = case(stage, {"solver": "sgd", "carry_over": "project", "lr": 1e-2})
        cases[f"{z}-fused"] = case(stage, {"torch_adam": False})
        cases[f"{z}-fused-reset"] = case(stage, {"torch_adam": False, "carry_over": "reset"})
        cases[f"{z}-shared_by_shape"] = case(stage, {"share_projection": "shape", "carry_over": "project"})
        cases[f"{z}-stock_block"] = case(stage, {"lean": "none"})
        cases[f"{z}-embeddings"] = case(stage, TOKENS, model=ODD_VOCAB)
        cases[f"{z}-embeddings-project"] = case(stage, {**TOKENS, "carry_over": "project"}, model=ODD_VOCAB)
        cases[f"{z}-tied"] = case(stage, TOKENS, model=TIED)
        cases[f"{z}-tied-coordinate"] = case(
            stage, {**TOKENS, "sampler": "coordinate", "weight_decay": 0.1}, gas=2, model={**TIED, **ODD_VOCAB}
        )
        cases[f"{z}-scheduler"] = case(
            stage,
            {"weight_decay": 0.1},
            scheduler=SCHEDULE,
        )
        cases[f"{z}-folded"] = case(stage, FOLDED, gas=2, clip=0.3)
        cases[f"{z}-folded-split_rows"] = case(stage, {**odd, **FOLDED, "carry_over": "project"}, intermediate=85)
        cases[f"{z}-folded-coordinate"] = case(stage, {**FOLDED, "sampler": "coordinate", "weight_decay": 0.1})
        cases[f"{z}-folded-tied"] = case(stage, {**FOLDED, **TOKENS}, model={**TIED, **ODD_VOCAB})
        cases[f"{z}-choice"] = case(stage, CHOICE)
    for stage in (1, 2, 3):
        # DeepSpeedCPUAdam takes its square roots in an approximate vector form.
        cases[f"zero{stage}-offload"] = case(
            stage, {"torch_adam": False, "carry_over": "reset"}, {"offload_optimizer": CPU}
        )
    for kind in ("reentrant", "non_reentrant"):
        for stage in (2, 3):
            cases[f"zero{stage}-checkpointing-{kind}"] = case(stage, checkpointing=kind)
            cases[f"zero{stage}-tied-checkpointing-{kind}"] = case(stage, TOKENS, checkpointing=kind, model=TIED)
    for stage in (2, 3):  # gradients rounded to bf16 on their way, weights and solver in fp32
        cases[f"zero{stage}-reduce_in_bf16"] = case(stage, tolerance=5e-3, communication_data_type="bf16")
    cases["zero2-round_robin"] = case(2, zero={"round_robin_gradients": True})
    cases["zero3-uneven-project"] = case(3, {"carry_over": "project"}, intermediate=85)
    cases["zero3-offload-param"] = case(3, {"torch_adam": False}, {"offload_optimizer": CPU, "offload_param": CPU})
    cases["zero3-init"] = case(3, zero_init=True)
    cases["zero3-init-uneven"] = case(3, intermediate=85, zero_init=True)
    cases["zero3-init-embeddings"] = case(3, TOKENS, zero_init=True, model=ODD_VOCAB)
    cases["zero3-init-tied"] = case(3, TOKENS, zero_init=True, model={**TIED, **ODD_VOCAB})
    cases["zero3-persistent"] = case(3, zero={"stage3_param_persistence_threshold": 100000})
    cases["zero3-subgroups"] = case(3, {"carry_over": "reset"}, zero={"sub_group_size": 700})
    cases["zero3-folded-offload-param"] = case(
        3, {**FOLDED, "torch_adam": False}, {"offload_optimizer": CPU, "offload_param": CPU}
    )
    cases["zero3-folded-init-checkpointing"] = case(3, FOLDED, zero_init=True, checkpointing="reentrant")
    cases["zero3-folded-persistent"] = case(3, FOLDED, zero={"stage3_param_persistence_threshold": 100000})
    cases["zero3-folded-hpz"] = case(3, FOLDED, zero={"zero_hpz_partition_size": 2})
    cases["zero3-choice-uneven"] = case(3, CHOICE, intermediate=85)
    cases["zero3-choice-offload-param"] = case(
        3, {**CHOICE, "torch_adam": False}, {"offload_optimizer": CPU, "offload_param": CPU}
    )
    cases["zero3-choice-hpz"] = case(3, CHOICE, zero={"zero_hpz_partition_size": 2})
    cases["zero3-hpz"] = case(3, zero={"zero_hpz_partition_size": 2})
    return copy.deepcopy({**cases, **moe_cases(False), **quick_cases()})
