"""Your own DeepSpeed loop with RSO, on GPUs or CPU ranks.

deepspeed --num_gpus 2 examples/deepspeed_loop.py --stage 3 --output runs/example
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import rso_ds
from rso_ds.checkpoint import save_dense

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2, choices=range(4))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="runs/example")
    parser.add_argument("--local_rank", type=int, default=0)  # the deepspeed launcher passes it
    args = parser.parse_args()

    config = json.loads((ROOT / "ds_configs" / f"rso_zero{args.stage}.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    del config["train_batch_size"]
    config["bf16"] = {"enabled": torch.cuda.is_available()}
    config["optimizer"]["params"] |= {"lr": 4e-3, "dense_lr": 1.6e-2, "weight_decay": 0.0, "torch_adam": True}

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(shape)
    engine, *_ = rso_ds.initialize(model=model, model_parameters=model.parameters(), config=config)

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(args.steps):
        # Sequences that count upwards, modulo 256, each from a random start: something to learn at once.
        ids = (torch.randint(256, (4, 1), generator=generator) + torch.arange(32)) % 256
        loss = engine(input_ids=ids.to(engine.device), labels=ids.to(engine.device)).loss
        engine.backward(loss)
        engine.step()
        if step % 10 == 9 and dist.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  subspace {engine.rso.draw}", flush=True)
    save_dense(engine.module, args.output, dist.get_rank())  # a plain Hugging Face model, at every stage
    rso_ds.comm.leave_process_groups()


if __name__ == "__main__":
    main()
