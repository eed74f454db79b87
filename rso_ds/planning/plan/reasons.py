"""Why a plan is as it is, and what would help where nothing fits: lines of text with the figures."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from rso_ds.planning.memory.account import FRAGMENTATION, GIB, RESERVE, Accountant
from rso_ds.planning.memory.states import Engine
from rso_ds.planning.plan.config_json import rso_of
from rso_ds.planning.plan.search import NEAR_TIE, Build, Candidate, NothingFits, Plan, Task, choose
from rso_ds.units import in_unit


def _gigabytes(size: float) -> str:
    return in_unit(size, "GB", ".1f")


def shape_name(candidate: Candidate) -> str:
    return f"stage {candidate.stage}" + (f" with hpZ {candidate.hpz}" if candidate.hpz > 1 else "")


def rank_name(candidate: Candidate, width: int | None) -> str:
    """The rank of a square layer of the model's ``width``, if that is known."""
    rso = rso_of(candidate.config)
    if rso.rank is not None:
        return f"rank {rso.rank}"
    share = f"rank_ratio {rso.rank_ratio:g}"
    return f"{share} (rank {max(1, int((rso.rank_ratio or 0) * width))} of {width})" if width else share


def reasons(plan: Plan, task: Task, width: int | None, rank_given: str | None) -> dict[str, list[str]]:
    """Lines by subject. ``rank_given``: the flag or file that fixed the rank, None if the plan chose it."""
    return {
        "memory": _memory(plan.chosen, task),
        "rank": _rank(plan, task, width, rank_given),
        "stage": _stages(plan, task),
        "checkpointing": [_checkpointing(plan, task)],
        "micro batch": [_micro_batch(plan, task)],
        "time": _time(plan.chosen, task),
    }


def _memory(chosen: Candidate, task: Task) -> list[str]:
    lines = [
        f"{_gigabytes(chosen.needed)} of {_gigabytes(task.memory)} needed: {_gigabytes(chosen.account.total)} counted,"
        f" {FRAGMENTATION:.0%} for fragmentation and {RESERVE / GIB:.0f} GiB for the CUDA context and NCCL (allowances,"
        " not measurements)"
    ]
    peaks = ", ".join(f"{name} {_gigabytes(phase.device)}" for name, phase in chosen.account.phases.items())
    lines.append(f"by phase: {peaks}; the largest is needed")
    host = chosen.account.host_total
    if host:
        lines.append(
            f"{_gigabytes(host * task.gpus_per_node)} of host memory a node at most (the model is built there; masters"
            " of W, what is offloaded)"
        )
    return lines


def _rank(plan: Plan, task: Task, width: int | None, given: str | None) -> list[str]:
    name = rank_name(plan.chosen, width)
    if given:
        return [f"{name}: fixed by {given}"]
    lines = [f"{rank_name(c, width)}: rejected, {_need(c, task)}" for c in plan.too_large]
    if not lines:
        return [f"{name}: the ratio of the paper and of docs/results.md, and it fits"]
    return [*lines, f"{name}: the largest that fits. What the smaller rank does to the loss is your risk"]


def _stages(plan: Plan, task: Task) -> list[str]:
    lines = []
    for shape in dict.fromkeys((c.stage, c.hpz) for c in plan.candidates):
        ours = [c for c in plan.candidates if (c.stage, c.hpz) == shape]
        best = choose(ours, task.memory)
        if shape == (plan.chosen.stage, plan.chosen.hpz):
            lines.append(f"{shape_name(plan.chosen)}: chosen, {plan.chosen.seconds:.2f} s a step")
        elif best is None:
            least = min(ours, key=lambda c: c.needed)
            lines.append(f"{shape_name(least)}: rejected, {_need(least, task)}")
        else:
            lines.append(f"{shape_name(best)}: rejected, {_slower(best, plan.chosen)} ({_how(best)})")
    return lines


def _checkpointing(plan: Plan, task: Task) -> str:
    chosen = plan.chosen
    other = [c for c in _alike(plan) if c.checkpointing != chosen.checkpointing]
    best = choose(other, task.memory)
    state, opposite = ("on", "without it") if chosen.checkpointing else ("off", "with it")
    if best is None:
        return f"{state}: {opposite} {_need(min(other, key=lambda c: c.needed), task)}"
    return f"{state}: {opposite} {_slower(best, chosen)} (micro batch {best.micro_batch})"


def _micro_batch(plan: Plan, task: Task) -> str:
    chosen = plan.chosen
    name = f"{chosen.micro_batch}, accumulated {chosen.accumulation} x"
    if chosen.accumulation == 1:
        return f"{name}: a rank's whole share of {task.global_batch} sequences on {task.gpus} GPUs"
    alike = [c for c in _alike(plan) if c.checkpointing == chosen.checkpointing]
    following = min((c for c in alike if c.micro_batch > chosen.micro_batch), key=lambda c: c.micro_batch)
    return f"{name}: the next divisor of {task.share} {_need(following, task)}"


def _time(chosen: Candidate, task: Task) -> list[str]:
    parts = {
        kind: task.network.seconds([t for t in chosen.transfers if t.kind == kind], chosen.deployment)
        for kind in ("gradient", "weights", "boundary")
    }
    sent = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in parts.items() if seconds)
    lines = [
        f"{chosen.seconds:.2f} s a step, {task.global_batch * task.seq_len / chosen.seconds:,.0f} tokens/s: computing"
        f" {chosen.compute:.2f} s, sending {chosen.communication:.2f} s" + (f" ({sent})" if sent else "")
    ]
    if chosen.compute >= chosen.communication:
        return [*lines, f"computing bounds the step, at {task.tflops:g} TFLOP/s sustained a GPU (--gpu-tflops)"]
    endless = replace(task.network, link=inf, latency=0.0)
    across = chosen.communication - endless.seconds(chosen.transfers, chosen.deployment)
    place = "between nodes" if across > chosen.communication / 2 else "inside a node"
    saved = f": {across:.2f} s of it would go with an endlessly fast --link" if task.network.nodes > 1 else ""
    return [*lines, f"the links {place} bound the step{saved}"]


def nothing_fits(failure: NothingFits, build: Build, task: Task) -> str:
    """One message: the smallest need, and what other settings would need."""
    least = min(failure.least, key=lambda c: c.needed)
    zero = least.config["zero_optimization"]
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    engine = Engine.from_json({**least.config, "zero_optimization": {**zero, **offload, "stage": 3}}, task.gpus)
    found = []
    if least.deployment.engine.offload_param is False:
        found.append(("offload of optimizer and parameters (--base ds_configs/rso_offload.json)", engine, task.seq_len))
    found.append((f"--gpus {2 * task.gpus}", replace(least.deployment.engine, gpus=2 * task.gpus), task.seq_len))
    if task.seq_len > 2:
        found.append((f"--seq-len {task.seq_len // 2}", least.deployment.engine, task.seq_len // 2))
    accountant = Accountant(build, rso_of(least.config), engine, least.checkpointing)
    needs = [
        f"{what} would need {_gigabytes(accountant.under(how).account('rso', least.micro_batch, tokens).needed)}"
        for what, how, tokens in found
    ]
    return (
        f"nothing fits in --gpu-memory {_gigabytes(task.memory)}: the least is {_gigabytes(least.needed)}, with"
        f" {rank_name(least, None)}, {shape_name(least)}, {_how(least)}, sequences of {task.seq_len}. All else equal, "
        + "; ".join(needs)
        + "."
    )


def _alike(plan: Plan) -> list[Candidate]:
    return [c for c in plan.candidates if (c.stage, c.hpz) == (plan.chosen.stage, plan.chosen.hpz)]


def _need(candidate: Candidate, task: Task) -> str:
    return f"would need {_gigabytes(candidate.needed)} of {_gigabytes(task.memory)} ({_how(candidate)})"


def _how(candidate: Candidate) -> str:
    return f"micro batch {candidate.micro_batch}, {'with' if candidate.checkpointing else 'without'} checkpointing"


def _slower(other: Candidate, chosen: Candidate) -> str:
    if other.seconds > chosen.seconds * (1 + NEAR_TIE):
        return f"would take {other.seconds:.2f} s instead of {chosen.seconds:.2f}"
    return f"would take {other.seconds:.2f} s: not more than {NEAR_TIE:.0%} apart, the simpler is preferred"
