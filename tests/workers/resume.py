"""One rank of one set of processes: saves runs, or continues them, as the first word of the case says."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.resume_cases import (
    CHAINS,
    CUTS,
    GLOBAL_BATCH,
    SAVE,
    STEPS,
    WORLDS,
    case,
    four_rank_cases,
    two_rank_cases,
)
from deepspeed.runtime.lr_schedules import WarmupLR
from support import tiny_llama
from support.fp16 import fp16_on_any_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.checkpoint.stored_model import StoredModel
from rso_ds.checkpoint.transaction import read_checkpoint

CASES = two_rank_cases() | four_rank_cases()
SCHEDULE = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear"}
CLIP = 0.5


class Run:
    """A run under any engine: ``steps``, ``checkpoints``, ``weights``."""

    def __init__(self, spec, weights=None):
        self.spec, self.world = spec, dist.get_world_size()
        self.micro = GLOBAL_BATCH // self.world
        self.model = tiny_llama.build(spec["intermediate"], moe=spec["moe"])
        if weights is not None:
            self.model.load_state_dict(weights)
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


def save(folder, name):
    """Straight through; the checkpoint is taken on the way."""
    spec = CASES[name]
    run = Run(spec)
    losses = run.steps(0, SAVE)
    run.checkpoints.save(folder / "ck" / name, "middle", {"note": [1, "kept"]}, wait=not spec["background"])
    losses += run.steps(SAVE, STEPS)
    run.checkpoints.wait()
    return run.finish(losses)


def resume(folder, source, target):
    run = Run(CASES[target])
    torch.manual_seed(999)  # what the checkpoint must undo
    _, client = run.checkpoints.load(folder / "ck" / source)
    return run.finish(run.steps(SAVE, STEPS), client=client)


def solver_memory(run):
    """The moments that this rank holds, and the solver's counts of steps."""
    state = run.checkpoints._state
    moments = [piece.flat for name, piece in state.pieces().items() if "moment" in name.partition(".")[0]]
    return moments, [state.layout.solver_step(param) for _, param in state._trainable()]


def solver_forgotten(folder, source, target):
    """Loaded without the solver's state; or wholly (where the target is the source), and then deprived of it."""
    run = Run(CASES[target])
    run.steps(0, 2)
    run.checkpoints.load(folder / "ck" / source, solver=False)
    moments, steps = solver_memory(run)
    assert moments
    assert not any(moment.any() for moment in moments)
    assert not any(steps)
    losses = run.steps(SAVE, STEPS)
    if target != source:
        return run.finish(losses)
    other = Run(CASES[target])
    other.checkpoints.load(folder / "ck" / source)
    for moment in solver_memory(other)[0]:
        moment.zero_()
    for _, param in other.checkpoints._state._trainable():
        other.checkpoints._state.layout.set_solver_step(param, 0)
    return run.finish(losses, expected=other.finish(other.steps(SAVE, STEPS)))


def weights_taken(folder, source, target):
    """A run that begins with the weights of a checkpoint, and one whose model has them from the start."""
    path, state, _ = read_checkpoint(folder / "ck" / source)
    stored = StoredModel(path, state)
    expected = Run(CASES[target], {name: stored.value(name) for name in stored.names()})
    losses = expected.steps(SAVE, STEPS)
    expected = expected.finish(losses)
    run = Run(CASES[target])
    run.steps(0, 4)
    run.checkpoints.load_weights(folder / "ck" / source)
    moments, steps = solver_memory(run)
    assert moments
    assert not any(moment.any() for moment in moments)
    assert not any(steps)
    assert (run.boundary.applied_steps, run.boundary.draw) == (0, 0)
    again = Run(CASES[target])
    again.checkpoints.load_weights(folder / "ck" / source)
    return again.finish(again.steps(SAVE, STEPS), expected=expected)


def schedule_kept(folder, source):
    """``load_lr_scheduler_states=False`` of DeepSpeed's own method."""
    run = Run(CASES[source])
    before = run.engine.lr_scheduler.state_dict()
    run.engine.load_checkpoint(str(folder / "ck" / source), load_lr_scheduler_states=False)
    kept = run.engine.lr_scheduler.state_dict() == before
    run.engine.load_checkpoint(str(folder / "ck" / source))
    return {"kept": kept, "moved": run.engine.lr_scheduler.state_dict() != before}


def link(folder, chain, index):
    """One part of a chain of runs on different numbers of ranks."""
    run = Run(case(CHAINS[chain][index]))
    folder = folder / "chains" / chain
    if index:
        run.checkpoints.load(folder)
    losses = run.steps(CUTS[index], CUTS[index + 1])
    if index + 1 < len(WORLDS):
        run.checkpoints.save(folder, f"part{index}")
    return run.finish(losses)


def run(case: str, folder: Path) -> dict[str, Any]:
    """``case``: "save NAME", "resume NAME", "resume SAVED -> NAME", "weights SAVED -> NAME", "unsolved SAVED -> NAME",
    "schedule NAME", or "N of CHAIN", the Nth part of a run."""
    act, _, name = case.partition(" ")
    with fp16_on_any_cpu():
        if act == "save":
            return save(folder, name)
        if act == "resume":
            source, _, target = name.partition(" -> ")
            return resume(folder, source, target or source)
        if act == "schedule":
            return schedule_kept(folder, name)
        if act in ("weights", "unsolved"):
            source, _, target = name.partition(" -> ")
            return (weights_taken if act == "weights" else solver_forgotten)(folder, source, target)
        return link(folder, name.removeprefix("of "), int(act))
