"""DeepSpeed ZeRO 0-3 on two real ranks against the float64 reference, option by option.

13 steps, 4 boundaries. "Equal" means: every loss and every final dense weight within the case's
tolerance, 2e-5, of the reference; weights are of size 0.1 and have moved by 1e-2. The largest differences
measured are about 1e-6 in the loss and 5e-6 in a weight: fp32 rounding, amplified by Adam where a second
moment is near zero. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import functools
import json

import pytest
from cases.deepspeed_cases import MICRO, ODD_TARGETS, RANK, STEPS, TOKENS, fp32_cases, quick_cases
from reference.rso import Settings, train
from support import tiny_llama, tiny_moe
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick
from support.observed_norms import as_run, check_observed
from support.ranks import Cases

needs("deepspeed")

CASES, QUICK = fp32_cases(), quick_cases()
for unhurried in (f"zero{stage}-compiled-one_block" for stage in range(3)):  # as zero3, 12 s each
    QUICK.pop(unhurried)
WORLD = 2


@pytest.fixture(scope="module")
def results(pools):
    return Cases(pools, "deepspeed_fp32", WORLD)


def reference(spec, lrs):
    """Of ``spec`` at the rates ``lrs``; most options have one for all stages."""
    told = {k: spec[k] for k in ("rso", "model", "intermediate", "clip", "gas")}
    return computed(json.dumps([told, lrs], sort_keys=True))


@functools.cache
def computed(told):
    spec, lrs = json.loads(told)
    rso = {k: v for k, v in spec["rso"].items() if k not in ("rank", "torch_adam", "targets", "lean")}
    targets, tied = spec["rso"].get("targets"), spec["model"].get("tie", False)
    skip = "model.layers.1.mlp.gate_proj" if targets == ODD_TARGETS else None
    groups = tiny_llama.groups(skip, spec["model"].get("layers", tiny_llama.LAYERS))
    if rso.pop("share_projection", "input") == "shape":
        groups = tiny_llama.groups_by_shape(RANK, spec["intermediate"])
    if targets == TOKENS["targets"]:
        groups |= tiny_llama.token_groups(tied)
    moe = spec["model"].get("moe")
    if moe is not None:
        groups = tiny_moe.groups(dense="gate_up_proj" if targets == tiny_moe.DOWN_ALONE else None)
        rso["transposed"] = tiny_moe.transposed(moe)
    settings = Settings(groups=groups, rank=RANK, clip=spec["clip"], **rso)
    model = tiny_llama.build(spec["intermediate"], **spec["model"]).double()
    vocab = spec["model"].get("vocab", tiny_llama.VOCAB)
    batches = [list(tiny_llama.tokens(i, MICRO * WORLD * spec["gas"], vocab).split(MICRO)) for i in range(STEPS)]
    scale = [lr / settings.lr for lr in lrs]
    result = train(model, settings, tiny_llama.loss_of, batches, scale)
    if tied:
        result.weights["lm_head.weight"] = result.weights["model.embed_tokens.weight"]
    return result


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_equals_reference(results, name):
    spec, got = CASES[name], results[name]
    expected = reference(as_run(spec, got), got["lrs"])
    assert got["applied"] == STEPS
    assert got["draw"] == STEPS // 3 == 4
    for what, claimed in spec["claims"].items():
        assert got[what] == claimed or (claimed is True and got[what] > 0), what
    assert set(expected.weights) == set(got["weights"])
    loss_diff = max(abs(a - b) for a, b in zip(got["losses"], expected.losses, strict=True))
    weight_diff = max((got["weights"][n].double() - w).abs().max().item() for n, w in expected.weights.items())
    print(f"\n{name:32} {got['optimizer']:32} {got['solver']:18} loss {loss_diff:.1e} weight {weight_diff:.1e}")
    assert loss_diff < spec["tolerance"]
    assert weight_diff < spec["tolerance"]


EXACT = [name for name, spec in CASES.items() if spec["tolerance"] <= 2e-5]


@pytest.mark.parametrize("name", quick(EXACT, set(EXACT) & set(QUICK)))
def test_observed_norms_equal_the_reference(results, name):
    spec, got = CASES[name], results[name]
    expected = reference(as_run(spec, got), got["lrs"])
    check_observed(got["observed"], expected, spec["rso"], 1e-3)


@EXHAUSTIVE
def test_the_form_is_chosen(results):
    """Folded in fp32, but where each merge would send something: W to secondary copies or to and from the CPU, B with
    rows cut unlike W's."""
    for stage in (0, 1, 2, 3):
        assert results[f"zero{stage}-choice"]["form"] == "folded"
    for why in ("uneven", "hpz", "offload-param"):
        assert results[f"zero3-choice-{why}"]["form"] == "two_path"


@pytest.mark.parametrize("stage", quick([0, 1, 2], ()))
def test_boundaries_compile_nothing(results, stage):
    """(Stage 3's own hooks are compiled again with every module that they meet.)"""
    graphs = results[f"zero{stage}-compiled-one_block"]["graphs"]
    assert 0 < graphs[2] == graphs[-1]
    assert results[f"zero{stage}"]["graphs"][-1] == 0


@EXHAUSTIVE
def test_cases_are_what_they_claim(results):
    """The table above proves nothing if rows are never split, or another optimizer ran."""
    assert all(results[f"zero{stage}-split_rows"]["cut_rows"] > 0 for stage in (1, 2, 3))
    assert results["zero0-split_rows"]["cut_rows"] == 0
    for stage in (0, 1, 2, 3):
        assert results[f"zero{stage}"]["solver"] == "AdamW"
        assert results[f"zero{stage}-fused"]["solver"] == "FusedAdam"
        assert results[f"zero{stage}-sgd"]["solver"] == "SGD"
    for stage in (1, 2, 3):
        assert results[f"zero{stage}-offload"]["solver"] == "DeepSpeedCPUAdam"
    assert results["zero3"]["optimizer"] == "DeepSpeedZeroOptimizer_Stage3"
    assert results["zero3-embeddings"]["cut_rows"] == 2  # of the embedding and of the head


@EXHAUSTIVE
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_embedding_and_head_train_rank_elements_a_token(results, stage):
    dense = 2 * tiny_llama.VOCAB * tiny_llama.HIDDEN
    rest = results[f"zero{stage}"]["trainable"] - dense
    assert results[f"zero{stage}-embeddings"]["trainable"] == rest + 2 * 63 * RANK
    assert results[f"zero{stage}-tied"]["trainable"] == rest + tiny_llama.VOCAB * RANK
    got = results[f"zero{stage}-tied"]["weights"]
    assert got["lm_head.weight"] is got["model.embed_tokens.weight"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_trainable_elements_are_reduced(results, stage):
    """Gradient bytes per step = 4 bytes x trainable elements: nothing out x in. (No size here needs padding.)"""
    got = results[f"zero{stage}"]
    assert got["gradient_bytes"] == STEPS * 4 * got["trainable"]
