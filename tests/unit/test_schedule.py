"""The schedules of ``launch/train.py`` against their formulas in float64, step by step, also after a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.environment import ROOT, needs

from rso_ds import RSOConfigError, defaults
from rso_ds.recipes.training.arguments import TrainArguments, parse_arguments
from rso_ds.recipes.training.fill_json import fill, read_json
from rso_ds.recipes.training.metrics import rates_of
from rso_ds.recipes.training.schedule import ScheduledRates, check_rates, follow, shape
from rso_ds.solvers.groups import IS_SUBSPACE

LR, DENSE_LR = 2e-3, 1.6e-2


def oracle(kind: str, total: int, warmup: int, decay: int, final: float, steps: int) -> np.ndarray:
    """Share of the peak at the steps 1 to ``steps``, all at once: a ramp, a plateau, a fall that ends at ``total``."""
    k = np.arange(1, steps + 1, dtype=np.float64)
    ramp = np.minimum(1.0, k / warmup) if warmup else np.ones_like(k)
    if kind == "constant":
        return ramp
    begin = warmup if kind == "cosine" else total - decay
    p = np.clip((k - 1 - begin) / (total - begin), 0.0, 1.0) if total > begin else np.zeros_like(k)
    fall = 0.5 + 0.5 * np.cos(np.pi * p) if kind == "cosine" else 1.0 - p
    return np.where(k <= warmup, ramp, final + (1 - final) * fall)


def optimizer_of(lr: float = LR, dense_lr: float = DENSE_LR) -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate, IS_SUBSPACE: subspace}
        for rate, subspace in ((lr, True), (dense_lr, False))
    ]
    return torch.optim.AdamW(groups)


def train(optimizer: torch.optim.Optimizer, rates: ScheduledRates, steps: int) -> list[dict[str, float]]:
    """Rates that a run logs, each of which is the one that the optimizer's step sees."""
    used: list[list[float]] = []
    hook = optimizer.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    logged = []
    for _ in range(steps):
        logged.append(rates_of(optimizer))
        optimizer.step()
        rates.step()
    hook.remove()
    assert [list(r.values()) for r in logged] == used
    return logged


FORMS = [
    ("cosine", 0.05, None, 0.1),
    ("cosine", 0.25, None, 0.0),
    ("cosine", 0.0, None, 1.0),
    ("wsd", 0.1, 0.2, 0.1),
    ("wsd", 0.0, 1.0, 0.0),
    ("wsd", 0.5, 0.5, 0.3),
    ("wsd", 0.1, 0.0, 0.5),
    ("constant", 0.2, None, None),
    ("constant", 0.0, None, None),
]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 57, 200])
@pytest.mark.parametrize(("kind", "warmup", "decay", "final"), FORMS)
def test_every_step_has_the_rate_of_the_formula(kind, warmup, decay, final, total):
    schedule = shape(kind, warmup, decay, final).of_length(total)
    optimizer = optimizer_of()
    logged = train(optimizer, ScheduledRates(optimizer, schedule), total + 3)
    w = round(warmup * total)
    d = 0 if decay is None else min(round(decay * total), total - w)
    expected = oracle(kind, total, w, d, 1.0 if final is None else final, total + 3)
    np.testing.assert_allclose([r["lr"] for r in logged], LR * expected, rtol=1e-13)
    np.testing.assert_allclose([r["dense_lr"] for r in logged], DENSE_LR * expected, rtol=1e-13)
    assert min(r["lr"] for r in logged[:total]) > 0  # whatever the final rate is
    if w:
        assert logged[0]["lr"] == pytest.approx(LR / w)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("at", "total"), [(3, 40), (20, 40), (35, 40), (40, 60), (20, 30)])
def test_a_run_goes_on_by_the_schedule_that_it_has_then(kind, at, total):
    """Saved at step ``at`` of 40; the groups come back with a rate of then, as a checkpoint's do."""
    form = shape(kind, 0.25, 0.25 if kind == "wsd" else None, None)
    first = optimizer_of()
    rates = ScheduledRates(first, form.of_length(40))
    train(first, rates, at)
    then = optimizer_of()
    again = ScheduledRates(then, form.of_length(total))
    then.load_state_dict(first.state_dict())
    again.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    follow(again, changed=total != 40)
    straight = optimizer_of()
    expected = train(straight, ScheduledRates(straight, form.of_length(total)), total)[at:]
    assert train(then, again, total - at) == expected


def test_deepspeeds_schedules_in_older_checkpoints_are_gone_on_from():
    optimizer = optimizer_of()
    rates = ScheduledRates(optimizer, shape("cosine", 0.0, None, 0.1).of_length(10))
    rates.load_state_dict({"last_batch_iteration": 4})  # five steps were taken
    follow(rates, changed=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR * oracle("cosine", 10, 0, 0, 0.1, 6)[5])


def test_a_resumed_run_keeps_its_schedule_unless_told_otherwise():
    before = {"kind": "wsd", "warmup": 0.3, "decay_share": 0.4, "final_lr": 0.5}
    assert vars(shape(None, None, None, None, before)) == before
    assert vars(shape(None, None, 0.1, 0.0, before)) == {**before, "decay_share": 0.1, "final_lr": 0.0}
    assert vars(shape("constant", None, None, None, before)) == {
        "kind": "constant", "warmup": 0.3, "decay_share": None, "final_lr": None
    }  # fmt: skip


def test_the_default_is_that_of_the_recipe():
    chosen = shape(None, None, None, None)
    assert (chosen.kind, chosen.warmup, chosen.final_lr) == (defaults.SCHEDULE, defaults.WARMUP, defaults.FINAL_LR)
    assert shape("wsd", None, None, None).decay_share == defaults.DECAY_SHARE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decay-share", "0.3"], "--decay-share 0.3 is of --lr-schedule wsd, and this run's is cosine"),
        (["--lr-schedule", "constant", "--final-lr", "0.1"], "--final-lr 0.1 is of --lr-schedule cosine and wsd"),
        (["--lr-schedule", "wsd", "--warmup", "0.6", "--decay-share", "0.6"], "more than all steps"),
        (["--lr-schedule", "wsd", "--decay-share", "1.5"], r"--decay-share must lie in \[0, 1\]"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(RSOConfigError, match=message):
        parse_arguments(flags)


def test_none_in_a_file_means_the_default_and_other_names_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("lr_schedule: null\nwarmup: null\n")
    assert parse_arguments(["--config", str(tmp_path / "a.yaml")]).lr_schedule is None
    for text in ("lr_schedule: linear", "engine: null", "warmup: true"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(RSOConfigError, match="must"):
            parse_arguments(["--config", str(tmp_path / "a.yaml")])


# -- the JSON's own block, and runs without a rate --------------------------------------------------------


def filled(tmp_path, scheduler=None, params=None, steps=20, **flags):
    config = {"optimizer": {"type": "RSO", "params": {"lr": "auto", **(params or {})}}}
    if scheduler is not None:
        config["scheduler"] = scheduler
    (tmp_path / "ds.json").write_text(json.dumps(config))
    args = TrainArguments(deepspeed=str(tmp_path / "ds.json"), **flags)
    return fill(read_json(args), args, 1, steps, on_gpu=False)


def ours(kind="cosine", final=0.1, steps=20):
    return shape(kind, None, None, None if kind == "constant" else final).of_length(steps)


@pytest.mark.parametrize(
    ("params", "schedule", "first", "last", "refused"),
    [
        ({"lr": 0.0, "dense_lr": None}, ours(), 1, 20, True),
        ({"lr": 0.0, "dense_lr": 1e-3}, ours(), 1, 20, False),
        ({"lr": 1e-3}, ours(final=0.0), 1, 20, False),
        ({"lr": 1e-3}, ours(final=0.0, steps=1), 1, 1, False),
        ({"lr": 1e-3}, ours(final=0.0), 21, 30, True),  # --resume-schedule continue, of a run that went to 0
        ({"lr": 1e-3}, ours(), 21, 30, False),
        ({"lr": 1e-3}, ours("constant"), 21, 30, False),
        ({"lr": 0.0}, ours(), 21, 20, False),  # nothing is left to do
    ],
)
def test_a_run_in_which_no_step_has_a_rate_is_refused(tmp_path, params, schedule, first, last, refused):
    config = filled(tmp_path, params=params)
    if refused:
        with pytest.raises(RSOConfigError, match="no step of this run has a learning rate"):
            check_rates(config, schedule, first, last)
    else:
        assert "train nothing" not in check_rates(config, schedule, first, last)


needs("deepspeed")


def test_the_block_of_the_json_is_kept_and_its_empty_steps_are_told(tmp_path):
    block = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}
    config = filled(tmp_path, block, warmup=0.25)
    assert config["scheduler"]["params"] == {"total_num_steps": 20, "warmup_num_steps": 5}
    assert "The first 2 steps have no learning rate" in check_rates(config, None, 1, 20)
    with pytest.raises(RSOConfigError, match="no step of this run has a learning rate.*WarmupCosineLR"):
        check_rates(config, None, 1, 2)
    assert "scheduler" not in filled(tmp_path)


@pytest.mark.parametrize(
    ("params", "rates"),
    [
        ({}, (defaults.RANDOM_SHORT.lr, defaults.RANDOM_SHORT.dense_lr)),
        ({"lr": 1e-3}, (1e-3, None)),
        ({"lr": 1e-3, "dense_lr": 3e-3}, (1e-3, 3e-3)),
    ],
)
@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR"])
def test_warm_ups_of_the_json_keep_the_rate_of_every_group(tmp_path, kind, params, rates):
    """``warmup_max_lr`` "auto" is not one rate for all."""
    from rso_ds.recipes.training.schedule import scheduler_of_json

    block = {"type": kind, "params": {"warmup_max_lr": "auto", "warmup_num_steps": 5, "warmup_type": "linear"}}
    if kind == "WarmupDecayLR":
        block["params"]["total_num_steps"] = 1000000
    config = filled(tmp_path, block, params)
    peaks = [config["optimizer"]["params"].get(key) for key in ("lr", "dense_lr")]
    assert tuple(peaks) == rates
    optimizer = optimizer_of(peaks[0], peaks[1] or peaks[0])
    scheduler = scheduler_of_json(optimizer, config["scheduler"])
    for _ in range(7):
        scheduler.step()
    found = [group["lr"] for group in optimizer.param_groups]
    assert found == pytest.approx([peaks[0], peaks[1] or peaks[0]], rel=1e-4)


def test_a_peak_in_the_block_is_the_optimizers(tmp_path):
    block = {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-4}}
    params = filled(tmp_path, block)["optimizer"]["params"]
    assert (params["lr"], params.get("dense_lr")) == (5e-4, None)


COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 5}}
PEAK = {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-4}}


@pytest.mark.parametrize(
    ("block", "params", "flags", "message"),
    [
        (COSINE, {}, {"lr_schedule": "wsd"}, "--lr-schedule wsd would not come into effect"),
        (COSINE, {}, {"warmup": 0.1}, 'set its "warmup_num_steps" to "auto"'),
        (COSINE, {}, {"final_lr": 0.1}, "--final-lr 0.1 would not come into effect"),
        ({}, {}, {"lr_schedule": "constant"}, "remove the block, or drop the flag"),
        (PEAK, {}, {"learning_rate": 1e-3}, "--learning-rate 0.001 contradicts 'warmup_max_lr'"),
        (PEAK, {"dense_lr": 1e-2}, {}, "'dense_lr' would not come into effect"),
        ({"type": "WarmupLR", "params": 3}, {}, {}, "'params' of the scheduler must be a block"),
    ],
)
def test_flags_and_blocks_that_contradict_each_other(tmp_path, block, params, flags, message):
    with pytest.raises(RSOConfigError, match=message):
        filled(tmp_path, block, params, **flags)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "Warmup"}, "scheduler.type of the DeepSpeed JSON must be one of .*WarmupLR"),
        ({"params": {}}, "scheduler.type of the DeepSpeed JSON must be one of"),
        ({"type": "WarmupLR", "params": {"warmup_steps": 3}}, "do not fit WarmupLR: .*warmup_steps"),
        ({"type": "WarmupCosineLR", "params": {}}, "do not fit WarmupCosineLR: .*total_num_steps"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "do not fit WarmupLR: .*positive"),
    ],
)
def test_blocks_that_cannot_be_made(tmp_path, block, message):
    with pytest.raises(RSOConfigError, match=message):
        check_rates(filled(tmp_path, block), None, 1, 20)


@pytest.mark.parametrize("kind", ["CosineAnnealingLR", "OneCycle"])
def test_other_schedules_of_deepspeed_and_torch_are_made(tmp_path, kind):
    params = {"T_max": 20} if kind == "CosineAnnealingLR" else {"cycle_min_lr": 0.0, "cycle_max_lr": 1e-3}
    assert kind in check_rates(filled(tmp_path, {"type": kind, "params": params}), None, 1, 20)


def test_shipped_jsons_leave_the_schedule_to_the_flags():
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert "scheduler" not in json.loads(path.read_text()), path.name


def test_torchs_schedules_keep_their_own_length():
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer_of(), 2)
    follow(scheduler, changed=False)
    with pytest.raises(RSOConfigError, match="StepLR of the DeepSpeed JSON is torch's"):
        follow(scheduler, changed=True)
