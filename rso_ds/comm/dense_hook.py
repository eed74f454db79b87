"""Hook for unmodified dense models under DistributedDataParallel: only G P is exchanged, never G.

For each target weight W [out, in] with gradient G, every rank computes z = G P [out, r], the ranks average
z, and z P^T takes the place of G. With E[P P^T] = I it is an unbiased estimate of the mean gradient, and it
lies in the subspace in which RSO would have trained that layer. The saving is in traffic alone: gradients,
optimizer state and activations stay dense.
"""

# No "from __future__ import annotations" here: DDP compares a hook's annotations with the classes themselves.

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rso_ds.comm.counter import install
from rso_ds.comm.ddp_hooks import HookState, forget_overflow_
from rso_ds.config import RSOConfig
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import rso_layers, target_subspaces
from rso_ds.layers.linears import is_conv1d
from rso_ds.subspace import Subspace, lift, project


class DenseSubspace(HookState):
    """State of ``dense_subspace_hook``.

    Of ``config`` it uses what a subspace is: targets, rank or rank_ratio, sampler, seed, share_projection,
    and ``interval``: P is redrawn after so many reductions (one a step, if accumulation uses ``no_sync``).

    ``error_feedback``: each rank adds what its gradients lost to the next step's, in dense buffers.
    z P^T is then scaled by r / in to the orthogonal projection, since feedback of a longer estimate
    diverges; it needs orthonormal P (any sampler but gaussian). Without it the estimate is unbiased and about
    sqrt(in / r) times longer than the gradient: raise clipping thresholds, or use an adaptive optimizer.

        model = DistributedDataParallel(model)
        model.register_comm_hook(DenseSubspace(model, RSOConfig(rank=64)), dense_subspace_hook)

    P comes from generators of its own: the global random state is untouched. Raises ``RSOUnsupportedError``
    as ``HookState`` does, and for a converted model, whose gradients are r x n already.
    """

    def __init__(self, model: nn.Module, config: RSOConfig, error_feedback: bool = False) -> None:
        if error_feedback and config.sampler == "gaussian":
            raise RSOUnsupportedError("error_feedback needs orthonormal columns: use another sampler.")
        self.config = config
        self.error_feedback = error_feedback
        self.errors: dict[str, Tensor] = {}
        self.reductions = 0
        super().__init__(model)
        bare: nn.Module = model.module  # type: ignore[assignment]
        if any(True for _ in rso_layers(bare)):
            raise RSOUnsupportedError(
                "the model is converted: its gradients are r x n already. Use no hook, or compress_hook."
            )
        spaces = target_subspaces(bare, config)
        self.subspaces: dict[str, Subspace] = {f"{name}.weight": space for name, space in spaces.items()}
        self.transposed = {f"{name}.weight" for name in spaces if is_conv1d(bare.get_submodule(name))}


def dense_subspace_hook(state: DenseSubspace, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket over the ranks inside the current subspaces; the result replaces the bucket."""
    ranks = dist.get_world_size(state.group)
    names = [state._parameter_name(p) for p in bucket.parameters()]
    views = bucket.gradients()
    draw = state.reductions // state.config.interval
    parts: list[Tensor] = []
    used: list[Tensor | None] = []
    for name, view in zip(names, views, strict=True):
        P = _projection(state, name, draw, view)
        used.append(P)
        parts.append(view if P is None else _compress(state, name, view, P))
    flat = torch.cat([part.reshape(-1) for part in parts]).div_(ranks)
    state.dense_bytes += sum(view.numel() * view.element_size() for view in views)
    state.sent_bytes += flat.numel() * flat.element_size()
    state.reductions += bucket.is_last()
    sizes = [part.shape for part in parts]
    with install().phase("gradient"):
        sent = dist.all_reduce(flat, group=state.group, async_op=True).get_future()  # type: ignore[union-attr]

    def expand(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        pieces = done.value()[0].split([size.numel() for size in sizes])
        for name, view, piece, size, P in zip(names, views, pieces, sizes, used, strict=True):
            view.copy_(piece.view(size) if P is None else _expand(state, name, piece.view(size), P, view))
        return bucket.buffer()

    return sent.then(expand)


def _projection(state: DenseSubspace, name: str, draw: int, gradient: Tensor) -> Tensor | None:
    space = state.subspaces.get(name)
    if space is None:
        return None
    if space.draw != draw:
        space.move_to(draw)
    return space.projection(gradient.device, gradient.dtype)


def _matrix(state: DenseSubspace, name: str, tensor: Tensor) -> Tensor:
    """[out, in], whichever way the layer stores its weight."""
    return tensor.t() if name in state.transposed else tensor


def _scale(state: DenseSubspace, name: str) -> float:
    space = state.subspaces[name]
    return space.rank / space.in_features if state.error_feedback else 1.0


def _compress(state: DenseSubspace, name: str, view: Tensor, P: Tensor) -> Tensor:
    gradient = _matrix(state, name, view)
    if state.error_feedback:
        gradient = gradient + state.errors.get(name, 0.0)
    z = project(gradient, P)
    if state.error_feedback:
        state.errors[name] = forget_overflow_(gradient - lift(z, P, gradient.shape[1]) * _scale(state, name))
    return z


def _expand(state: DenseSubspace, name: str, z: Tensor, P: Tensor, view: Tensor) -> Tensor:
    restored = lift(z, P, _matrix(state, name, view).shape[1]) * _scale(state, name)
    return _matrix(state, name, restored)
