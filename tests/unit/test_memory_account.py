"""The account: bytes kept pinned to the closed form, on fake tensors and for real; states against live engines."""

import json

import pytest
import torch
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE, quick
from support.traces import remembered_traces

import rso_ds
from rso_ds.cli import main
from rso_ds.planning.memory.account import CARDS, GIB, Accountant, model_builder
from rso_ds.planning.memory.kept import KeptRecorder
from rso_ds.planning.memory.live import LiveBytes
from rso_ds.planning.memory.states import Engine
from rso_ds.planning.memory.trace import split, trace_training

transformers = pytest.importorskip("transformers")
from rso_ds.models import LLAMA_SHAPES, llama_config  # noqa: E402

H, INTERMEDIATE, HEADS, VOCAB, RANK = 64, 172, 4, 512, 16
F, P = INTERMEDIATE / H, RANK / H
BATCH, SEQ = 2, 128


def small_config(layers=3, kv_heads=HEADS):
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=H, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip


def builder(dtype, lean, config=None, rank=RANK, **rso):
    def build():
        model = transformers.AutoModelForCausalLM.from_config(config or small_config(), dtype=dtype)
        if lean is not None:
            rso_ds.convert(model, rso_ds.RSOConfig(rank=rank, lean=lean, **rso))
        return model

    return build


def real_trace(build, batch=BATCH, seq=SEQ):
    torch.manual_seed(0)
    model = build().train()
    ids = torch.randint(0, 500, (batch, seq))
    with KeptRecorder(model) as recorder:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    recorder.name_ops(loss)
    return split(model, recorder.entries, batch * seq)


def closed_form(dtype, lean):
    """Units of batch x seq x hidden x itemsize that a LLaMA block keeps."""
    e = dtype.itemsize
    rstd = 4 / (H * e)  # one fp32 number a row and norm
    attention = 3 + 1 + HEADS * 4 / (H * e)  # q, k, v, output, logsumexp in fp32
    if lean == "all":
        return 2 * (1 + rstd) + attention + 2 * F + 4 * P
    stock_norm = (4 / e) + 1 + rstd  # the input in fp32, the normalised row
    if lean is None:
        return 2 * (stock_norm + 1) + attention + 4 * F
    return 2 * stock_norm + attention + 3 * F + (4 if lean == ["shared_input"] else 7) * P


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lean", [None, "none", ["shared_input"], "all"], ids=["stock", "naive", "shared", "lean"])
def test_bytes_per_block_are_the_closed_form(dtype, lean):
    """Three sources of one figure: formula, fake tensors, a real pass on the CPU."""
    unit = BATCH * SEQ * H * dtype.itemsize
    fake = trace_training(builder(dtype, lean), BATCH, SEQ)
    real = real_trace(builder(dtype, lean))
    assert fake.kept == real.kept
    assert fake.per_block == real.per_block
    assert fake.per_block / unit == pytest.approx(closed_form(dtype, lean), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_block_is_its_closed_form(dtype):
    """torch's LayerNorm keeps its input, mean and 1/std; gelu_new its input; c_attn's output holds q, k and v."""
    config = transformers.GPT2Config(
        n_embd=H, n_layer=3, n_head=HEADS, vocab_size=VOCAB, n_positions=SEQ, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    trace = trace_training(builder(dtype, "all", config), BATCH, SEQ)
    e = dtype.itemsize
    statistics = 2 * 2 * next(k.dtype.itemsize for k in trace.inside if k.op == "NativeLayerNorm" and k.shape[-1] == 1)
    expected = 2 + 3 + 1 + HEADS * 4 / (H * e) + 4 + 4 * P + statistics / (H * e)
    assert trace.per_block / (BATCH * SEQ * H * e) == pytest.approx(expected, abs=1e-9)
    assert trace.kept == real_trace(builder(dtype, "all", config)).kept


@EXHAUSTIVE
def test_the_target_of_the_lean_block():
    """At most 6.5 + 2f + 3p units for the LLaMA-7B block in bf16 with rank 256, and 6.5 GiB with the loss."""
    config = llama_config("llama-7b")
    trace = trace_training(builder(torch.bfloat16, "all", config, 256), 1, 2048)
    unit = 2048 * 4096 * 2
    assert trace.per_block / unit <= 6.5 + 2 * 11008 / 4096 + 3 * 256 / 4096
    assert trace.kept < 6.15 * 2**30
    stock = trace_training(builder(torch.bfloat16, None, config), 1, 2048)
    assert stock.kept == pytest.approx(11.69 * 2**30, rel=1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_keep_fewer_keys_and_values(kv_heads):
    trace = trace_training(builder(torch.float32, "all", small_config(kv_heads=kv_heads)), BATCH, SEQ)
    unit = BATCH * SEQ * H * 4
    expected = closed_form(torch.float32, "all") - 2 * (1 - kv_heads / HEADS)
    assert trace.per_block / unit == pytest.approx(expected, abs=1e-9)
    assert trace.kept == real_trace(builder(torch.float32, "all", small_config(kv_heads=kv_heads))).kept


def test_the_loss_keeps_no_logits():
    trace = trace_training(builder(torch.bfloat16, "all"), BATCH, SEQ)
    tokens = BATCH * SEQ
    loss = [e for e in trace.outside if e.op == "SummedLoss"]
    assert sorted(e.shape for e in loss) == sorted([(tokens, H), (VOCAB, H)])
    assert not any(VOCAB in e.shape and tokens in e.shape for e in trace.outside)


TOKENS = ["default", "embeddings", "head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("sampler", ["haar", "coordinate", "srht"])
def test_embedding_and_head_in_a_subspace_keep_no_gradient_of_w(dtype, tie, sampler, monkeypatch):
    """A block keeps what it did; the loss one gradient of the hidden states and one [vocab, r] of B."""
    monkeypatch.setattr("rso_ds.subspace.samplers.transform_cost", lambda in_features, rank: 0)  # srht: no matrix
    config = small_config()
    config.tie_word_embeddings = tie
    build = builder(dtype, "all", config, targets=TOKENS, sampler=sampler)
    fake, real = trace_training(build, BATCH, SEQ), real_trace(build)
    assert fake.kept == real.kept
    unit = BATCH * SEQ * H * dtype.itemsize
    assert fake.per_block / unit == pytest.approx(closed_form(dtype, "all"), abs=1e-9)
    loss = [e for e in fake.outside if e.op == "SummedLoss"]
    assert sorted(e.shape for e in loss) == sorted([(BATCH * SEQ, H), (VOCAB, RANK)])
    stock = trace_training(builder(dtype, "all", config), BATCH, SEQ)
    assert stock.kept - fake.kept == VOCAB * (H - RANK) * dtype.itemsize


@pytest.mark.parametrize("tie", quick([False, True], {True}))
def test_every_method_counts_embedding_and_head(tie):
    config = small_config()
    config.tie_word_embeddings = tie
    engine = Engine.from_json({"bf16": {"enabled": True}}, 1)
    accounts = [
        Accountant(model_builder(config), rso_ds.RSOConfig(rank=RANK, targets=targets), engine)
        for targets in ("default", TOKENS)
    ]
    tensors = 1 if tie else 2
    # B instead of W; adapters on both sides, of each module; moments [r, vocab] instead of [hidden, vocab].
    change = {
        "rso": tensors * VOCAB * (RANK - H),
        "lora": 2 * RANK * (VOCAB + H),
        "galore": tensors * VOCAB * (RANK - H),
        "adamw": 0,
    }
    for name, expected in change.items():
        before, after = (a.account(name, BATCH, SEQ) for a in accounts)
        assert after.missing == []
        assert after.device["solver state"] - before.device["solver state"] == 8 * expected, name


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], {torch.float32}))
@pytest.mark.parametrize("shape", quick(["llama-9m", "llama-60m", "llama-130m"], {"llama-9m"}))
def test_model_against_measurement(shape, dtype):
    """Kept bytes exactly; the moment's peak within 5 % (the real run frees and allocates in its own order)."""
    build = builder(dtype, "all", llama_config(shape), rank=32)
    fake = trace_training(build, 1, 256)
    torch.manual_seed(0)
    model = build().train()
    ids = torch.randint(0, 500, (1, 256))
    model(input_ids=ids, labels=ids)  # draws every P
    with KeptRecorder(model) as recorder:
        model(input_ids=ids, labels=ids, use_cache=False)
    assert recorder.total == fake.kept
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert live.peak == pytest.approx(fake.kept + fake.working, rel=0.05)


def test_few_traced_blocks_stand_for_all():
    config = llama_config("llama-60m")
    engine = Engine.from_json({"bf16": {"enabled": True}}, 1)
    accountant = Accountant(model_builder(config), rso_ds.RSOConfig(rank=32), engine)
    whole = trace_training(builder(torch.bfloat16, "all", config, 32), 2, 128)
    short = accountant.account("rso", 2, 128).trace
    assert (whole.traced, short.traced, short.blocks) == (8, 4, 8)
    assert short.kept == whole.kept
    assert short.working == pytest.approx(whole.working, rel=0.02)


@pytest.mark.parametrize("targets", ["default", ["default", "head"]])
def test_few_traced_chunks_of_the_loss_stand_for_all(targets, monkeypatch):
    def traced():
        config = llama_config("llama-9m")
        rso = rso_ds.RSOConfig(rank=32, targets=targets)
        accountant = Accountant(model_builder(config), rso, Engine.from_json({"bf16": {"enabled": True}}, 1))
        return accountant.account("rso", 5, 1024).trace  # 20 chunks

    short = traced()
    monkeypatch.setattr("rso_ds.planning.memory.trace.TRACED_CHUNKS", 1000)
    assert traced() == short


def test_gradient_checkpointing_keeps_block_inputs():
    build = builder(torch.float32, "all")
    plain = trace_training(build, BATCH, SEQ)
    trace = trace_training(build, BATCH, SEQ, checkpointing=True)
    assert trace.kept < 0.4 * plain.kept
    model = build().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 500, (BATCH, SEQ))
    model(input_ids=ids, labels=ids)
    with LiveBytes() as live:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        after_forward = live.live
    assert after_forward == pytest.approx(trace.kept, rel=0.02)
    del loss


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3", "gemma"])
def test_other_models_are_traced_as_they_run(kind):
    from unit.test_exact_savings import CAUSAL

    def build():
        torch.manual_seed(0)
        model = CAUSAL[kind]()
        rso_ds.convert(model, rso_ds.RSOConfig(rank=4))
        return model

    fake = trace_training(build, 2, 8)
    torch.manual_seed(0)
    model = build().train()
    ids = torch.randint(2, 32, (2, 8))
    with KeptRecorder(model) as recorder:
        model(input_ids=ids, labels=ids, use_cache=False)
    assert recorder.total == pytest.approx(fake.kept, rel=0.05)


@pytest.fixture(autouse=True)
def traced_once():
    with remembered_traces():
        yield


# -- the command -------------------------------------------------------------------------------------

SEVEN = ["memory", "--deepspeed", str(ROOT / "ds_configs/rso_7b_zero3.json"), "--model", "llama-7b"]


@EXHAUSTIVE
def test_command_compares_and_draws(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    main([*SEVEN, "--compare", "--json", "--plot", str(tmp_path / "out.png")])
    result = json.loads(capsys.readouterr().out)
    accounts = {a["method"]: a for a in result["accounts"]}
    assert list(accounts) == ["RSO", "AdamW", "LoRA", "GaLore"]
    assert accounts["RSO"]["total_bytes"] < 0.5 * accounts["AdamW"]["total_bytes"]
    assert accounts["AdamW"]["device_bytes"]["solver state"] == 8 * 6_738_415_616 // 8
    assert accounts["RSO"]["fits"]["24 GB"] is True
    assert accounts["AdamW"]["fits"]["24 GB"] is False
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert set(result["largest"]) == set(CARDS)
    main([*SEVEN, "--gradient-checkpointing", "--engine", "fsdp2", "--gpus", "4"])
    table = capsys.readouterr().out
    assert "FSDP2, 4 ranks, bf16" in table
    assert "block inputs" in table


@EXHAUSTIVE
def test_the_largest_sizes_fit_and_larger_ones_do_not():
    config = llama_config("llama-350m")
    engine = Engine.from_json({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, 8)
    accountant = Accountant(model_builder(config), rso_ds.RSOConfig(rank=128), engine)
    cards = [GIB, CARDS["24 GB"], CARDS["80 GB"]]
    nothing, *found = accountant.largest("rso", cards, 1, 1024)
    assert nothing == (0, 0)
    for card, (batch, seq) in zip(cards[1:], found, strict=True):
        assert accountant.account("rso", batch, 1024).needed <= card * 1.002
        assert accountant.account("rso", batch + 1, 1024).needed > card
        assert accountant.account("rso", 1, seq).needed <= card * 1.002
        assert accountant.account("rso", 1, int(seq * 1.01)).needed > card


@EXHAUSTIVE
def test_seventy_billion_in_seconds(tmp_path, capsys):
    transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    main([*SEVEN[:3], "--model", str(tmp_path), "--gpus", "64", "--seq-len", "4096", "--json"])
    account = json.loads(capsys.readouterr().out)["accounts"][0]
    assert account["missing"] == []
    assert account["device_bytes"]["weights"] + account["device_bytes"]["B or adapters"] > 70e9 * 2 / 64


@EXHAUSTIVE
def test_an_unknown_model_type_is_counted_as_far_as_it_goes(tmp_path, capsys):
    """No default targets for it: RSO cannot be counted and says so; AdamW is traced all the same."""
    transformers.PersimmonConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    ).save_pretrained(tmp_path)
    main([*SEVEN[:3], "--model", str(tmp_path), "--compare", "--seq-len", "64"])
    out = capsys.readouterr().out
    assert "NOT COUNTED RSO, LoRA, GaLore: no default 'targets' for model type 'persimmon'" in out
    assert "AdamW, one rank" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len", "1"], "--seq-len must be at least 2, got 1"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1, got 0"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--model", "llama-7bb"], "Did you mean 'llama-7b'?"),
        (["--model", "./nowhere"], "--model ./nowhere: no such shape, folder or hub name"),
        (["--deepspeed", str(ROOT / "ds_configs/adamw.json")], 'its optimizer is "AdamW"'),
        (["--deepspeed", "missing.json"], "--deepspeed missing.json cannot be read"),
        pytest.param(["--plot", "/nowhere/out.png"], "--plot /nowhere/out.png cannot be written", marks=EXHAUSTIVE),
        (["--model", "llama-9m"], "'rank': 1024 exceeds the smaller side of layer"),
    ],
)
def test_bad_input_is_refused(flags, message):
    with pytest.raises(SystemExit) as end:
        main([*SEVEN, *flags])
    assert message in str(end.value)


def test_sequences_beyond_learned_positions_are_refused(tmp_path):
    transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="--seq-len 256 exceeds the model's 128 positions"):
        main([*SEVEN[:3], "--model", str(tmp_path), "--seq-len", "256"])


@EXHAUSTIVE
def test_every_shape_has_an_account():
    engine = Engine.from_json({"bf16": {"enabled": True}}, 8)
    for shape in LLAMA_SHAPES:
        accountant = Accountant(model_builder(llama_config(shape)), rso_ds.RSOConfig(rank_ratio=0.25), engine)
        assert accountant.account("rso", 1, 256).missing == []
