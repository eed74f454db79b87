"""The losses of an evaluation are those of the whole logits, which are never there."""

import pytest
import torch
from torch.nn import functional as F
from unit.test_exact_savings import CAUSAL

import rso_ds
from rso_ds.planning.memory.live import LiveBytes
from rso_ds.saved import loss
from rso_ds.saved.evaluation import losses_instead_of_logits

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
# Something follows the head (softcapping, scaling), or the class is unknown to us.
OTHERS = {
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
}


def other(kind):
    name, special = OTHERS[kind]
    config = getattr(transformers, f"{name}Config")(**SMALL, **special)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def both(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        whole = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
        with losses_instead_of_logits(model):
            chunked = model(input_ids=ids, use_cache=False)
        again = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(again, logits)  # the model is as it was
    return whole, chunked


@pytest.mark.parametrize("kind", [*CAUSAL, *OTHERS])
def test_losses_are_those_of_the_logits(kind, monkeypatch):
    monkeypatch.setattr(loss, "MIN_CHUNK", 9)  # several chunks, which cut sequences
    torch.manual_seed(0)
    model = (CAUSAL[kind]() if kind in CAUSAL else other(kind)).eval()
    ids = torch.randint(model.config.vocab_size, (3, 14))
    for converted in (False, kind in CAUSAL):
        if converted:
            rso_ds.convert(model, rso_ds.RSOConfig(rank=4))
            with torch.no_grad():
                for name, param in model.named_parameters():
                    if name.endswith(".B"):
                        param.normal_(std=0.1)
        whole, chunked = both(model, ids)
        assert torch.allclose(chunked, whole, rtol=1e-6), converted


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_logits_of_all_tokens_are_never_there(kind):
    config = {**SMALL, "vocab_size": 20_000}
    name, special = {"llama": ("Llama", {}), **OTHERS}[kind]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config, **special))
    model.eval()
    ids = torch.randint(20_000, (2, 1024))
    with torch.no_grad(), LiveBytes() as live, losses_instead_of_logits(model):
        model(input_ids=ids, use_cache=False)
    # Those of a chunk in fp32, with what softcapping and log-softmax make of them.
    assert live.peak < 6 * loss.MIN_CHUNK * 20_000 * 4 < 2 * 1024 * 20_000 * 4


def test_a_lean_model_takes_a_tensor_of_positions():
    model = CAUSAL["llama"]()
    rso_ds.convert(model, rso_ds.RSOConfig(rank=4))
    ids = torch.randint(model.config.vocab_size, (1, 12))
    model.eval()
    some = model(input_ids=ids, logits_to_keep=torch.tensor([3, 5])).logits
    assert torch.allclose(some, model(input_ids=ids).logits[:, [3, 5]], atol=1e-6)
