"""The DeepSpeed JSON of ``launch/train.py``: overrides, every "auto" filled in, batch sizes, bad values."""

import json

import pytest
from support.environment import ROOT

from rso_ds import RSOConfig, RSOConfigError, defaults
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.fill_json import batch_sizes, fill, read_json

JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.name)
@pytest.mark.parametrize("world_size", range(1, 9))
def test_shipped_jsons_fill_and_validate(path, world_size):
    args = TrainArguments(deepspeed=str(path), clip=0.5)
    config = fill(read_json(args), args, world_size, steps=100, on_gpu=False)
    assert abs(config["train_batch_size"] - 32) <= world_size // 2
    assert config["gradient_clipping"] == 0.5
    assert (
        config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * world_size
        == config["train_batch_size"]
    )
    if config["optimizer"]["type"] == "RSO":
        RSOConfig.from_dict(config["optimizer"]["params"])
    assert '"auto"' not in json.dumps(config)


def test_there_is_a_json_for_every_stage_offload_7b_and_adamw():
    names = {p.stem for p in JSONS}
    assert {"rso", "adamw", "rso_zero0", "rso_zero1", "rso_zero2", "rso_zero3", "rso_offload", "rso_7b_zero3"} <= names


def test_set_overrides_any_key():
    args = TrainArguments(
        deepspeed=str(ROOT / "ds_configs/rso.json"),
        set=["optimizer.params.interval=50", "optimizer.params.sampler=gaussian", "zero_optimization.stage=3"],
        learning_rate=0.5,
    )
    config = read_json(args)
    assert config["optimizer"]["params"]["interval"] == 50
    assert config["optimizer"]["params"]["sampler"] == "gaussian"
    assert config["optimizer"]["params"]["lr"] == 0.5
    assert config["zero_optimization"]["stage"] == 3


def test_precision_flag_overrides_the_json():
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs/rso.json"), precision="bf16")
    assert fill(read_json(args), args, 1, 10, on_gpu=False)["bf16"]["enabled"] is True


def test_rso_is_told_the_tokens_of_a_step():
    flags = {"micro_batch": 4, "global_batch": 24, "seq_len": 128}
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs/rso.json"), **flags)
    params = fill(read_json(args), args, 2, 10, on_gpu=False)["optimizer"]["params"]
    assert params["tokens_per_step"] == 4 * 3 * 128


@pytest.mark.parametrize("kind", ["RSO", "AdamW"])
def test_a_json_without_a_rate_has_the_default(tmp_path, kind):
    path = tmp_path / "ds.json"
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}
    path.write_text(json.dumps({"optimizer": {"type": kind}, "scheduler": scheduler}))
    args = TrainArguments(deepspeed=str(path))
    config = fill(read_json(args), args, 1, 1000, on_gpu=False)
    assert config["optimizer"]["params"]["lr"] == config["scheduler"]["params"]["warmup_max_lr"] == 1e-3
    assert config["optimizer"]["params"].get("interval", 10) == 10


def test_another_optimizer_needs_a_rate(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "Lamb"}}))
    args = TrainArguments(deepspeed=str(path))
    with pytest.raises(RSOConfigError, match="ds.json: give optimizer.params.lr"):
        fill(read_json(args), args, 1, 10, on_gpu=False)


LONG, SHORT, TRAINED = defaults.RANDOM_LONG, defaults.RANDOM_SHORT, defaults.PRETRAINED


@pytest.mark.parametrize(
    ("flags", "lr", "dense_lr"),
    [
        ({}, SHORT.lr, SHORT.dense_lr),
        ({"learning_rate": 1e-3}, 1e-3, 1e-3 * defaults.DENSE_TIMES),
        ({"set": ["optimizer.params.dense_lr=0.5"]}, SHORT.lr, 0.5),
        ({"set": ["optimizer.params.dense_lr=null"]}, SHORT.lr, None),
        ({"model": "gpt2"}, TRAINED.lr, None),  # may have weights, which a high rate would spoil
        ({"model": "gpt2", "init": "random"}, SHORT.lr, SHORT.dense_lr),
        ({"model": "llama-9m", "init": "auto"}, SHORT.lr, SHORT.dense_lr),
    ],
)
def test_rates_where_the_json_leaves_lr_open(flags, lr, dense_lr):
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs/rso.json"), **flags)
    params = fill(read_json(args), args, 2, 10, on_gpu=False)["optimizer"]["params"]
    assert (params["lr"], params.get("dense_lr")) == (lr, dense_lr)


ENOUGH = defaults.LONG_RUN


@pytest.mark.parametrize(
    ("steps", "flags", "expected"),
    [
        (ENOUGH - 1, {}, (SHORT.interval, SHORT.lr, SHORT.dense_lr)),
        (ENOUGH, {}, (LONG.interval, LONG.lr, LONG.dense_lr)),
        (ENOUGH, {"set": ["optimizer.params.interval=20"]}, (20, SHORT.lr, LONG.dense_lr)),
        (100, {"set": [f"optimizer.params.interval={LONG.interval}"]}, (LONG.interval, LONG.lr, SHORT.dense_lr)),
        (ENOUGH, {"set": ["optimizer.params.interval=auto"]}, (LONG.interval, LONG.lr, LONG.dense_lr)),
        (ENOUGH, {"set": ["optimizer.params.dense_lr=1e-2"]}, (LONG.interval, LONG.lr, 1e-2)),
        # One rate for all does not bear the long interval, nor does any rate.
        (ENOUGH, {"set": ["optimizer.params.dense_lr=null"]}, (SHORT.interval, SHORT.lr, None)),
        (ENOUGH, {"learning_rate": 3e-3}, (SHORT.interval, 3e-3, 3e-3 * defaults.DENSE_TIMES)),
        (ENOUGH, {"model": "gpt2"}, (TRAINED.interval, TRAINED.lr, None)),
    ],
)
def test_interval_and_rates_of_a_long_run(steps, flags, expected):
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs/rso.json"), **flags)
    params = fill(read_json(args), args, 2, steps, on_gpu=False)["optimizer"]["params"]
    assert (params["interval"], params["lr"], params.get("dense_lr")) == expected


def test_a_folder_without_weights_begins_with_random_ones(tmp_path):
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs/rso.json"), model=str(tmp_path))
    for file, dense_lr in (("config.json", "auto"), ("model.safetensors", None)):
        (tmp_path / file).touch()
        assert read_json(args)["optimizer"]["params"].get("dense_lr") == dense_lr


def test_a_rate_in_the_json_is_left_alone(tmp_path):
    config = json.loads((ROOT / "ds_configs/rso.json").read_text())
    config["optimizer"]["params"]["lr"] = 1e-3
    (tmp_path / "rso.json").write_text(json.dumps(config))
    args = TrainArguments(deepspeed=str(tmp_path / "rso.json"))
    params = fill(read_json(args), args, 2, 10, on_gpu=False)["optimizer"]["params"]
    assert (params["lr"], params.get("dense_lr")) == (1e-3, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"global_batch": 30, "micro_batch": 4}, "--global-batch 30 is not micro batch 4 x ranks 2 x accumulation 3"),
        ({"set": ["interval"]}, "write it as optimizer.params.interval=50"),
        ({"set": ["gradient_clipping=1", "gradient_clipping.x=1"]}, "is not a block of the JSON"),
        ({"set": ["wall_clock_breakdown=auto"]}, 'no value is known for "auto" at wall_clock_breakdown'),
        ({"deepspeed": "no.json"}, "--deepspeed no.json cannot be read: No such file"),
    ],
)
def test_bad_json_settings(flags, message):
    args = TrainArguments(**{"deepspeed": str(ROOT / "ds_configs/rso.json"), **flags})
    with pytest.raises(RSOConfigError, match=message):
        fill(read_json(args), args, 2, 10, on_gpu=False)


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, {}, (2, 3)),
        ({"gradient_accumulation_steps": 4}, {"global_batch": 32}, (2, 4)),
        ({"train_batch_size": 64}, {"micro_batch": 8}, (8, 2)),
        ({}, {"global_batch": 24, "micro_batch": 3}, (3, 2)),
        ({}, {}, (8, 1)),
    ],
)
def test_batch_sizes_follow_json_and_flags(config, flags, expected):
    assert batch_sizes(config, TrainArguments(**flags), 4) == expected


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({"train_batch_size": 64}, {"global_batch": 32}, "--global-batch 32 contradicts 'train_batch_size': 64"),
        ({"train_micro_batch_size_per_gpu": "2"}, {}, "must be a whole number"),
    ],
)
def test_contradicting_batch_sizes(config, flags, message):
    with pytest.raises(RSOConfigError, match=message):
        batch_sizes(config, TrainArguments(**flags), 4)


@pytest.mark.parametrize(
    "text", ["[]", '{"optimizer": {"type": "RSO"}, "bf16": null}', '{"optimizer": {"type": "RSO", "params": 3}}']
)
def test_json_of_the_wrong_form(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RSOConfigError, match="block"):
        read_json(TrainArguments(deepspeed=str(tmp_path / "a.json")))
