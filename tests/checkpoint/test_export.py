"""``rso-ds export``: checkpoints of one process into Hugging Face models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import tiny_llama
from support.resealed_checkpoints import reseal
from support.saved_runs import CASES, STEPS, TOKENS, check_equal, error_of, exported, gpt2, logits, saved, trained
from torch import nn
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.checkpoint.export import export_dense
from rso_ds.checkpoint.lora import export_lora
from rso_ds.cli import main


@pytest.mark.parametrize("case", CASES)
def test_llama(tmp_path, case):
    model, _ = saved(tmp_path / "run", tiny_llama.build(), **CASES[case])
    done = export_dense(tmp_path / "run", tmp_path / "out")
    loaded = check_equal(model, tmp_path / "out")
    assert done.files == ["model.safetensors"]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["default", TOKENS, ["default", "embeddings"]], ids=["head", "both", "embeddings"])
def test_tied_embeddings(tmp_path, targets):
    if targets == ["default", "embeddings"]:
        with pytest.raises(rso_ds.RSOConversionError, match="is tied to"):
            trained(tiny_llama.build(tie=True), targets=targets)
        return
    model, _ = saved(tmp_path / "run", tiny_llama.build(tie=True), targets=targets)
    export_dense(tmp_path / "run", tmp_path / "out")
    assert "lm_head.weight" not in exported(tmp_path / "out")
    loaded = check_equal(model, tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_conv1d(tmp_path):
    """GPT-2: weights stored [in, out], biases, buffers, a tied head."""
    model, _ = saved(tmp_path / "run", gpt2())
    export_dense(tmp_path / "run", tmp_path / "out")
    loaded = check_equal(model, tmp_path / "out")
    assert exported(tmp_path / "out")["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("masters", ["none", "cpu"])
def test_bf16(tmp_path, masters):
    """Rounded once, to the dtype of the run, from fp32 masters where W has them."""
    model, _ = saved(tmp_path / "run", tiny_llama.build(dtype=torch.bfloat16), master_weights=masters)
    export_dense(tmp_path / "run", tmp_path / "out")
    loaded = check_equal(model, tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.05)


def test_float64(tmp_path):
    """Logits differ by what transformers computes in fp32 (norms, rotary angles)."""
    model, _ = saved(tmp_path / "run", tiny_llama.build(dtype=torch.float64))
    export_dense(tmp_path / "run", tmp_path / "out")
    torch.testing.assert_close(logits(check_equal(model, tmp_path / "out")), logits(model), rtol=0, atol=1e-6)


def test_weights_shared_by_hand_are_all_written(tmp_path):
    """transformers does not know of this tie: without its second name the layer would be loaded at random."""
    model = tiny_llama.build()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    model, _ = saved(tmp_path / "run", model, targets=["q_proj"])
    export_dense(tmp_path / "run", tmp_path / "out")
    check_equal(model, tmp_path / "out")


def test_model_without_rso(tmp_path):
    from rso_ds.checkpoint import Checkpointer, TrainingState
    from rso_ds.engines.replicated import ReplicatedLayout

    model = tiny_llama.build(tie=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tiny_llama.loss_of(model, tiny_llama.tokens(0, 4)).backward()
    optimizer.step()
    places = ReplicatedLayout({}, optimizer, torch.device("cpu"))
    Checkpointer(TrainingState(model, places, None), {}).save(tmp_path / "run", "a")
    export_dense(tmp_path / "run" / "a", tmp_path / "out")
    loaded = check_equal(model.eval(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(rso_ds.RSOConfigError, match="--lora: .* is of a run without RSO"):
        export_lora(tmp_path / "run", tmp_path / "lora")


def test_command_with_shards_tokenizer_and_dtype(tmp_path, capsys):
    model, optimizer = trained(tiny_llama.build())

    def tokenizer(folder):
        (folder / "tokenizer.json").write_text("{}")

    optimizer.checkpointer().save(tmp_path / "run", "a", model_files=tokenizer)
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bf16", "--max-shard-size", "20KB"])
    assert "bfloat16, in 4 files" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    shards = {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    rest = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert names == shards | rest
    assert all((tmp_path / "out" / name).stat().st_size < 20_000 + 3000 for name in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = exported(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as f:
            assert name in f.keys()  # noqa: SIM118
            assert f.metadata() == {"format": "pt"}
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in dense_state_dict(model).items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_tensors_of_several_dtypes_are_aligned(tmp_path):
    from rso_ds.checkpoint.weights_file import Entry, write_file

    tensors = {
        "flag": torch.tensor([True, False, True]),
        "low": torch.arange(3).bfloat16(),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
        "count": torch.tensor([7]),
        "double": torch.rand(2, 3).double(),
    }
    entries = [Entry(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    write_file(tmp_path / "x.safetensors", entries, tensors.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


# -- memory ----------------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from rso_ds.checkpoint.export import export_dense
import rso_ds.checkpoint.stored_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = export_dense(sys.argv[1], sys.argv[2])
print(done.bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """32 layers of 4 MiB and their moments: 300 MB of fp32 in the checkpoint, 134 MB of them the model."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(32)))
    config = rso_ds.RSOConfig(rank=4, targets="all-linear")
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    optimizer.checkpointer().save(tmp_path / "run", "a", model_files=lambda p: (p / "config.json").write_text("{}"))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, growth = map(int, done.stdout.split()[-2:])
    print(f"model {size / 1e6:.0f} MB, growth {growth / 1e6:.0f} MB")
    assert size == 32 * 4 * 2**20
    assert growth < size / 2
    expected = dense_state_dict(model)
    assert all(torch.equal(t, expected[n]) for n, t in exported(tmp_path / "out").items())


# -- refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    saved(tmp_path / "run", tiny_llama.build())
    return tmp_path / "run"


def test_damage_is_found_before_anything_is_written(run, tmp_path):
    file = next((run / f"step{STEPS}").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    message = error_of(run, tmp_path / "out", kind=rso_ds.RSOCheckpointError)
    assert f"{file} is damaged" in message
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_occupied_folder_stays_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    export_dense(run, tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "exists and is not empty" in error_of(run, tmp_path / "out", kind=rso_ds.RSOConfigError)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert "lies inside a checkpoint" in error_of(run, run / f"step{STEPS}" / "out")


def test_a_crash_leaves_no_half_model(run, tmp_path):
    (tmp_path / ".out.exporting").mkdir()
    (tmp_path / ".out.exporting" / "model.safetensors").write_text("half")

    def crash(number, total):
        assert (tmp_path / ".out.exporting").is_dir()
        if number == 3:
            raise OSError("No space left on device")

    assert "out was not written: OSError: No space left" in error_of(run, tmp_path / "out", progress=crash)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_missing_configuration(run, tmp_path):
    checkpoint = run / f"step{STEPS}"
    other = tmp_path / "other"
    (checkpoint / "hf").rename(other)
    (other / "tokenizer_config.json").write_text("{}")
    (other / "model.safetensors").write_text("weights of another")
    reseal(checkpoint)
    message = error_of(run, tmp_path / "out", kind=rso_ds.RSOConfigError)
    assert "hf/config.json does not exist" in message
    assert "--config FOLDER" in message
    export_dense(run, tmp_path / "out", config=other)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "holds no config.json" in error_of(run, tmp_path / "out2", config=tmp_path)


def test_foreign_checkpoints(run, tmp_path):
    state_file = run / f"step{STEPS}" / "rso_state.json"
    state = json.loads(state_file.read_text())
    for content, message in (
        ({**state, "native": {"stage": 0}}, "deepspeed: DeepSpeed's own files of a run without RSO cannot be read"),
        ({k: v for k, v in state.items() if k != "dense"}, "has no 'dense': it was written by another version"),
    ):
        state_file.write_text(json.dumps(content))
        reseal(state_file.parent)
        assert message in error_of(run, tmp_path / "out", kind=rso_ds.RSOCheckpointError)
    assert "no checkpoint to load" in error_of(tmp_path, tmp_path / "out")
    assert "none does not exist" in error_of(tmp_path / "none", tmp_path / "out")


def test_values_beyond_fp16(tmp_path):
    model = tiny_llama.build()
    model.model.norm.weight.data[0] = 1e6
    saved(tmp_path / "run", model, steps=0)
    message = error_of(tmp_path / "run", tmp_path / "out", dtype=torch.float16)
    assert "'model.norm.weight' reaches 1e+06" in message


def test_command_line_errors(tmp_path):
    with pytest.raises(SystemExit, match="RSOCheckpointError: .* does not exist"):
        main(["export", str(tmp_path / "none"), str(tmp_path / "out")])
