"""What each method of ``convergence.py`` holds: measured on one step of it, in this process."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from convergence_methods import build
from transformers import AutoModelForCausalLM

from rso_ds.models import llama_config
from rso_ds.planning.memory.kept import KeptRecorder


def held(spec: dict[str, Any], batch: int, seq_len: int) -> dict[str, int]:
    """Bytes of all tensors that live between backward and step ("states": weights, gradients, optimizer state, P), and
    of what forward keeps for backward ("kept")."""
    gc.collect()
    before = _alive()
    torch.manual_seed(spec["seed"])
    model = AutoModelForCausalLM.from_config(llama_config(spec["shape"], spec["vocab"], seq_len))
    method = build(spec, model, 100)
    for step in range(2):
        method.set_rates(step, 1e-3)
        ids = torch.randint(spec["vocab"], (batch, seq_len))
        with KeptRecorder(method.model) as recorder:
            loss = method.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        del loss, ids
        gradients = [p.grad for p in method.model.parameters()]
        gc.collect()
        states = _bytes(_alive(), before)
        method.before()
        method.optimizer.step()
        method.optimizer.zero_grad()
        del gradients
    return {"states": states, "kept": recorder.total}


def _alive() -> dict[int, int]:
    """Address of each storage that a Python tensor refers to -> its bytes."""
    with warnings.catch_warnings():  # of deprecated objects that are asked for their type
        warnings.simplefilter("ignore")
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _bytes(now: dict[int, int], before: dict[int, int]) -> int:
    return sum(size for address, size in now.items() if before.get(address) != size)
