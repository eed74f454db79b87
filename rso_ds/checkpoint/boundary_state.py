"""The boundary's part of a saved state, which is ``Boundary.state_dict()``: what P and the count of steps depend on.

    applied_steps    optimizer steps that changed the parameters
    draw             index of the current subspaces
    skipped_steps    steps left out for gradients that were not finite
    decay            layer by layer, the decay of W since the last boundary, as a factor
    seed, sampler    of the configuration: with name and draw they give P
    generator        version of the law by which the sampler makes P of them
    interval         of the configuration: applied steps from boundary to boundary
    form             "two_path" or "folded"
    layers           name -> [out, in, rank, name of the group that shares a P]

Plain ints, floats, strings and lists of them.
"""

from __future__ import annotations

from typing import Any

from rso_ds.errors import RSOCheckpointError


def check_boundary_state(state: dict[str, Any], mine: dict[str, Any], source: str, either_form: bool = False) -> None:
    """Raise ``RSOCheckpointError`` if ``state`` is not of this model and configuration, of which ``mine`` is the
    state; ``source`` names where it comes from. ``either_form``: the caller will let the boundary ``adopt`` a state of
    the other form."""
    state = {"form": "two_path", "generator": 1, **state}  # checkpoints from before there was a choice do not name it
    missing = sorted(set(mine) - set(state))
    if missing:
        raise RSOCheckpointError(f"{source}: damaged RSO state, no '{missing[0]}'.")
    if state["layers"] != mine["layers"]:
        theirs, ours = state["layers"], mine["layers"]
        name = next(n for n in [*theirs, *ours] if theirs.get(n) != ours.get(n))
        raise RSOCheckpointError(
            f"{source} is of another model or rank: layer '{name}' is [out, in, rank, group]"
            f" {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here."
        )
    for key, consequence in (
        ("seed", "P would not be the same"),
        ("sampler", "P would not be the same"),
        ("generator", "P would not be the same: use the release of rso_ds that trained it"),
        ("interval", "the boundaries would not be the same"),
        ("form", "its B is part of W in one form and not in the other"),
    ):
        if state[key] != mine[key] and not (either_form and key == "form"):
            raise RSOCheckpointError(
                f"{source} was trained with '{key}': {state[key]!r}, this run has {mine[key]!r}: {consequence}"
                f"{'' if key == 'generator' else '. Restore the key'}."
            )
