"""``rso-ds export --lora``: the current subspace as an adapter over its base."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_llama
from support.saved_runs import CASES, TOKENS, error_of, exported, gpt2, logits, saved
from torch import nn
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.checkpoint.lora import export_lora


def adapted(folder):
    """The base model with B A added by hand, as PEFT merges it: in fp64, to be compared."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "base").double().eval()
    tensors = {n: t.double() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    used = set()
    for name in config["target_modules"]:
        module, prefix = model.get_submodule(name), f"base_model.model.{name}.lora_"
        keys = (f"{prefix}embedding_A", f"{prefix}embedding_B")
        if not isinstance(module, nn.Embedding):
            keys = (f"{prefix}A.weight", f"{prefix}B.weight")
        used |= set(keys)
        a, b = (tensors[key] for key in keys)
        rank = config["rank_pattern"].get(name, config["r"])
        assert a.shape[0] == b.shape[1] == rank == config["alpha_pattern"].get(name, config["lora_alpha"])
        transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        module.weight.data += (b @ a).t() if transposed else b @ a
    assert used == set(tensors)
    return model


@pytest.mark.parametrize("case", ["haar", "coordinate", "ratio", "tokens", "conv1d", "bf16"])
def test_lora_adapter_over_its_base(tmp_path, case):
    options, model = CASES.get(case, {}), tiny_llama.build()
    if case == "conv1d":
        model = gpt2()
    if case == "ratio":
        model = tiny_llama.build(intermediate=20)  # of which the ratio makes smaller ranks
    if case == "bf16":
        model = tiny_llama.build(dtype=torch.bfloat16)
    model, _ = saved(tmp_path / "run", model, **options)
    export_lora(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] == (case == "conv1d")
    assert bool(config["rank_pattern"]) == (case == "ratio")
    base, own = exported(tmp_path / "out" / "base"), dict(model.named_parameters())
    for name, tensor in base.items():  # W as it is, and what trains densely
        turned = case == "conv1d" and name.removesuffix(".weight") in config["target_modules"]
        assert torch.equal(tensor.t() if turned else tensor, own[name]), name
    torch.testing.assert_close(
        logits(adapted(tmp_path / "out")), logits(model.double()), rtol=0, atol=2e-5 if case != "bf16" else 2e-2
    )


@pytest.mark.parametrize("case", ["haar", "tokens", "ratio", "conv1d"])
def test_peft_loads_the_adapter(tmp_path, case):
    peft = pytest.importorskip("peft")
    model = gpt2() if case == "conv1d" else tiny_llama.build(intermediate=20 if case == "ratio" else 86)
    model, _ = saved(tmp_path / "run", model, **CASES.get(case, {}))
    export_lora(tmp_path / "run", tmp_path / "out")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_tied_layers_are_no_adapter(tmp_path):
    saved(tmp_path / "run", tiny_llama.build(tie=True), targets=TOKENS)
    message = error_of(tmp_path / "run", tmp_path / "out", export=export_lora, kind=rso_ds.RSOConfigError)
    assert "--lora: lm_head.weight is tied to model.embed_tokens.weight" in message
