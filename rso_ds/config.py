"""The one configuration of RSO, whatever the engine.

The same keys appear in ``"optimizer": {"type": "RSO", "params": {...}}`` of a DeepSpeed JSON and
as keyword arguments in Python. ``docs/configuration.md`` explains each with its effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rso_ds import defaults
from rso_ds.errors import RSOConfigError

SAMPLERS = ("haar", "gaussian", "coordinate", "srht")
SOLVERS = ("adamw", "adam", "sgd")
CARRY_OVER_RULES = ("reset", "keep_second", "row_mean_second", "project")
SECOND_MOMENT_RULES = ("keep_second", "row_mean_second")
MERGE_ROUNDINGS = ("nearest", "stochastic")
MASTER_WEIGHTS = ("none", "device", "cpu")
COMMUNICATE = ("every_step", "boundary")
FORMS = ("two_path", "folded")
SHARED_PROJECTIONS = ("input", "shape")
LEAN_PIECES = ("shared_input", "norm", "activation", "loss", "liger")
AUTO = "auto"
DEFAULT_RANK_RATIO = defaults.RANK_RATIO


def _key(default: Any, help: str) -> Any:
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RSOConfig:
    """Everything RSO can be told. Unknown or ill-typed values raise ``RSOConfigError``."""

    lr: float = _key(defaults.PRETRAINED.lr, "Learning rate of B. A step of size lr on B moves W by about lr an entry.")
    dense_lr: float | None = _key(
        defaults.PRETRAINED.dense_lr,
        "Learning rate of the densely trained parameters (embeddings, norms, head); null: lr.",
    )
    betas: tuple[float, float] = _key(defaults.BETAS, "Adam's moment decay rates.")
    eps: float = _key(defaults.EPS, "Adam's denominator offset.")
    momentum: float = _key(0.9, "Momentum of the sgd solver; other solvers ignore it.")
    weight_decay: float = _key(
        defaults.WEIGHT_DECAY,
        "Decoupled decay. On W it is applied at the boundary with the product of (1 - lr * weight_decay)"
        " over the interval's steps; on dense parameters as the solver does; never on B.",
    )
    solver: str = _key("adamw", f"Optimizer of the subproblem and of the dense parameters: {SOLVERS}.")
    rank: int | None = _key(None, "Columns r of P, the same for every layer. Exclusive with rank_ratio.")
    rank_ratio: float | None = _key(
        None, f"r as a fraction of a layer's smaller side. Default {DEFAULT_RANK_RATIO} if rank is not given."
    )
    interval: int = _key(defaults.PRETRAINED.interval, "Applied optimizer steps between two subspace boundaries.")
    sampler: str = _key(defaults.SAMPLER, f"Distribution of P: {SAMPLERS}.")
    carry_over: str = _key(
        defaults.CARRY_OVER, f"What becomes of the solver state of B at a boundary: {CARRY_OVER_RULES}."
    )
    form: str | None = _key(
        None,
        f"How a layer computes with B: {FORMS}. 'two_path': x W^T + (x P) B^T. 'folded': B P^T is added to W after"
        " every applied step, so that forward is x W^T; less arithmetic, W is written at every step. null: folded"
        " where that loses nothing and pays.",
    )
    tokens_per_step: int | None = _key(
        None,
        "Tokens that a rank trains on in one optimizer step, for the choice of 'form' alone; null: enough to fold.",
    )
    proximal: float = _key(0.0, "1/eta of the paper's subproblem: the gradient of B gains proximal * B.")
    targets: str | Sequence[str] = _key(
        defaults.TARGETS,
        "Layers to train in a subspace: 'default' (by model type), 'all-linear', or a list of name suffixes"
        " or glob patterns, in which 'default', 'embeddings' (input embedding) and 'head' (output layer) may appear.",
    )
    dense: str | Sequence[str] = _key(
        "all", "Other parameters to train densely: 'all', 'none', or a list of name suffixes or glob patterns."
    )
    share_projection: str = _key(
        "input",
        "Which layers have one P: 'input', those fed the same tensor; 'shape', all of equal input size and rank.",
    )
    lean: str | Sequence[str] = _key(
        "all",
        f"Exact savings of activation memory: 'all' that the model has, 'none', or a list of {LEAN_PIECES}.",
    )
    seed: int = _key(0, "Seed of every P. Ranks and resumed runs must agree on it.")
    merge_rounding: str = _key(
        "nearest", f"How the fp32 merge is rounded to bf16: {MERGE_ROUNDINGS} (fp16: nearest only)."
    )
    master_weights: str = _key(
        "none",
        f"Where to keep fp32 copies of low-precision W, sharded over ranks, for the merge: {MASTER_WEIGHTS}.",
    )
    communicate: str = _key(
        "every_step",
        f"When ranks exchange: {COMMUNICATE}. 'boundary': each solves the subproblem on its own data and the ranks"
        " average B and the dense parameters once an interval (DDP, and HSDP between replicas).",
    )
    outer_momentum: float = _key(
        0.0, "With communicate 'boundary': momentum of the merged update of W from boundary to boundary."
    )
    torch_adam: bool = _key(
        False, "DeepSpeed only: use torch's Adam instead of DeepSpeed's fused kernel (needs no compiler)."
    )

    def __post_init__(self) -> None:
        for key in ("lr", "dense_lr", "eps", "weight_decay", "proximal", "momentum"):
            value = getattr(self, key)
            if key == "dense_lr" and value is None:
                continue
            _number(key, value, minimum=0.0)
        object.__setattr__(self, "betas", _betas(self.betas))
        if self.rank is not None and self.rank_ratio is not None:
            raise RSOConfigError("'rank' and 'rank_ratio' are both set: keep one of them.")
        if self.rank is None and self.rank_ratio is None:
            object.__setattr__(self, "rank_ratio", DEFAULT_RANK_RATIO)
        if self.rank is not None:
            _integer("rank", self.rank, minimum=1)
        if self.rank_ratio is not None:
            _number("rank_ratio", self.rank_ratio, minimum=0.0, maximum=1.0)
            if self.rank_ratio == 0:
                raise RSOConfigError("'rank_ratio' must be above 0, got 0.")
        _integer("interval", self.interval, minimum=1)
        _integer("seed", self.seed, minimum=0)
        if self.tokens_per_step is not None:
            _integer("tokens_per_step", self.tokens_per_step, minimum=1)
        _choice("sampler", self.sampler, SAMPLERS)
        _choice("solver", self.solver, SOLVERS)
        _choice("carry_over", self.carry_over, CARRY_OVER_RULES)
        if self.form is not None:
            _choice("form", self.form, FORMS)
        _choice("merge_rounding", self.merge_rounding, MERGE_ROUNDINGS)
        _choice("master_weights", self.master_weights, MASTER_WEIGHTS)
        if self.master_weights != "none" and self.merge_rounding == "stochastic":
            raise RSOConfigError(
                "'master_weights' and 'merge_rounding': 'stochastic' are two remedies for one problem: keep one."
            )
        _choice("communicate", self.communicate, COMMUNICATE)
        _number("outer_momentum", self.outer_momentum, minimum=0.0, maximum=0.99)
        if self.outer_momentum and self.communicate != "boundary":
            raise RSOConfigError(
                "'outer_momentum' acts on updates averaged once an interval: set 'communicate' to 'boundary', or leave"
                " it at 0."
            )
        if self.outer_momentum and self.master_weights != "none":
            raise RSOConfigError("'outer_momentum' and 'master_weights' are not supported together: keep one of them.")
        for key, unset in (("proximal", 0.0), ("communicate", "every_step")):
            if self.form == "folded" and getattr(self, key) != unset:
                raise RSOConfigError(
                    f"'{key}': {getattr(self, key)!r} needs the B of the whole subspace, and 'form': 'folded' keeps"
                    " that of one step: set 'form' to 'two_path'."
                )
        if not isinstance(self.torch_adam, bool):
            raise RSOConfigError(f"'torch_adam' must be true or false, got {self.torch_adam!r}.")
        if self.solver == "sgd" and self.carry_over in SECOND_MOMENT_RULES:
            raise RSOConfigError(
                f"'carry_over': {self.carry_over!r} keeps a second moment and 'solver': 'sgd' has none:"
                " set 'carry_over' to 'reset' or 'project'."
            )
        _choice("share_projection", self.share_projection, SHARED_PROJECTIONS)
        object.__setattr__(self, "lean", _patterns("lean", self.lean, ("all", "none")))
        for piece in () if isinstance(self.lean, str) else self.lean:
            _choice("lean", piece, LEAN_PIECES)
        object.__setattr__(self, "targets", _patterns("targets", self.targets, ("default", "all-linear")))
        object.__setattr__(self, "dense", _patterns("dense", self.dense, ("all", "none")))

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> RSOConfig:
        """Build from JSON/YAML keys. Raises ``RSOConfigError`` on an unknown key or an unfilled "auto"."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key, value in params.items():
            if key not in known:
                raise RSOConfigError(unknown_key(key, known, "the RSO optimizer"))
            if isinstance(value, str) and value == AUTO:
                raise RSOConfigError(
                    f"'{key}': \"auto\" was not filled in: the program that reads this JSON (Hugging Face"
                    " Trainer, launch/train.py) does that; give a value otherwise."
                )
        return cls(**params)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only, equal for equal configurations."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def unknown_key(key: str, known: Sequence[str], owner: str) -> str:
    """Message for a key that ``owner`` does not have, with the nearest one that it has."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(sorted(known))}."
    return f"unknown key '{key}' of {owner}.{hint}"


def _number(key: str, value: Any, minimum: float, maximum: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RSOConfigError(f"'{key}' must be a number, got {value!r}.")
    if not (math.isfinite(value) and minimum <= value <= maximum):
        span = f"in [{minimum:g}, {maximum:g}]" if maximum < math.inf else f"finite and at least {minimum:g}"
        raise RSOConfigError(f"'{key}' must be {span}, got {value!r}.")


def _integer(key: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise RSOConfigError(f"'{key}' must be an integer of at least {minimum}, got {value!r}.")


def _choice(key: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise RSOConfigError(f"'{key}' must be one of {', '.join(choices)}, got {value!r}.{hint}")


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise RSOConfigError(f"'betas' must be two numbers, got {value!r}.")
    for beta in value:
        _number("betas", beta, minimum=0.0)
        if beta >= 1:
            raise RSOConfigError(f"'betas' must lie in [0, 1), got {value!r}.")
    return (float(value[0]), float(value[1]))


def _patterns(key: str, value: Any, words: Sequence[str]) -> str | tuple[str, ...]:
    if isinstance(value, str) and value in words:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise RSOConfigError(
        f"'{key}' must be {' or '.join(repr(w) for w in words)}, or a non-empty list of names, got {value!r}."
    )
