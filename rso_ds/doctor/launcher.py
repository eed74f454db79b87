"""Who started this process, and what is known about its ways."""

from __future__ import annotations

from rso_ds.comm.launch import Launch
from rso_ds.comm.rank_context import restart_advice
from rso_ds.doctor.network import spans_nodes
from rso_ds.doctor.report import NOT_CHECKED, OK, WARNING, Finding


def check_launcher(launch: Launch) -> list[Finding]:
    """The launcher found, and what its restarts or its other nodes lack."""
    if launch.world_size == 1:
        return [
            Finding("launcher", OK, "none: one rank" if launch.launcher == "none" else f"{launch.launcher}: one rank")
        ]
    per_node = f", {launch.local_world_size} on this node" if launch.local_world_size else ""
    findings = [Finding("launcher", OK, f"{launch.launcher}: {launch.world_size} ranks{per_node}")]
    advice = restart_advice("auto")  # whether the job resumes is not known here
    if advice:
        findings.append(Finding("restarts", WARNING, advice, "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"))
    if launch.launcher == "deepspeed" and spans_nodes(launch):
        text = (
            "the deepspeed launcher passes NCCL_*, UCX*, MV2*, PYTHON* on to other nodes; GLOO_*, OMP_* and others not"
        )
        findings.append(Finding("environment", NOT_CHECKED, text, "write KEY=VALUE lines into ~/.deepspeed_env"))
    return findings
