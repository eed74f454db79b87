"""The runs of two ranks whose checkpoints are exported."""

from __future__ import annotations

from typing import Any

from support import tiny_moe

STEPS, MICRO = 5, 2  # with interval 3: in the second subspace
TOKENS = {"targets": ["default", "embeddings", "head"]}
EXPERTS = {"targets": tiny_moe.TARGETS}
BF16 = {"bf16": {"enabled": True}}


def case(engine: str, rso: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """``json``: keys of the DeepSpeed JSON; ``precision``: FSDP2's compute dtype."""
    rest = {"stage": 0, "json": {}, "precision": "fp32", "tie": False, "moe": None, **options}
    return {"engine": engine, "rso": rso or {}, **rest}


CASES = {
    "zero0-bf16": case("deepspeed", json=BF16),
    "zero1": case("deepspeed", stage=1),
    "zero1-bf16-masters": case("deepspeed", {"master_weights": "cpu"}, stage=1, json=BF16),
    "zero2-bf16-tied": case("deepspeed", TOKENS, stage=2, json=BF16, tie=True),
    "zero3": case("deepspeed", {"sampler": "coordinate", **TOKENS}, stage=3),
    "zero3-bf16": case("deepspeed", {"share_projection": "shape"}, stage=3, json=BF16),
    "fsdp2": case("fsdp2", TOKENS),
    "fsdp2-tied": case("fsdp2", TOKENS, tie=True),
    "fsdp2-bf16": case("fsdp2", TOKENS, precision="bf16"),
    "ddp": case("ddp"),
    "zero3-gpt_oss": case("deepspeed", EXPERTS, stage=3, moe="gpt_oss"),
    "fsdp2-qwen3_moe": case("fsdp2", EXPERTS, moe="qwen3_moe"),
    "ddp-local": case("ddp", {"communicate": "boundary", "outer_momentum": 0.5}),
}
