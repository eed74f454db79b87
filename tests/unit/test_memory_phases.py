"""The phases of a run: which is counted, which is the largest, and what fits by bisection."""

import pytest
import torch
from support.exhaustive import EXHAUSTIVE, quick
from support.traces import remembered_traces

import rso_ds
from rso_ds.planning.memory.account import CARDS, Accountant, model_builder
from rso_ds.planning.memory.largest import largest
from rso_ds.planning.memory.phases import PHASES, PhasePeaks
from rso_ds.planning.memory.states import Engine
from rso_ds.planning.memory.trace import trace_training

transformers = pytest.importorskip("transformers")
from rso_ds.models import learned_positions, llama_config  # noqa: E402

TINY = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def traced_once():
    with remembered_traces():
        yield


def accountant(config, kind="zero", stage=2, gpus=8, **more):
    ds_json = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}, **more}
    return Accountant(model_builder(config), rso_ds.RSOConfig(rank_ratio=0.25), Engine.from_json(ds_json, gpus, kind))


@pytest.mark.parametrize(("kind", "stage"), quick([("zero", 0), ("zero", 2), ("zero", 3), ("fsdp2", 3)], {("zero", 3)}))
def test_the_total_is_the_largest_phase(kind, stage):
    account = accountant(llama_config("llama-9m", 4096, 128), kind, stage).account("rso", 2, 128)
    assert tuple(account.phases) == PHASES
    assert account.total == max(phase.device for phase in account.phases.values()) > 0
    assert account.phases[account.largest_phase].device == account.total
    assert account.to_dict()["phase_bytes"]["evaluation"]["device"] == account.phases["evaluation"].device


def test_an_evaluation_that_takes_most_is_what_is_needed():
    """Checkpointed training keeps little, and an evaluation makes the same chunk of logits, with a log-softmax."""
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": 50_000}, intermediate_size=128)
    account = accountant(config).account("rso", 1, 512)
    evaluation = account.phases["evaluation"].device
    assert evaluation - account.phases["boundary"].device > 256 * 50_000 * (2 + 4)
    assert account.total >= evaluation


@EXHAUSTIVE
def test_gradients_of_several_micro_batches_count_from_the_first():
    config = llama_config("llama-9m", 4096, 128)
    needs = {
        (kind, n): accountant(config, kind, 2, 2, gradient_accumulation_steps=n).account("rso", 2, 128)
        for kind in ("zero", "fsdp2")
        for n in (1, 4)
    }
    for kind in ("zero", "fsdp2"):
        one, four = (needs[kind, n].phases["training"].device for n in (1, 4))
        trained = accountant(config, kind).sizes("rso")[0].trained
        # ZeRO-2 keeps bf16 shards; FSDP2 sums whole fp32 gradients until the last micro batch.
        assert four - one == pytest.approx({"zero": 2 * trained / 2, "fsdp2": 4 * trained}[kind], rel=0.02)


def test_fsdp2_never_holds_the_model_whole_on_the_device():
    account = accountant(llama_config("llama-9m", 4096, 128), "fsdp2").account("rso", 2, 128)
    sizes = accountant(llama_config("llama-9m", 4096, 128)).sizes("rso")[0]
    whole = 4 * (sizes.frozen + sizes.trained)
    assert account.phases["start"].host >= whole > account.phases["start"].device


# -- the largest that fits ---------------------------------------------------------------------------


@pytest.mark.parametrize("need", [lambda n: 100 + 7 * n, lambda n: 50 + n + n * n // 9, lambda n: 10 * (n // 3)])
@pytest.mark.parametrize("limit", [None, 640])
def test_bisection_finds_what_fits_with_few_looks(need, limit):
    looked = []

    def counted(n):
        looked.append(n)
        return need(n)

    cards = [20, 500, 5_000, 90_000, 2_000_000]
    found = largest(counted, cards, 100, 1, limit)
    for card, size in zip(cards, found, strict=True):
        assert size == 0 or need(size) <= card
        assert size == limit or need(size + max(1, round(0.011 * size))) > card
    assert len(looked) == len(set(looked)) <= 8 * len(cards)


def test_a_model_with_learned_positions_runs_no_longer_sequences():
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, n_positions=256)
    account = accountant(config)
    assert account.limit == 256
    with pytest.raises(rso_ds.RSOConfigError, match="--seq-len 257 exceeds the model's 256 positions"):
        account.account("rso", 1, 257)


@EXHAUSTIVE
def test_the_longest_sequences_end_with_the_positions():
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, n_positions=256)
    found = accountant(config).largest("rso", list(CARDS.values()), 1, 128)
    assert [seq for _, seq in found] == [256] * len(CARDS)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (lambda: transformers.OPTConfig(**TINY, ffn_dim=128, max_position_embeddings=128, word_embed_proj_dim=64), 128),
        (lambda: transformers.GPTJConfig(vocab_size=500, n_embd=64, n_layer=1, n_head=4, n_positions=96), 96),
        (lambda: transformers.LlamaConfig(**TINY, intermediate_size=96, max_position_embeddings=64), None),
    ],
    ids=["opt", "gptj", "llama of as many features"],
)
def test_learned_positions(config, limit):
    assert learned_positions(model_builder(config())(torch.float32, 1)) == limit


@pytest.mark.parametrize(
    "special", [pytest.param({"attn_implementation": "eager"}, marks=EXHAUSTIVE), {"sliding_window": 64}]
)
def test_masks_and_scores_grow_with_the_square(special):
    config = transformers.MistralConfig(**TINY, num_key_value_heads=4, intermediate_size=128, **special)
    kept = [trace_training(lambda: model_builder(config)(torch.float32, None), 1, seq).kept for seq in (256, 512)]
    plain = transformers.LlamaConfig(**TINY, intermediate_size=128)
    linear = [trace_training(lambda: model_builder(plain)(torch.float32, None), 1, seq).kept for seq in (256, 512)]
    assert linear[1] - 2 * linear[0] < 1000
    assert kept[1] - 2 * kept[0] > 2 * 256**2  # at least a bool a pair of tokens


# -- measuring ---------------------------------------------------------------------------------------


def test_peaks_are_of_their_phase_alone():
    peaks = PhasePeaks(on_gpu=False)
    with peaks("start"):
        torch.empty(1000)  # nobody has begun
    assert peaks.bytes == {}
    peaks.begin()
    with peaks("training"):
        kept = torch.empty(10, dtype=torch.uint8)
        with peaks("boundary"):
            torch.empty(500, dtype=torch.uint8)
        torch.empty(90, dtype=torch.uint8)
    with peaks("save"):
        storage = torch.empty(40, dtype=torch.uint8).untyped_storage()
        storage.resize_(0)  # as FSDP2 frees
        torch.empty(20, dtype=torch.uint8)
        storage.resize_(60)
    peaks.end()
    del kept
    assert peaks.bytes == {"training": 100, "boundary": 510, "save": 70}


@EXHAUSTIVE
def test_the_account_of_every_method_has_phases():
    for name in ("rso", "adamw", "lora", "galore"):
        account = accountant(llama_config("llama-9m", 4096, 128)).account(name, 2, 128)
        assert account.missing == []
        assert ("boundary" in account.phases) == (name == "rso")
