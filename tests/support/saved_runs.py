"""Runs of one process, their checkpoints, and what was made of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.checkpoint.export import export_dense
from rso_ds.checkpoint.reading import open_model

STEPS = 5  # with interval 3: one boundary, then two steps into the second subspace
TOKENS = ["default", "embeddings", "head"]


def gpt2():
    torch.manual_seed(0)
    shape = {"vocab_size": tiny_llama.VOCAB, "n_positions": tiny_llama.SEQ, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def trained(model, steps=STEPS, **options):
    config = rso_ds.RSOConfig(**{"lr": 1e-2, "rank": 5, "interval": 3, "form": "two_path", **options})
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    for step in range(steps):
        optimizer.zero_grad()
        tiny_llama.loss_of(model, tiny_llama.tokens(step, 4)).backward()
        optimizer.step()
    return model, optimizer


def saved(folder, model, steps=STEPS, **options):
    """(trained model, checkpoint folder)."""
    model, optimizer = trained(model, steps, **options)
    optimizer.checkpointer().save(folder, f"step{steps}")
    return model.eval(), folder / f"step{steps}"


def exported(folder):
    """All tensors in the weights files of a model folder."""
    return {n: t for file in sorted(folder.glob("model*.safetensors")) for n, t in load_file(file).items()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_llama.tokens(7, 4)).logits


def check_equal(model, folder):
    """Weights as ``dense_state_dict`` has them, bit for bit; returns the loaded model."""
    expected, found = dense_state_dict(model), exported(folder)
    tied = {name for name, (_, declared) in open_model(folder.parent / "run").tied.items() if declared}
    assert set(found) == {name for name in expected if name not in tied}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded).__name__ == type(model).__name__
    state = loaded.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    return loaded


CASES = {
    "haar": {},
    "gaussian": {"sampler": "gaussian"},
    "coordinate": {"sampler": "coordinate"},
    "by_shape": {"share_projection": "shape"},
    "ratio": {"rank": None, "rank_ratio": 0.25},
    "few_targets": {"targets": ["q_proj", "down_proj"]},
    "tokens": {"targets": TOKENS},
    "sgd": {"solver": "sgd", "carry_over": "reset"},
    "at_the_boundary": {"steps": 3},
    "before_the_first_step": {"steps": 0},
    "in_the_first_subspace": {"steps": 2},
}


def error_of(*args, kind=rso_ds.RSOError, export=export_dense, **options):
    with pytest.raises(kind) as caught:
        export(*args, **options)
    return str(caught.value)
