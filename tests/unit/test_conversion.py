"""Models into RSO form and back: which layers, which groups, what is refused."""

import copy

import pytest
import torch
from reference.rso import Settings, train
from support import tiny_llama
from torch import nn

import rso_ds
from rso_ds import RSOConfig, RSOConversionError
from rso_ds.checkpoint import dense_state_dict, save_dense
from rso_ds.layers import parameter_counts, rso_layers

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
LLAMA = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
BERT = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 20}
BERT_BLOCK = ["query+key+value", "attention.output.dense", "intermediate.dense", "output.dense"]
LLAMA_BLOCK = ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]


def llama(**changes):
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**LLAMA, **changes}))


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def opt():
    config = transformers.OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=32,
        max_position_embeddings=20, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


MODELS = {
    "llama": (llama, LLAMA_BLOCK),
    "mistral": (
        lambda: transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**LLAMA)), LLAMA_BLOCK
    ),
    "qwen2": (lambda: transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**LLAMA)), LLAMA_BLOCK),
    "qwen3": (lambda: transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**LLAMA)), LLAMA_BLOCK),
    "gpt2": (gpt2, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "opt": (opt, ["q_proj+k_proj+v_proj", "out_proj", "fc1", "fc2"]),
    "bert": (lambda: transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(**BERT)), BERT_BLOCK),
    "roberta": (
        lambda: transformers.AutoModelForMaskedLM.from_config(transformers.RobertaConfig(**BERT)), BERT_BLOCK
    ),
}  # fmt: skip


@pytest.fixture
def ids():
    return torch.randint(2, 32, (2, 8), generator=torch.Generator().manual_seed(0))


def fill_B(model, std=0.05):
    torch.manual_seed(1)
    for _, layer in rso_layers(model):
        nn.init.normal_(layer.B, std=std)


@pytest.mark.parametrize("kind", MODELS)
def test_default_targets_groups_and_the_way_back(kind, ids):
    build, block = MODELS[kind]
    torch.manual_seed(0)
    model = build().eval()
    names = {n: p.shape for n, p in model.state_dict().items()}
    plain = model(input_ids=ids).logits
    rso_ds.convert(model, RSOConfig(rank_ratio=0.25))
    groups: dict[str, list[str]] = {}
    for name, layer in rso_layers(model):
        groups.setdefault(layer.subspace.name, []).append(name)
    got = sorted(sorted(_tail(n, block) for n in members) for members in groups.values())
    assert got == sorted(sorted(members.split("+")) for members in block * 2)
    # B is 0: nothing has changed yet
    torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=1e-6, rtol=1e-5)
    fill_B(model)
    moved = model(input_ids=ids).logits
    assert (moved - plain).abs().max() > 1e-3
    exported = dense_state_dict(model)
    assert {n: p.shape for n, p in exported.items()} == names
    rso_ds.to_dense(model)
    assert not list(rso_layers(model))
    torch.testing.assert_close(model(input_ids=ids).logits, moved, atol=1e-5, rtol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, exported[name]), name


def _tail(name, block):
    endings = [e for item in block for e in item.split("+")]
    return max((e for e in endings if name.endswith("." + e)), key=len)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_saved_dense_model_loads_without_rso(kind, ids, tmp_path):
    model = MODELS[kind][0]().eval()
    rso_ds.convert(model, RSOConfig())
    fill_B(model)
    expected = model(input_ids=ids).logits
    save_dense(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not list(rso_layers(loaded))
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_conv1d_trains_like_the_reference(ids):
    torch.manual_seed(0)
    model = gpt2().double()
    names = [f"transformer.h.{i}.{leaf}" for i in (0, 1) for leaf in MODELS["gpt2"][1]]
    settings = Settings(groups={n: [n] for n in names}, rank=4, interval=2, transposed=True, lr=1e-3)

    def loss_of(forward, batch):
        return forward(input_ids=batch, labels=batch, use_cache=False).loss

    expected = train(copy.deepcopy(model), settings, loss_of, [[ids]] * 7)
    config = RSOConfig(rank=4, interval=2, lr=1e-3, eps=1e-6)
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    for _ in range(7):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    got = dense_state_dict(model)
    # transformers computes GPT-2's loss and layer norms in parts in fp32, hence not 1e-12
    for name, weight in expected.weights.items():
        torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=1e-6)


def test_biases_norms_embeddings_and_head_train_densely_by_default():
    model = opt()
    rso_ds.convert(model, RSOConfig())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{n}.weight" for n, _ in rso_layers(model)}


def test_dense_parameters_are_selectable():
    model = llama()
    rso_ds.convert(model, RSOConfig(dense=["input_layernorm", "lm_head"]))
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".B")}
    assert trained == {"input_layernorm", "lm_head"}
    model = llama()
    rso_ds.convert(model, RSOConfig(dense="none"))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"B"}


def test_patterns_globs_and_the_head_as_a_target():
    model = llama()
    conversion = rso_ds.convert(model, RSOConfig(targets=["default", "lm_head"]))
    assert len(conversion.layers) == 15
    assert "lm_head" in conversion.layers
    model = llama()
    conversion = rso_ds.convert(model, RSOConfig(targets=["model.layers.[0].*_proj"]))
    assert len(conversion.layers) == 7
    assert all(".0." in n for n in conversion.layers)
    model = llama()
    assert len(rso_ds.convert(model, RSOConfig(targets="all-linear")).layers) == 14


def test_ranks_follow_the_smaller_side():
    model = llama()
    rso_ds.convert(model, RSOConfig(rank_ratio=0.5))
    ranks = {n.rpartition(".")[2]: layer.subspace.rank for n, layer in rso_layers(model)}
    # k and v are 8 x 16: half of q's smaller side, and no more than their own
    assert ranks == {
        "q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": 8, "gate_proj": 8, "up_proj": 8, "down_proj": 8
    }  # fmt: skip


def test_frozen_layers_stay_as_they_are():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    assert all(n.startswith("model.layers.1.") for n in rso_ds.convert(model, RSOConfig()).layers)


def test_a_module_that_hangs_in_two_places_is_replaced_in_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    rso_ds.convert(model, RSOConfig(rank=2, targets="all-linear"))
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], rso_ds.RSOLinear)


def test_conversion_on_meta_allocates_nothing():
    with torch.device("meta"):
        model = llama()
    rso_ds.convert(model, RSOConfig())
    assert all(p.is_meta for p in model.parameters())
    assert all(layer.subspace.P is None for _, layer in rso_layers(model))


def test_summary_counts():
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    config = RSOConfig(rank=4)
    rso_ds.convert(model, config)
    counts = parameter_counts(model)
    b = 2 * 4 * (16 + 8 + 8 + 16 + 24 + 24 + 16)
    assert counts["B"] == b
    assert counts["dense"] == dense
    assert counts["trainable"] == counts["communicated"] == b + dense - counts["frozen"]
    table = rso_ds.summary_table(model, config)
    assert "14 layers in 8 groups" in table
    assert f"{counts['communicated']:,}" in table


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (llama, {"rank": 9}, r"'rank': 9 exceeds the smaller side of layer '.*k_proj' \(out=8, in=16\)"),
        (llama, {"targets": ["nothing"]}, "no linear layer of LlamaForCausalLM matches 'nothing'"),
        (llama, {"targets": ["q_proj", "w_proj"]}, "matches 'w_proj'"),
        (llama, {"dense": ["nothing"]}, "no parameter outside the RSO layers matches 'nothing'"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "no default for model type None"),
        (
            lambda: llama(tie_word_embeddings=True),
            {"targets": ["default", "lm_head"]},
            "lm_head.weight is tied to model.embed_tokens.weight",
        ),
    ],
)
def test_refusals(build, config, message):
    with pytest.raises(RSOConversionError, match=message):
        rso_ds.convert(build(), RSOConfig(**config))


@pytest.mark.parametrize("bad", [{"rank": 9}, {"dense": ["nothing"]}])
def test_a_refused_model_is_as_it_was(bad):
    model = llama()
    with pytest.raises(RSOConversionError):
        rso_ds.convert(model, RSOConfig(**bad))
    assert not list(rso_layers(model))
    assert all(p.requires_grad for p in model.parameters())


def test_converting_twice_is_refused():
    model = llama()
    rso_ds.convert(model, RSOConfig())
    with pytest.raises(RSOConversionError, match="has RSO layers already"):
        rso_ds.convert(model, RSOConfig())


def test_tied_head_stays_tied_and_dense(ids):
    model = llama(tie_word_embeddings=True)
    rso_ds.convert(model, RSOConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = dense_state_dict(model)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_models_with_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(rso_ds.RSOUnsupportedError, match=r"adapter of peft: merge it first.*merge_and_unload"):
        rso_ds.convert(model, RSOConfig(rank=4))
    merged = model.merge_and_unload().requires_grad_(True)
    assert len(rso_ds.convert(merged, RSOConfig(rank=4)).layers) > 0


def test_quantised_models_are_refused():
    """With a class from a quantiser's package, as bitsandbytes' Linear4bit, and a tensor of one, as torchao's."""
    layer = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = llama()
    model.model.layers[0].mlp.up_proj = layer(32, 64)
    with pytest.raises(rso_ds.RSOUnsupportedError, match=r"layers.0.mlp.up_proj' is quantised \(Linear4bit\)"):
        rso_ds.convert(model, RSOConfig(rank=4))
    tensor = type("QuantisedTensor", (torch.Tensor,), {"__module__": "torchao.quantization"})
    model = llama()
    weight = torch.randn(64, 32).as_subclass(tensor)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight)
    with pytest.raises(rso_ds.RSOUnsupportedError, match=r"is quantised \((Parameter|QuantisedTensor)\)"):
        rso_ds.convert(model, RSOConfig(rank=4))


def test_bitsandbytes_layers_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="comes with galore-torch, the extra 'bench'")
    model = llama()
    model.model.layers[1].mlp.up_proj = bitsandbytes.nn.Linear8bitLt(32, 64, has_fp16_weights=False)
    with pytest.raises(rso_ds.RSOUnsupportedError, match=r"is quantised \(Linear8bitLt\)"):
        rso_ds.convert(model, RSOConfig(rank=4))


def test_hooks_of_the_caller_stay():
    """Feature extractors and loggers hang on layers; their handles go on removing them."""
    model, seen = tiny_llama.build(layers=1), []
    layer = model.model.layers[0].mlp.down_proj
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append("forward")),
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, into, out: seen.append("backward")),
    ]
    rso_ds.convert(model, rso_ds.RSOConfig(rank=4))
    tiny_llama.loss_of(model, tiny_llama.tokens(0, 2)).backward()
    assert seen == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    tiny_llama.loss_of(model, tiny_llama.tokens(0, 2)).backward()
    assert len(seen) == 3
