"""What a run starts from: named shapes, and every kind of folder that has weights, or seems to have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import byte_tokenizer, tiny_llama
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick

from rso_ds import RSOConfigError

needs("transformers", "accelerate")

import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from rso_ds.checkpoint.model_files import MODEL_FILES  # noqa: E402
from rso_ds.models import LLAMA_SHAPES, begins_random, find_start, llama_config  # noqa: E402

CAUSAL, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
BERT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LIKELY = {  # of what lies in folders without weights, for the quick suite
    ("tokenizer.json", "--init random"),
    ("optimizer.bin", "optimizer.bin"),
    ("consolidated.00.pth", "as Meta and Mistral release them"),
    ("model-q4.gguf", "gguf_file="),
    (f"step4/{MODEL_FILES}/config.json", "rso-ds export"),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A model with a tokenizer, as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_llama.build(vocab=300).save_pretrained(folder)
    byte_tokenizer.build().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(llama, tmp_path):
    """The model in a folder of its own, with other weights and other settings: ``copied(state, key=value)``."""

    def copy(state: dict | None = None, **settings) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(llama, folder)
        (folder / "model.safetensors").unlink()
        if state is not None:
            save_file({k: v.clone() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return folder

    return copy


@pytest.fixture(scope="module")
def state(llama) -> dict[str, torch.Tensor]:
    return load_file(llama / "model.safetensors")


def classifier(folder: Path, labels: int = 3):
    return find_start(str(folder), CLASSIFIER, "pretrained", new_head=True, num_labels=labels)


def refusal(folder: Path, **options) -> str:
    with pytest.raises(RSOConfigError) as refused:
        find_start(str(folder), **options)
    assert str(folder) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama-9m", 9), ("llama-20m", 20), ("llama-35m", 35), ("llama-60m", 58), ("llama-130m", 134),
     ("llama-350m", 368), ("llama-1b", 1339), ("llama-7b", 6738)],
)  # fmt: skip
def test_named_shapes_have_the_benchmark_sizes(name, millions):
    assert name in LLAMA_SHAPES
    with torch.device("meta"):
        model = CAUSAL.from_config(llama_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(
    ("name", "message"),
    [("llama-9b", "Did you mean 'llama-9m'"), ("./nowhere", "no such shape, folder or hub name")],
)
def test_unknown_models(name, message):
    with pytest.raises(RSOConfigError, match=message):
        find_start(name)


def test_a_named_shape_is_random_and_as_large_as_the_tokenizer():
    start = find_start("llama-9m")
    assert start.text() == "model: llama-9m, random weights"
    assert start.build(300, 32).config.vocab_size == 300
    with pytest.raises(RSOConfigError, match="a shape without weights"):
        find_start("llama-9m", init="pretrained")


def test_weights_are_those_of_the_folder(llama, state):
    start = find_start(str(llama))
    assert f"{llama}, pretrained (21 tensors" in start.text()
    built = start.build(0).state_dict()
    assert all(torch.equal(built[name], value) for name, value in state.items())
    assert not begins_random(str(llama), "auto")


def test_looking_draws_no_random_number(llama):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    classifier(llama)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_configuration_alone_is_a_random_model(copied):
    folder = copied()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    start = find_start(str(folder))
    assert start.text().endswith(", random weights")
    assert begins_random(str(folder), "auto")
    assert start.build(400).config.vocab_size == 400
    assert "there are no weights" in refusal(folder, init="pretrained")


@pytest.mark.parametrize(
    ("file", "advice"),
    quick([
        ("tokenizer.json", "--init random"),
        ("training_args.bin", "training_args.bin"),
        ("optimizer.bin", "optimizer.bin"),
        ("consolidated.00.pth", "as Meta and Mistral release them"),
        ("pytorch_model.pt", "load_state_dict"),
        ("model-q4.gguf", "gguf_file="),
        ("__0_0.distcp", "format_utils dcp_to_torch"),
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json lists"),
        ("adapter_config.json", "LoRA adapter: merge it"),
        ("zero_to_fp32.py", "zero_to_fp32.py"),
        (f"step4/{MODEL_FILES}/config.json", "rso-ds export"),
        (f"checkpoints/step4/{MODEL_FILES}/config.json", "/checkpoints OUT"),
        ("checkpoint-500/config.json", "/checkpoint-STEP"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
    ], LIKELY),
)  # fmt: skip
def test_what_cannot_be_loaded_is_no_random_model(copied, file, advice):
    folder = copied()
    for tokenizer in folder.glob("tokenizer*"):
        tokenizer.unlink()
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    message = refusal(folder)
    assert path.relative_to(folder).parts[0] in message or file == "zero_to_fp32.py" or "step4" in file
    assert advice in message
    assert "To start from random weights all the same, give --init random" in message
    assert find_start(str(folder), init="random").weights is None


@pytest.mark.parametrize(
    ("place", "advice"), [(f"{MODEL_FILES}/config.json", "rso-ds export"), ("model/config.json", "give its model")]
)
def test_folders_of_runs_say_what_to_give_in_their_place(tmp_path, place, advice):
    (tmp_path / place).parent.mkdir()
    (tmp_path / place).write_text("{}")
    assert advice in refusal(tmp_path)


def damaged(folder: Path, kind: str, state: dict[str, torch.Tensor]) -> None:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    index = folder / "model.safetensors.index.json"
    if kind.startswith("cut"):
        torch.save(state, pickled, _use_new_zipfile_serialization=kind != "cut old pickle")
        save_file(state, safe, {"format": "pt"})
        cut, other = (safe, pickled) if kind == "cut" else (pickled, safe)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        other.unlink()
    elif kind == "pointer":
        safe.write_text(POINTER)
    elif kind == "pointer of a pickle":
        pickled.write_text(POINTER)
    elif kind == "empty":
        safe.write_bytes(b"")
    elif kind == "nested":
        torch.save({"model": state, "step": 3}, pickled)
    elif kind == "objects":
        torch.save(tiny_llama.build(), pickled)
    elif kind == "lost shard":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}))
    elif kind == "index":
        index.write_text("{")
    else:
        index.write_text("{}")


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("cut", "model.safetensors", "cut or damaged"),
        ("cut pickle", "pytorch_model.bin", "cut or damaged"),
        ("cut old pickle", "pytorch_model.bin", "cut or damaged"),
        ("pointer", "model.safetensors", "Git LFS pointer"),
        ("pointer of a pickle", "pytorch_model.bin", "Git LFS pointer"),
        ("empty", "model.safetensors", "is empty"),
        ("nested", "pytorch_model.bin", "holds no tensors"),
        ("objects", "pytorch_model.bin", "Python objects beside tensors"),
        ("lost shard", "model-00001-of-00001.safetensors", "are not there"),
        ("index", "model.safetensors.index.json", "is not JSON"),
        ("empty index", "model.safetensors.index.json", "weight_map"),
    ],
)
def test_damaged_files_are_named(copied, state, kind, file, message):
    folder = copied()
    damaged(folder, kind, dict(state))
    told = refusal(folder)
    assert file in told
    assert message in told
    assert "\x1b" not in told


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def without(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "settings", "causal", "classifies"),
    [
        (lambda s: renamed(s, "_orig_mod."), {}, "21 missing (lm_head.weight, ", "as torch.compile leaves them"),
        (lambda s: renamed(s, "module."), {}, "21 left over (module.lm_head.weight", "as DataParallel or DDP leaves"),
        (lambda s: renamed(s, "base_model.model."), {}, "as peft leaves them", "as peft leaves them"),
        (lambda s: without(s, "lm_head"), {}, "1 missing (lm_head.weight)", None),
        (lambda s: without(s, "lm_head"), {"tie_word_embeddings": True}, None, None),
        (dict, {"tie_word_embeddings": True}, None, None),
        (lambda s: without(s, "layers.1."), {}, "9 missing (model.layers.1.", "9 missing (model.layers.1."),
        (dict, {"num_hidden_layers": 1}, "9 left over (model.layers.1.", "9 left over (model.layers.1."),
        (lambda s: {n.removeprefix("model."): v for n, v in without(s, "lm_head").items()}, {"num_hidden_layers": 1},
         "left over", "9 left over (layers.1."),
        (dict, {"intermediate_size": 90}, "down_proj.weight is [32, 86], and not [32, 90]", "another shape"),
        (dict, {"vocab_size": 301}, "embed_tokens.weight is [300, 32], and not [301, 32]", "another shape"),
        (lambda s: {n: v.to(torch.int8) for n, v in s.items()}, {}, "as quantisation leaves them", "quantisation"),
        (lambda s: {n: v.bfloat16() for n, v in s.items()}, {}, None, None),
        (dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised (gptq)", "is quantised"),
        (dict, {"pad_token_id": 300}, "pad_token_id 300, and the vocabulary has 300", "pad_token_id 300"),
    ],
)  # fmt: skip
def test_weights_are_compared_name_by_name(copied, state, change, settings, causal, classifies):
    """For a causal model, whose every tensor must be there, and for a classifier, whose head is new."""
    folder = copied(change(state), **settings)
    for expected, look in ((causal, lambda: find_start(str(folder))), (classifies, lambda: classifier(folder))):
        if expected is None:
            assert look().build(0).config.vocab_size == 300
        else:
            with pytest.raises(RSOConfigError) as refused:
                look()
            assert expected in str(refused.value)


def test_weights_of_another_architecture(copied):
    sizes = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    folder = copied(transformers.GPT2Model(sizes).state_dict())
    for look in (find_start, classifier):
        with pytest.raises(RSOConfigError, match="are not those of the Llama"):
            look(str(folder))


@pytest.mark.parametrize(
    ("kind", "settings", "new"),
    [
        (transformers.BertModel, transformers.BertConfig(**BERT), ["classifier.bias", "classifier.weight"]),
        (transformers.BertForPreTraining, transformers.BertConfig(**BERT), ["classifier.bias", "classifier.weight"]),
        (transformers.BertForMaskedLM, transformers.BertConfig(**BERT),
         ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]),
        (transformers.RobertaForMaskedLM, transformers.RobertaConfig(**BERT),
         [f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("bias", "weight")]),
        (transformers.GPT2Model, transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2),
         ["score.weight"]),
    ],
)  # fmt: skip
def test_only_the_head_of_a_classifier_is_new(tmp_path, kind, settings, new):
    kind(settings).save_pretrained(tmp_path)
    start = classifier(tmp_path)
    assert start.new == new
    assert new[0] in start.text()
    stored = load_file(tmp_path / "model.safetensors")
    embeddings = next(stored[n] for n in stored if n.endswith(("word_embeddings.weight", "wte.weight")))
    assert torch.equal(start.build(0).get_input_embeddings().weight, embeddings)


@EXHAUSTIVE
def test_a_head_for_other_labels_is_told(tmp_path):
    settings = transformers.BertConfig(**BERT, num_labels=5)
    transformers.BertForSequenceClassification(settings).save_pretrained(tmp_path)
    assert classifier(tmp_path, 5).new == []
    with pytest.raises(RSOConfigError, match="other labels than the 3 of --data"):
        classifier(tmp_path, 3)


def test_a_model_without_its_prefix(tmp_path):
    """GPT2Model's weights, loaded as GPT2LMHeadModel: the head is tied, nothing is new."""
    sizes = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    transformers.GPT2Model(sizes).save_pretrained(tmp_path)
    start = find_start(str(tmp_path))
    assert (start.new, start.positions) == ([], 24)


@EXHAUSTIVE
def test_experts_that_are_missing(tmp_path):
    settings = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(settings).save_pretrained(tmp_path)
    assert find_start(str(tmp_path)).weights is not None
    file = tmp_path / "model.safetensors"
    some = without(load_file(file), "experts.1.w1")
    file.unlink()
    save_file(some, file, {"format": "pt"})
    assert "some that belong together" in refusal(tmp_path)


@pytest.mark.parametrize("lora_names", quick([True, False], {False}))
def test_an_adapter_is_merged_if_it_is_one_for_its_base(llama, state, tmp_path, lora_names):
    peft = pytest.importorskip("peft")
    base = CAUSAL.from_pretrained(llama)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(llama)
    if not lora_names:
        settings["target_modules"] = ["q_proj", "k_proj"]  # for which the file has no tensors
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    start = find_start(str(tmp_path), init="pretrained")
    if lora_names:
        assert f"{llama} with the adapter {tmp_path} merged, pretrained" in start.text()
        changed = {n for n, v in start.build(0).state_dict().items() if not torch.equal(v, state[n])}
        assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    else:
        with pytest.raises(RSOConfigError, match="its adapter is not one for"):
            start.build(0)
