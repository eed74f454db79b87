"""One rank of one set of processes: saves runs, or continues them. The environment variable PHASE says which."""

import contextlib
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from cases.resume_cases import (
    CHAINS,
    CROSSINGS,
    CUTS,
    GLOBAL_BATCH,
    SAVE,
    STEPS,
    WORLDS,
    case,
    four_rank_cases,
    two_rank_cases,
)
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.lr_schedules import WarmupLR
from support import tiny_llama
from support.case_runner import run_cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.checkpoint import dense_state_dict

OUT, PHASE = Path(sys.argv[1]), os.environ["PHASE"]
SCHEDULE = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear"}
CLIP = 0.5


class Run:
    """A run under any engine: ``steps``, ``checkpoints``, ``weights``."""

    def __init__(self, spec):
        self.spec, self.world = spec, dist.get_world_size()
        self.micro = GLOBAL_BATCH // self.world
        self.model = tiny_llama.build(spec["intermediate"])
        for module in self.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = spec["dropout"]
        torch.manual_seed(100 + dist.get_rank())  # every rank draws its own dropout
        deepspeed_run = spec["engine"].startswith("zero")
        (self._deepspeed if deepspeed_run else self._torch)()
        self.forward.train()

    def _deepspeed(self):
        stage = int(self.spec["engine"][-1])
        zero = {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 40} if stage == 3 else {}),
            **self.spec["zero"],
        }
        config = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_clipping": CLIP,
            "zero_optimization": zero,
            "scheduler": {"type": "WarmupLR", "params": SCHEDULE},
            "optimizer": {"type": "RSO", "params": self.spec["rso"]},
            **self.spec["json"],
        }
        engine, *_ = rso_ds.initialize(model=self.model, model_parameters=self.model.parameters(), config=config)
        self.forward, self.engine, self.boundary, self.checkpoints = engine, engine, engine.rso, engine.checkpoints

    def _torch(self):
        config = rso_ds.RSOConfig(**self.spec["rso"])
        rso_ds.convert(self.model, config)
        self.forward, extra, kind = self.model, {}, self.spec["engine"]
        if kind == "ddp":
            self.forward = DistributedDataParallel(self.model)
        else:
            options = {"mesh": init_device_mesh("cpu", (self.world,))}
            if kind == "hsdp":
                mesh = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("replicas", "shards"))
                options["mesh"] = mesh
                if config.communicate == "boundary":
                    options["mesh"] = mesh["shards"]
                    extra["replicas"] = mesh["replicas"].get_group()
            if self.spec["precision"] == "bf16":
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for block in self.model.model.layers:
                fully_shard(block, **options)
            fully_shard(self.model, **options)
        self.engine = None
        self.optimizer = rso_ds.RSO(self.forward, config, **extra)
        self.scheduler = WarmupLR(self.optimizer, **SCHEDULE)
        self.boundary = self.optimizer.boundary
        self.checkpoints = self.optimizer.checkpointer(scheduler=self.scheduler)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            ids = tiny_llama.tokens(step, GLOBAL_BATCH).view(self.world, self.micro, -1)[dist.get_rank()]
            loss = tiny_llama.loss_of(self.forward, ids)
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
            losses.append(loss.item())
        mean = torch.tensor(losses)
        dist.all_reduce(mean)
        return (mean / self.world).tolist()

    def finish(self, losses, **more):
        result = {"losses": losses, "weights": dense_state_dict(self.model), "draw": self.boundary.draw, **more}
        if self.engine is not None:
            result["scale"] = getattr(self.engine.optimizer, "cur_scale", None)
            with contextlib.suppress(Exception):
                self.engine.destroy()
        return result


def save(name, spec):
    """Straight through; the checkpoint is taken on the way."""
    run = Run(spec)
    losses = run.steps(0, SAVE)
    run.checkpoints.save(OUT / "ck" / name, "middle", {"note": [1, "kept"]}, wait=not spec["background"])
    losses += run.steps(SAVE, STEPS)
    run.checkpoints.wait()
    return run.finish(losses)


def resume(source, spec):
    run = Run(spec)
    torch.manual_seed(999)  # what the checkpoint must undo
    _, client = run.checkpoints.load(OUT / "ck" / source)
    return run.finish(run.steps(SAVE, STEPS), client=client)


def link(chain, index):
    """One part of a chain of runs on different numbers of ranks."""
    run = Run(case(CHAINS[chain][index]))
    folder = OUT / "chains" / chain
    if index:
        run.checkpoints.load(folder)
    losses = run.steps(CUTS[index], CUTS[index + 1])
    if index + 1 < len(WORLDS):
        run.checkpoints.save(folder, f"part{index}")
    return run.finish(losses)


def jobs():
    cases = two_rank_cases()
    found = {}
    if PHASE == "save":
        found = {name: lambda n=name: save(n, cases[n]) for name in cases}
    elif PHASE == "resume":
        found = {name: lambda n=name: resume(n, cases[n]) for name in cases}
        found |= {f"{a} -> {b}": lambda a=a, b=b: resume(a, cases[b]) for a, b in CROSSINGS}
    elif PHASE in ("save4", "resume4"):
        four = four_rank_cases()
        act = save if PHASE == "save4" else resume
        found = {name: lambda n=name: act(n, four[n]) for name in four}
    index = {"first": 0, "save": 1, "save4": 2, "last": 3}.get(PHASE)
    if index is not None:
        found |= {f"chain {name}": lambda n=name: link(n, index) for name in CHAINS}
    return found


# DeepSpeed asks oneDNN whether this CPU has fast fp16; torch computes fp16 on any CPU.
get_accelerator().is_fp16_supported = lambda: True
deepspeed.init_distributed("gloo")
wanted = sys.argv[2:]
run_cases({n: j for n, j in jobs().items() if not wanted or n in wanted}, lambda job: job(), OUT / f"{PHASE}.pt")
