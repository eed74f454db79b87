"""Losses of transformers' ForXxxLoss family, and their gradients, are the stock model's: whole, and accumulated."""

import copy

import pytest
import torch
from support.exhaustive import quick

import rso_ds
from rso_ds.layers import rso_layers

transformers = pytest.importorskip("transformers")

VOCAB, ROWS, SEQ, LABELS = 32, 4, 6, 3
LLAMA = {"num_key_value_heads": 1}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip


def labels(kind, g):
    counts = torch.randint(0, VOCAB, (ROWS, SEQ), generator=g)
    counts[0, :2] = -100
    counts[1, 1] = -1
    per_row = torch.randint(0, LABELS, (ROWS,), generator=g)
    per_token = torch.randint(0, LABELS, (ROWS, SEQ), generator=g)
    per_token[2, 3:] = -100
    return {
        "tokens": {"labels": counts.clamp_min(-100).masked_fill(counts == -1, 5)},
        "tokens, other mark": {"labels": counts.masked_fill(counts == -100, -1)},
        "per token": {"labels": per_token},
        "one of several": {"labels": per_row},
        "several": {"labels": torch.rand(ROWS, LABELS, generator=g).round()},
        "numbers": {"labels": torch.randn(ROWS, generator=g, dtype=torch.float64)},
        "span": {"start_positions": per_row, "end_positions": per_row + 1},
        "two": {"labels": per_row % 2},
    }[kind]


# head: (class, labels, keys of its configuration)
HEADS = {
    "causal": ("LlamaForCausalLM", "tokens", LLAMA),
    "causal gpt2": ("GPT2LMHeadModel", "tokens", {}),
    "classification": ("LlamaForSequenceClassification", "one of several", {**LLAMA, "num_labels": LABELS}),
    "classification bert": ("BertForSequenceClassification", "one of several", {"num_labels": LABELS}),
    "regression": ("BertForSequenceClassification", "numbers", {"num_labels": 1}),
    "several labels": (
        "BertForSequenceClassification", "several",
        {"num_labels": LABELS, "problem_type": "multi_label_classification"},
    ),
    "tokens": ("LlamaForTokenClassification", "per token", {**LLAMA, "num_labels": LABELS}),
    "tokens bert": ("BertForTokenClassification", "per token", {"num_labels": LABELS}),
    "span": ("LlamaForQuestionAnswering", "span", LLAMA),
    "span bert": ("BertForQuestionAnswering", "span", {}),
    "masked": ("BertForMaskedLM", "tokens", {}),
    "next sentence": ("BertForNextSentencePrediction", "two", {}),
}  # fmt: skip
# What a program may hand to the loss, for the heads whose stock forward takes it.
OPTIONS = {
    "nothing": (HEADS, {}),
    "num_items_in_batch": (("causal", "causal gpt2", "tokens", "span"), {"num_items_in_batch": 7}),
    "num_items_in_batch, a tensor": (("causal", "causal gpt2"), {"num_items_in_batch": torch.tensor(7)}),
    "ignore_index": (("causal", "causal gpt2"), {"ignore_index": -1}),
    "both": (("causal",), {"ignore_index": -1, "num_items_in_batch": 9}),
    "no dict": (("causal", "classification", "masked"), {"return_dict": False}),
    "all logits": (("causal",), {"logits_to_keep": 0}),
}
CASES = [(head, option) for option, (heads, _) in OPTIONS.items() for head in heads]


def build(head):
    name, _, keys = HEADS[head]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    sizes = {**SIZES, **keys}
    if name.startswith("GPT2"):
        sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
                 "embd_pdrop": 0.0}  # fmt: skip
    if name.startswith("Bert"):
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(kind.config_class(**sizes)).double().train()


def gradients(model, batch, option, parts):
    """(sum of the losses of ``parts`` equal shares of the batch, gradients by name)."""
    model.zero_grad()
    total = 0.0
    for k in range(parts):
        part = {n: v[k * ROWS // parts : (k + 1) * ROWS // parts] for n, v in batch.items()}
        torch.manual_seed(k)  # of dropout before some heads
        out = model(**part, **option)
        loss = out[0] if isinstance(out, tuple) else out.loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulation", quick([1, 4], {4}))
@pytest.mark.parametrize(("head", "option"), CASES)
def test_loss_and_gradients_are_the_stock_models(head, option, accumulation):
    g = torch.Generator().manual_seed(1)
    kind = "tokens, other mark" if "ignore_index" in OPTIONS[option][1] else HEADS[head][1]
    batch = {"input_ids": torch.randint(1, VOCAB, (ROWS, SEQ), generator=g), **labels(kind, g)}
    stock = build(head)
    model = copy.deepcopy(stock)
    rso_ds.convert(model, rso_ds.RSOConfig(rank=3, form="two_path"))
    layers = dict(rso_layers(model))
    expected, wanted = gradients(stock, batch, OPTIONS[option][1], accumulation)
    loss, got = gradients(model, batch, OPTIONS[option][1], accumulation)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, layer in layers.items():
        full = wanted[f"{name}.weight"]
        full = full.t() if layer.kind == "conv1d" else full
        torch.testing.assert_close(got.pop(f"{name}.B"), full @ layer.projection(), rtol=1e-5, atol=1e-7)
        del wanted[f"{name}.weight"]
    assert set(got) == set(wanted)
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
