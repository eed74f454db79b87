"""What RSO keeps, trains and saves, in one process: bytes for backward, gradient elements, and the dense model.

python examples/what_it_saves.py --output runs/dense
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rso_ds
from rso_ds.checkpoint import save_dense
from rso_ds.planning.memory.kept import KeptRecorder


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="runs/dense")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    dense = LlamaForCausalLM(shape)
    model = copy.deepcopy(dense)
    config = rso_ds.RSOConfig(lr=4e-3, dense_lr=1.6e-2, rank_ratio=0.25, interval=10)
    rso_ds.convert(model, config)
    print(rso_ds.summary_table(model, config))

    ids = (torch.randint(256, (4, 1)) + torch.arange(128)) % 256
    for name, form in (("dense", dense), ("RSO", model)):
        with KeptRecorder(form) as kept:
            form(input_ids=ids, labels=ids).loss.backward()
        print(f"{name:5}  kept for backward {kept.total / 2**20:6.2f} MiB  trained {trained(form):9,}")
        form.zero_grad()

    optimizer = rso_ds.RSO(model, config)
    for _ in range(12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_dense(model, args.output)
    with torch.no_grad():
        ours = model.eval()(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(args.output).eval()(input_ids=ids).logits
    print(f"saved as a dense model; largest difference of logits {(ours - loaded).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
