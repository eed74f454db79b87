"""DDP on two real ranks, FSDP2 on two and four, HSDP on two times two, against the float64 reference.

13 steps, 4 boundaries, as for DeepSpeed (tests/engines/test_deepspeed_equals_reference.py). ``pytest -s`` prints the
largest differences.
"""

from __future__ import annotations

import functools
import json

import pytest
from cases.torch_cases import (
    MICRO,
    QUICK_FOUR,
    QUICK_ONE_BY_ONE,
    RANK,
    TOKENS,
    four_rank_cases,
    quick_two_rank_cases,
    two_rank_cases,
)
from reference.local_steps import train_apart
from reference.rso import Settings, train
from support import tiny_llama, tiny_moe
from support.environment import needs
from support.exhaustive import quick
from support.observed_norms import as_run, check_observed
from support.ranks import Cases

needs("transformers")

LOW = ("merge_rounding", "master_weights")
LOCAL = ("communicate", "outer_momentum")
CASES = {(2, n): c for n, c in two_rank_cases().items()} | {(4, n): c for n, c in four_rank_cases().items()}
QUICK = {(2, n) for n in quick_two_rank_cases()} | {(2, n) for n in QUICK_ONE_BY_ONE} | {(4, n) for n in QUICK_FOUR}


@pytest.fixture(scope="module")
def results(pools):
    """By number of ranks, then by name."""
    return {world: Cases(pools, "torch_engines", world) for world in (2, 4)}


def settings_of(spec):
    rso = {k: v for k, v in spec["rso"].items() if k not in ("rank", "lean", "targets", *LOW, *LOCAL)}
    groups = tiny_llama.groups()
    if spec["rso"].get("targets") == TOKENS["targets"]:
        groups |= tiny_llama.token_groups(spec["model"].get("tie", False))
    if rso.pop("share_projection", "input") == "shape":
        groups = tiny_llama.groups_by_shape(RANK, spec["intermediate"])
    if (moe := spec["model"].get("moe")) is not None:
        groups, rso["transposed"] = tiny_moe.groups(), tiny_moe.transposed(moe)
    return Settings(groups=groups, rank=spec["rso"]["rank"], clip=spec["clip"], **rso)


def reference(spec, world):
    """Of ``spec`` on ``world`` ranks; most options have one for all engines."""
    told = ("rso", "model", "intermediate", "clip", "gas", "steps", "poisoned")
    return computed(json.dumps({k: spec[k] for k in told}, sort_keys=True), world)


@functools.cache
def computed(told, world):
    spec = json.loads(told)
    model = tiny_llama.build(spec["intermediate"], **spec["model"]).double()
    vocab = spec["model"].get("vocab", tiny_llama.VOCAB)
    steps = [i for i in range(spec["steps"]) if i not in spec["poisoned"]]
    all_ids = [tiny_llama.tokens(i, MICRO * world * spec["gas"], vocab) for i in steps]
    if spec["rso"].get("communicate") == "boundary":
        replicas = 2  # of one rank each under DDP, of two ranks each under HSDP
        batches = [[list(part.split(MICRO)) for part in ids.chunk(replicas)] for ids in all_ids]
        momentum = spec["rso"].get("outer_momentum", 0.0)
        return train_apart(model, settings_of(spec), tiny_llama.loss_of, batches, momentum)
    result = train(model, settings_of(spec), tiny_llama.loss_of, [list(ids.split(MICRO)) for ids in all_ids])
    if spec["model"].get("tie"):
        result.weights["lm_head.weight"] = result.weights["model.embed_tokens.weight"]
    return result


@pytest.mark.parametrize(("world", "name"), quick(CASES, QUICK))
def test_equals_reference(results, world, name):
    spec, got = CASES[world, name], results[world][name]
    expected = reference(as_run(spec, got), world)
    kept = [loss for i, loss in enumerate(got["losses"]) if i not in spec["poisoned"]]
    assert got["applied"] == len(kept)
    assert got["draw"] == len(kept) // 3 == 4
    assert set(expected.weights) == set(got["weights"])
    loss_diff = max(abs(a - b) for a, b in zip(kept, expected.losses, strict=True))
    weight_diff = max((got["weights"][n].double() - w).abs().max().item() for n, w in expected.weights.items())
    print(f"\n{world} ranks {name:28} loss {loss_diff:.1e} weight {weight_diff:.1e}")
    assert loss_diff < spec["tolerance"]
    assert weight_diff < spec["weight_tolerance"]


OBSERVED = [k for k, s in CASES.items() if s["tolerance"] <= 2e-5 and not s["poisoned"] and LOCAL[0] not in s["rso"]]


@pytest.mark.parametrize(("world", "name"), quick(OBSERVED, set(OBSERVED) & QUICK))
def test_observed_norms_equal_the_reference(results, world, name):
    spec, got = CASES[world, name], results[world][name]
    check_observed(got["observed"], reference(as_run(spec, got), world), spec["rso"], 1e-3)


BF16_WEIGHTS = [k for k, s in CASES.items() if s["precision"] == "bf16_weights"]


@pytest.mark.parametrize(("world", "name"), quick(BF16_WEIGHTS, set(BF16_WEIGHTS) & QUICK))
def test_merges_into_bf16_weights_go_the_way_of_the_reference(results, world, name):
    """A merge that is lost, or rounded away, leaves a distance of the size of the way itself."""
    spec, got = CASES[world, name], results[world][name]
    start = tiny_llama.build(spec["intermediate"]).double().state_dict()
    expected = reference(as_run(spec, got), world).weights
    for layer in (layer for members in tiny_llama.groups().values() for layer in members):
        way = expected[f"{layer}.weight"] - start[f"{layer}.weight"]
        off = got["weights"][f"{layer}.weight"].double() - expected[f"{layer}.weight"]
        assert off.norm() < 0.3 * way.norm(), (layer, (off.norm() / way.norm()).item())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_boundaries_compile_nothing(results, engine):
    graphs = results[2][f"{engine}-compiled"]["graphs"]
    assert 0 < graphs[2] == graphs[-1]
    assert results[2][engine]["graphs"][-1] == 0


@pytest.mark.parametrize(("world", "name"), [(2, "ddp-choice"), (2, "fsdp2-choice"), (4, "hsdp-choice")])
def test_fp32_weights_that_need_no_exchange_are_folded(results, world, name):
    assert results[world][name]["form"] == "folded"


@pytest.mark.parametrize(("world", "plain", "local"), [(2, "ddp", "ddp-local"), (4, "hsdp", "hsdp-local")])
def test_local_steps_are_other_steps(results, world, plain, local):
    """The cases above would prove nothing if ranks still exchanged at every step."""
    first, second = results[world][plain], results[world][local]
    assert max(abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=False)) > 1e-4
    if plain == "ddp":
        assert second["bytes"]["gradient"] == 0
    assert second["bytes"]["boundary"] > 4 * 4 * second["trainable"] / (1 if plain == "ddp" else 2)
