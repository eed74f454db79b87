"""Every key of the configuration: defaults, round trip, and one clear message for each bad value."""

import dataclasses
import json

import pytest

from rso_ds import RSOConfig, RSOConfigError


def test_round_trip_through_json():
    config = RSOConfig(rank=8, targets=["q_proj"], betas=(0.8, 0.95))
    again = RSOConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.rank_ratio is None


def test_default_rank_ratio_is_a_quarter():
    assert RSOConfig().rank_ratio == 0.25


def test_every_key_says_what_it_is():
    assert all(f.metadata.get("help") for f in dataclasses.fields(RSOConfig))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"intervall": 3}, "unknown key 'intervall' of the RSO optimizer. Did you mean 'interval'?"),
        ({"xyzzy": 3}, "Known keys: betas, carry_over"),
        ({"lr": "auto"}, "'lr': \"auto\" was not filled in"),
        ({"lr": -1}, "'lr' must be finite and at least 0"),
        ({"lr": float("nan")}, "'lr' must be finite"),
        ({"lr": "fast"}, "'lr' must be a number"),
        ({"rank": 0}, "'rank' must be an integer of at least 1, got 0"),
        ({"rank": 4.0}, "'rank' must be an integer"),
        ({"rank": True}, "'rank' must be an integer"),
        ({"rank": 4, "rank_ratio": 0.5}, "'rank' and 'rank_ratio' are both set"),
        ({"rank_ratio": 0}, "'rank_ratio' must be above 0"),
        ({"rank_ratio": 1.5}, r"'rank_ratio' must be in \[0, 1\]"),
        ({"interval": 0}, "'interval' must be an integer of at least 1, got 0"),
        (
            {"sampler": "har"},
            "'sampler' must be one of haar, gaussian, coordinate, srht, got 'har'. Did you mean 'haar'?",
        ),
        ({"carry_over": "keep"}, "'carry_over' must be one of reset"),
        ({"solver": "lion"}, "'solver' must be one of adamw, adam, sgd"),
        ({"solver": "sgd"}, "'solver': 'sgd' has none"),
        ({"betas": [0.9]}, "'betas' must be two numbers"),
        ({"betas": [0.9, 1.0]}, r"'betas' must lie in \[0, 1\)"),
        ({"targets": "q_proj"}, "'targets' must be 'default' or 'all-linear', or a non-empty list"),
        ({"targets": []}, "'targets' must be"),
        ({"dense": "some"}, "'dense' must be 'all' or 'none'"),
        ({"merge_rounding": "up"}, "'merge_rounding' must be one of"),
        ({"master_weights": "yes"}, "'master_weights' must be one of"),
        ({"master_weights": "cpu", "merge_rounding": "stochastic"}, "two remedies for one problem"),
        ({"torch_adam": 1}, "'torch_adam' must be true or false"),
        ({"seed": -1}, "'seed' must be an integer of at least 0"),
    ],
)
def test_refusals(params, message):
    with pytest.raises(RSOConfigError, match=message):
        RSOConfig.from_dict(params)
