"""The default recipe: what RSO and the programs do where nothing else is said. The one place that has these values.

``RSOConfig`` takes its defaults from here, ``launch/train.py`` what it fills in for "auto", ``rso-ds plan`` what it
writes. Documents, examples and ``ds_configs/`` repeat the values, and ``tests/unit/test_recipe.py`` names each place
that does not follow a change. Why these values: ``docs/rank-and-interval.md``, measured in ``benchmarks/convergence``.
"""

from __future__ import annotations

from dataclasses import dataclass

# Alike for every run.
RANK_RATIO = 0.25
SAMPLER = "haar"
CARRY_OVER = "row_mean_second"
TARGETS = "default"
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.0
CLIPPING = 1.0  # of the norm of all gradients
SCHEDULE = "cosine"
WARMUP = 0.05  # share of all steps
DECAY_SHARE = 0.2  # of the schedule "wsd": share of all steps
FINAL_LR = 0.1  # share of the peak at the end of "cosine" and "wsd"
ADAMW_LR = 1e-3  # of AdamW and Adam, to compare with


@dataclass(frozen=True)
class Rates:
    """What depends on how a run begins. ``dense_lr`` None: the rate of B is that of all parameters."""

    lr: float
    dense_lr: float | None
    interval: int


# With a first moment that restarts at 0 the mean step of interval 10 is 0.41 of AdamW's, that of 50 0.82 of it
# (docs/algorithm.md): a long run has five times the interval and half the rate of a short one.
LONG_RUN = 500  # steps
RANDOM_LONG = Rates(lr=2e-3, dense_lr=1.6e-2, interval=50)
RANDOM_SHORT = Rates(lr=4e-3, dense_lr=1.6e-2, interval=10)
# Trained weights bear less. RSOConfig, which does not know how a run begins, has these.
PRETRAINED = Rates(lr=1e-3, dense_lr=None, interval=10)
# Billions of parameters, trained ones or not: rates fall with width; a sampler without QR, masters for bf16.
LARGE = Rates(lr=1e-3, dense_lr=None, interval=50)
LARGE_SAMPLER, LARGE_MASTERS = "coordinate", "cpu"

DENSE_TIMES = 4.0  # dense_lr of random weights where lr alone is given, times lr


def rates(begins_random: bool, steps: int) -> Rates:
    """Of a run of ``steps`` optimizer steps from random or trained weights."""
    if not begins_random:
        return PRETRAINED
    return RANDOM_LONG if steps >= LONG_RUN else RANDOM_SHORT
