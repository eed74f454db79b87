"""Models by name or folder."""

import pytest
from support.environment import needs

from rso_ds import RSOConfigError
from rso_ds.models import LLAMA_SHAPES, llama_config, load_model

needs("transformers")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama-9m", 9), ("llama-20m", 20), ("llama-35m", 35), ("llama-60m", 58), ("llama-130m", 134),
     ("llama-350m", 368), ("llama-1b", 1339), ("llama-7b", 6738)],
)  # fmt: skip
def test_named_shapes_have_the_benchmark_sizes(name, millions):
    import torch
    from transformers import AutoModelForCausalLM

    assert name in LLAMA_SHAPES
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(
    ("name", "message"),
    [("llama-9b", "Did you mean 'llama-9m'"), ("./nowhere", "no such shape, folder or hub name")],
)
def test_unknown_models(name, message):
    with pytest.raises(RSOConfigError, match=message):
        load_model(name, 100, 16)


def test_folder_with_too_few_embeddings(tmp_path):
    llama_config("llama-9m", vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(RSOConfigError, match="has 50 embeddings and the tokenizer 100 tokens"):
        load_model(str(tmp_path), 100, 16)
