"""Hook for converted models under DistributedDataParallel: the buckets (B and what trains densely) in fewer bits."""

# No "from __future__ import annotations" here: DDP compares a hook's annotations with the classes themselves.

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rso_ds.comm.counter import install
from rso_ds.comm.ddp_hooks import HookState, finished, forget_overflow_
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import rso_layers

DTYPES = ("bf16", "int8")
_BLOCK = 256  # elements that share one fp32 scale in int8


class BucketCompression(HookState):
    """State of ``compress_hook``; ``dtype``: "bf16" or "int8".

    int8 costs a quarter of fp32 (and 4 bytes of scale per 256 elements) at any number of ranks: pieces are
    exchanged, averaged and gathered, rounded twice. What rounding lost is added to the next step's gradient
    (error feedback; Seide et al. 2014, Karimireddy et al. arXiv 1901.09847), so each rank keeps two fp32
    buffers, of the size of what trains and of that divided by the ranks. What an overflow leaves there is
    dropped; a loss scale that changes makes the kept error too large or small for one step.

        model = DistributedDataParallel(converted_model)
        model.register_comm_hook(BucketCompression(model, "bf16"), compress_hook)
        optimizer = rso_ds.RSO(model, config)

    Raises ``RSOUnsupportedError`` as ``HookState`` does, and for a model without RSO layers.
    """

    def __init__(self, model: nn.Module, dtype: str = "bf16") -> None:
        if dtype not in DTYPES:
            raise RSOUnsupportedError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.dtype = dtype
        # Parameter names of a bucket -> what its last step lost: this rank's own rounding, and that of the piece
        # it averaged. A rebuilt bucket starts from zero.
        self.errors: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        super().__init__(model)
        if not any(True for _ in rso_layers(model)):
            raise RSOUnsupportedError(
                "compress_hook is for models converted by rso_ds.convert, and this one has no RSO layer: convert it, or"
                " use DenseSubspace with dense_subspace_hook."
            )


def compress_hook(state: BucketCompression, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket over the ranks in ``state.dtype``."""
    buffer = bucket.buffer()
    state.dense_bytes += buffer.numel() * buffer.element_size()
    with install().phase("gradient"):
        return _in_bf16(state, buffer) if state.dtype == "bf16" else _in_int8(state, bucket)


def _in_bf16(state: BucketCompression, buffer: Tensor) -> torch.futures.Future[Tensor]:
    ranks = dist.get_world_size(state.group)
    low = (buffer / ranks).to(torch.bfloat16)
    state.sent_bytes += low.numel() * low.element_size()
    sent = dist.all_reduce(low, group=state.group, async_op=True).get_future()  # type: ignore[union-attr]
    return sent.then(lambda done: buffer.copy_(done.value()[0]))


def _in_int8(state: BucketCompression, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    ranks, buffer = dist.get_world_size(state.group), bucket.buffer()
    per_rank = -(-buffer.numel() // (ranks * _BLOCK)) * _BLOCK
    key = tuple(state._parameter_name(p) for p in bucket.parameters())
    if key not in state.errors:
        state.errors = {k: e for k, e in state.errors.items() if not set(k) & set(key)}
        zeros = torch.zeros(ranks + 1, per_rank, dtype=torch.float32, device=buffer.device)
        state.errors[key] = (zeros[:ranks], zeros[ranks])
    own_error, piece_error = state.errors[key]

    values = own_error  # in place: the error's memory becomes the corrected gradient
    values.view(-1)[: buffer.numel()].add_(buffer)
    codes, scales = _quantize(values)
    forget_overflow_(values.sub_(_restore(codes, scales)))
    theirs, their_scales = torch.empty_like(codes), torch.empty_like(scales)
    dist.all_to_all_single(theirs, codes, group=state.group)
    dist.all_to_all_single(their_scales, scales, group=state.group)

    piece = _restore(theirs, their_scales).mean(0).add_(piece_error)
    codes, scales = _quantize(piece.unsqueeze(0))
    forget_overflow_(piece_error.copy_(piece - _restore(codes, scales)[0]))
    all_codes, all_scales = codes.new_empty(ranks, *codes.shape[1:]), scales.new_empty(ranks, *scales.shape[1:])
    dist.all_gather_into_tensor(all_codes, codes, group=state.group)
    dist.all_gather_into_tensor(all_scales, scales, group=state.group)
    state.sent_bytes += sum(t.numel() * t.element_size() for t in (theirs, their_scales, codes, scales))
    return finished(buffer.copy_(_restore(all_codes, all_scales).view(-1)[: buffer.numel()]))


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n] -> int8 codes [rows, n / block, block] and fp32 scales [rows, n / block, 1]."""
    blocks = values.view(values.shape[0], -1, _BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True).div_(127).clamp_min_(torch.finfo(values.dtype).tiny)
    return (blocks / scales).round_().to(torch.int8), scales


def _restore(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.to(scales.dtype) * scales).view(codes.shape[0], -1)
