"""What a folder may hold in place of weights that can be loaded, and how these are made of it."""

from __future__ import annotations

from pathlib import Path

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
_WEIGHT_LIKE = (
    "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.ggml", "*.distcp", "*.h5", "*.msgpack", "*.npz",
    "*.onnx", "*.index.json", ".metadata",
)  # fmt: skip
# Pattern -> what it is and what to do, of which {} is the folder. The first that is there is told.
_ADVICE = {
    "adapter_config.json": "It holds a LoRA adapter: merge it into its base first (docs/migration.md).",
    "hf/config.json": "It is a checkpoint of rso_ds: 'rso-ds export {} OUT' makes a model of it.",
    "*/hf/config.json": "It holds checkpoints of rso_ds: 'rso-ds export {} OUT' makes a model of the latest.",
    "model/config.json": "It is the output of a run: give its model, --model {}/model.",
    "checkpoints/*/hf/config.json": "It is the output of a run without a model yet: 'rso-ds export {}/checkpoints OUT'"
    " makes one of its latest checkpoint.",
    "zero_to_fp32.py": "It is a checkpoint of DeepSpeed: 'python {}/zero_to_fp32.py {} OUT' makes weights of it.",
    "checkpoint-*/config.json": "It holds checkpoints of a Trainer: give one of them, --model {}/checkpoint-STEP.",
    "*.gguf": "Weights in GGUF are read by transformers' from_pretrained(FOLDER, gguf_file=NAME): load them so, and"
    " save them with save_pretrained.",
    "*.distcp": "Shards of torch.distributed.checkpoint are joined by 'python -m"
    " torch.distributed.checkpoint.format_utils dcp_to_torch IN OUT.pth': load that into the model, and save it with"
    " save_pretrained.",
    "consolidated*": "These are weights as Meta and Mistral release them: take the repository in Hugging Face's form,"
    " or convert them with the script of transformers for this model.",
    "*.h5": "Weights of TensorFlow are not read: take those of PyTorch.",
    "*.msgpack": "Weights of Flax are not read: take those of PyTorch.",
    "*.pt*": "Load the file into the model (load_state_dict) and save it with save_pretrained.",
    "*.ckpt": "Load the file into the model (load_state_dict) and save it with save_pretrained.",
    "*.safetensors": "Weights are looked for in model.safetensors, or in the files that model.safetensors.index.json"
    " lists.",
}


def advice(folder: Path) -> str:
    """A sentence, with a space before it, on how to come from ``folder`` to a model; empty if nothing is known."""
    found = next((text for pattern, text in _ADVICE.items() if any(folder.glob(pattern))), None)
    return "" if found is None else " " + found.replace("{}", str(folder))


def looks_trained(folder: Path) -> list[str]:
    """Names of what lies in ``folder`` and hardly would if random weights were meant: a tokenizer, files like
    weights, an adapter, checkpoints."""
    patterns = (*_WEIGHT_LIKE, *_ADVICE, "global_step*", "pytorch_model_fsdp*", *_TOKENIZER)
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return list(dict.fromkeys(str(path.relative_to(folder)) for path in found))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's vocabulary or settings in ``folder``."""
    return [path for pattern in _TOKENIZER for path in sorted(folder.glob(pattern)) if path.is_file()]
