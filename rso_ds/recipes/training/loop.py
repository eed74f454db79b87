"""The main job, start to end. ``launch/train.py`` calls it through ``rso_ds.recipes.training.command``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rso_ds.checkpoint import Retention, save_dense
from rso_ds.checkpoint.folder import has_checkpoints
from rso_ds.comm.agreement import agree_on
from rso_ds.comm.decisions import decided, first_on_each_node, patiently
from rso_ds.comm.failures import limit_waiting
from rso_ds.comm.outcome import agreed
from rso_ds.comm.rank_context import RankContext
from rso_ds.engines.observer import Observer
from rso_ds.errors import RSOConfigError, RSOError
from rso_ds.models import Start, check_length, check_tokens, find_start, rows_needed
from rso_ds.planning.memory.peak import peak_memory_bytes
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.data import prepare
from rso_ds.recipes.training.ending import sample_text, write_model_card, write_traffic
from rso_ds.recipes.training.engines import build_engine
from rso_ds.recipes.training.fill_json import batch_sizes, fill, recipe_of
from rso_ds.recipes.training.held_out import held_out_loss, perplexity
from rso_ds.recipes.training.memory_profile import MemoryProfile, check_profile
from rso_ds.recipes.training.metrics import Display, MetricsFile, Waits, per_step, rates_of, validation
from rso_ds.recipes.training.monitor import Monitor, check_monitors
from rso_ds.recipes.training.resume import FORMAT, changed_settings, check_same_run, find_resume_point
from rso_ds.recipes.training.schedule import Schedule, ScheduleShape, check_rates, follow, shape
from rso_ds.recipes.training.signals import EXIT_REQUEUE, Interruption
from rso_ds.recipes.training.steps import StepSync, StepWatch


class Job:
    """One training run: everything is built in ``__init__``, ``run`` trains."""

    def __init__(self, args: TrainArguments, ds_json: dict[str, Any], corpus: Corpus, context: RankContext) -> None:
        self.args, self.context, self.corpus = args, context, corpus
        self.output = Path(args.output)
        if args.resume is None and decided(lambda: has_checkpoints(self.output / "checkpoints")):
            raise RSOConfigError(
                f"--output {self.output} holds checkpoints of an earlier run: continue it with --resume auto, or give"
                " another --output."
            )
        self.start = first_on_each_node(
            self._find_start, "looking at --model", args.timeout, context.local_rank, RSOConfigError
        )
        warning = check_length(self.start.config, self.start.positions, args.seq_len, "--seq-len")
        if context.rank == 0:
            print("\n".join(filter(None, (self.start.text(), warning))), flush=True)
        self.data = prepare(args, corpus, context, self._rows)
        if context.rank == 0:
            print(self.data.description.text(), flush=True)
        self.tokenizer, self.held_out = self.data.tokenizer, self.data.held_out
        self.micro, self.accumulation = batch_sizes(ds_json, args, context.world_size)
        self.batch = self.micro * self.accumulation * context.world_size
        self.tokens_per_step = self.batch * args.seq_len
        self._agree_on_data()
        if args.keep_best and self.held_out is None:
            raise RSOConfigError("--keep-best chooses by the held-out loss, and nothing is held out: drop one of them.")
        self.point = find_resume_point(args, self.output, context.rank == 0)
        if self.point is not None:
            check_same_run(self.point, {**self.data.identity, **self._order()}, args.resume_new_batch)
        self.first_step = self.point.step if self.point else 0
        self.first_sequence: int = self.point.position["sequences"] if self.point else 0
        self.steps = self._number_of_steps()
        # Interval and rates follow the length that the run was first meant to have, however it is extended.
        self.planned: int = self.point.run["planned"] if self.point else self.steps
        self.schedule_steps = self.steps
        if self.point is not None and args.resume_schedule == "continue":
            self.schedule_steps = int(self.point.run["schedule_steps"])
        before = {} if self.point is None else {"lr": self.point.run["lr"], **self.point.run.get("recipe", {})}
        self.ds_json = fill(
            ds_json, args, context.world_size, self.planned, context.on_gpu, self.schedule_steps, before
        )
        self._choose_schedule()
        if check_monitors(self.ds_json):
            os.environ.setdefault("WANDB_DIR", str(self.output))  # not the working directory
        check_profile(args, self.steps - self.first_step)
        shape = (self.accumulation, context.world_size, context.rank, self.micro)
        position = None if self.point is None else self.point.position
        self.batches = self.data.batches(shape, position, context.device)
        self.profile = MemoryProfile(args, context)
        try:
            with self.profile.peaks("start"):
                rows = self._rows(self.tokenizer)
                self.engine = build_engine(args, self.ds_json, self.start, rows, context, self.schedule)
                self._resume()
            self.profile.built(self.engine, self.ds_json, self.micro)
            agreed(lambda: self._write_settings() if context.rank == 0 else None, whose=True)
        except BaseException:
            self.batches.close()
            raise
        self.waits = Waits()
        self.monitor = Monitor(self.ds_json, self.engine, self.tokens_per_step // args.seq_len)
        self.display = Display(self.steps, self.first_step, context.rank == 0)

    # -- building ------------------------------------------------------------------------------------

    def _find_start(self) -> Start:
        return find_start(self.args.model, init=self.args.init, trust_remote_code=self.args.trust_remote_code)

    def _rows(self, tokenizer: Any) -> int:
        """Embeddings that the model is to have. Raises ``RSOConfigError`` if it has too few for ``tokenizer``."""
        if self.start.config is None:
            return rows_needed(tokenizer)
        remedy = "; a BPE as large as the model's vocabulary is made with --vocab-size"
        if self.args.tokenizer is not None or self.start.weights is not None:
            remedy = "; the model's own tokenizer is another remedy (--tokenizer)"
        return check_tokens(self.start.config, tokenizer, self.args.resize_embeddings, remedy)

    def _write_settings(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        if self.point is not None:
            for change in changed_settings(self.point, self.args, self.ds_json):
                print(f"--resume {self.point.wanted}, with another {change}", flush=True)
        description = json.dumps(self.data.description.to_dict(), indent=2)
        (self.output / "data.json").write_text(description, encoding="utf-8")
        self.args.save(self.output / "config.yaml")
        (self.output / "deepspeed.json").write_text(json.dumps(self.ds_json, indent=2))

    def _agree_on_data(self) -> None:
        """Ranks read files of their own: another text, tokenizer or length would end in steps that do not match."""
        mine = {
            "start of the model": self.start.mark(),
            **self.data.to_agree_on(),
            "number of steps": [self.args.max_steps, self.args.train_tokens],
            "batch": [self.micro, self.accumulation, self.args.seq_len, self.args.seed],
            "schedule": [getattr(self.args, key) for key in ("lr_schedule", "warmup", "decay_share", "final_lr")],
        }
        agree_on(mine, "Give every rank the same --model, --data, --tokenizer, --cache and flags.")

    def _choose_schedule(self) -> None:
        """Ours, unless the JSON has one, with the settings that ``config.yaml`` shows."""
        args = self.args
        self.schedule: Schedule | None = None
        self.shape: ScheduleShape | None = None
        if "scheduler" not in self.ds_json:
            before = None if self.point is None else self.point.run.get("schedule")
            self.shape = shape(args.lr_schedule, args.warmup, args.decay_share, args.final_lr, before)
            self.schedule = self.shape.of_length(self.schedule_steps)
            chosen = dataclasses.asdict(self.shape)
            self.args = dataclasses.replace(args, lr_schedule=chosen.pop("kind"), **chosen)
        lines = check_rates(self.ds_json, self.schedule, self.first_step + 1, self.steps)
        if self.context.rank == 0:
            print(lines, flush=True)

    def _number_of_steps(self) -> int:
        """In all: as many as are asked for, or as the tokens that are left of --train-tokens, or of an epoch, make."""
        args, done, seen = self.args, self.first_step, self.first_sequence * self.args.seq_len
        if args.max_steps is not None:
            if self.point is not None and args.max_steps < done:
                raise self.point.refuse(
                    f"{done} steps have been taken already, and this run is to have {args.max_steps} in all."
                )
            return args.max_steps
        if args.train_tokens is not None:
            tokens = args.train_tokens
        elif self.data.packed is not None:
            tokens = self.data.packed.count * args.seq_len
        else:
            raise RSOConfigError("a stream has no end: give --max-steps or --train-tokens.")
        if self.point is not None and tokens < seen:
            what = "--train-tokens is" if args.train_tokens else "an epoch has"
            raise self.point.refuse(f"{seen:,} tokens have been trained on already, and {what} {tokens:,}: give more.")
        return done + max(0 if done else 1, (tokens - seen) // self.tokens_per_step)

    # -- checkpoints ---------------------------------------------------------------------------------

    def _order(self) -> dict[str, Any]:
        """What the order of the data depends on, beside the data."""
        return {"seed": self.args.seed, "seq_len": self.args.seq_len, "sequences_per_step": self.batch}

    def _about_run(self) -> dict[str, Any]:
        """What a resumed run is compared with."""
        lengths = {"steps": self.steps, "planned": self.planned, "schedule_steps": self.schedule_steps}
        schedule = None if self.shape is None else dataclasses.asdict(self.shape)
        rates = {"lr": self._peak_rate(), "recipe": recipe_of(self.ds_json), "schedule": schedule}
        return {"format": FORMAT, **self.data.identity, **self._order(), **lengths, **rates}

    def _peak_rate(self) -> float:
        return float(self.ds_json["optimizer"]["params"]["lr"])

    def _resume(self) -> None:
        """Load the checkpoint of ``self.point``."""
        point = self.point
        if point is None:
            return
        path, _ = self.engine.checkpoints.load(point.folder, point.tag)
        if self.context.rank == 0:
            print(f"--resume {point.wanted}: continuing from {path}, after step {point.step}", flush=True)
        scheduler = getattr(self.engine, "lr_scheduler", None) or getattr(self.engine, "scheduler", None)
        changed = (point.run["schedule_steps"], point.run["lr"]) != (self.schedule_steps, self._peak_rate())
        if scheduler is not None:
            follow(scheduler, changed)

    def _save(self, step: int, score: float) -> None:
        background = {"wait": False} if self.args.async_save else {}
        with self.engine.traffic.phase("other"), self.profile.peaks("save"):
            self.engine.checkpoints.save(
                self.output / "checkpoints",
                f"step{step}",
                {"step": step, "position": self.batches.position(), "run": self._about_run()},
                keep=Retention(self.args.keep_last, self.args.keep_best),
                score=score if math.isfinite(score) else None,
                model_files=self.tokenizer.save_pretrained,
                **background,
            )
        if background:
            limit_waiting(timedelta(seconds=self.args.timeout))  # its process group exists from now on

    # -- training ------------------------------------------------------------------------------------

    def run(self, interruption: Interruption) -> bool:
        """Train to the last step, unless a signal comes: then save and return False."""
        try:
            return self._train(interruption)
        finally:
            self.monitor.close()
            self.batches.close()

    def _train(self, interruption: Interruption) -> bool:
        args, engine, display = self.args, self.engine, self.display
        metrics = (
            MetricsFile(self.output / "metrics.jsonl", self.first_step if self.first_step else None)
            if self.context.rank == 0
            else None
        )
        display.say(
            f"{args.model}: {self.steps} steps of {self.tokens_per_step:,} tokens on {self.context.world_size} ranks,"
            f" micro batch {self.micro} x accumulation {self.accumulation}"
        )
        before = self._evaluate()
        if self.held_out is not None:
            display.say(f"held-out before: loss {before:.4f}, perplexity {perplexity(before):.2f}")
            if metrics and self.first_step == 0:
                metrics.write({"step": 0, "tokens": 0, **validation(before)})
        engine.train()
        observer = Observer(engine.rso) if hasattr(engine, "rso") else None
        sync = StepSync(self.context, engine.traffic, args.timeout)
        watch = StepWatch(args.max_skipped, self.output / "checkpoints")
        window_start, window_first = time.monotonic(), self.first_step
        sent, crossed = engine.traffic.by_kind(), engine.traffic.by_kind("inter-node")
        after = before
        for step in range(self.first_step + 1, self.steps + 1):
            rates = rates_of(engine.optimizer)
            last = step == self.steps
            evaluate = self.held_out is not None and (
                last or (args.eval_interval > 0 and step % args.eval_interval == 0)
            )
            log = last or step % args.log_interval == 0 or evaluate or step == self.first_step + 1
            if observer and log:
                observer.watch_step()
            skipped_before = engine.skipped_steps
            with self.profile.peaks("training"):
                own_loss = self._train_step(step)
            loss, stop, skipped = sync(own_loss, interruption.requested, engine.skipped_steps > skipped_before)
            watch.after(step, loss, skipped)
            if log:
                taken = step - window_first
                elapsed = time.monotonic() - window_start
                record = {
                    "step": step,
                    "loss": watch.window(),
                    **rates,
                    "tokens": self._tokens_by(step),
                    "tokens_per_second": taken * self.tokens_per_step / elapsed,
                    "comm_bytes": per_step(engine.traffic.by_kind(), sent, taken),
                    "peak_memory_bytes": peak_memory_bytes(),
                    "skipped_steps": engine.skipped_steps,
                }
                if engine.traffic.node_count > 1:
                    record["comm_bytes_inter_node"] = per_step(engine.traffic.by_kind("inter-node"), crossed, taken)
                if evaluate:
                    with self.waits.of("evaluation"):
                        after = self._evaluate()
                    record |= validation(after)
                if observer:
                    record |= observer.record()
                record["waited_seconds"] = self.waits.take()
                with self.waits.of("records"):
                    if metrics:
                        metrics.write(record)
                    self.monitor.write(record)
                    display.step(record)
                window_start, window_first = time.monotonic(), step
                sent, crossed = engine.traffic.by_kind(), engine.traffic.by_kind("inter-node")
            if stop or step == self.steps or (args.save_interval and step % args.save_interval == 0):
                saving = time.monotonic()
                if watch.sound:
                    with self.waits.of("checkpoint"):
                        self._save(step, after if evaluate else math.nan)
                window_start += time.monotonic() - saving
            if stop and step < self.steps:
                engine.checkpoints.wait()
                display.close()
                display.say(self._requeue_message(step, interruption, watch))
                return False
        engine.checkpoints.wait()
        display.close()
        if not watch.sound:
            raise RSOError(
                f"the loss is {loss} at the last step: no model was saved. Continue from the newest checkpoint in"
                f" {self.output / 'checkpoints'} with a lower learning rate."
            )
        self._finish(before, after)
        return True

    def _requeue_message(self, step: int, interruption: Interruption, watch: StepWatch) -> str:
        why = interruption.name if interruption.requested else "a signal to another rank"
        saved = f"saved step{step}" if watch.sound else "nothing saved, since the loss of this step is not finite"
        return f"{why}: stopped after step {step}, {saved}; continue with --resume auto (exit status {EXIT_REQUEUE})"

    def _tokens_by(self, step: int) -> int:
        """Tokens trained on by the end of step ``step``."""
        return self.first_sequence * self.args.seq_len + (step - self.first_step) * self.tokens_per_step

    def _train_step(self, step: int) -> float:
        with self.waits.of("data"):
            ids = next(self.batches)
        losses = []
        for i, micro in enumerate(ids):
            if self.args.profile_memory and step == self.first_step + 2 and i == 0:
                loss = self.profile.backward(partial(self._forward, micro), self.display.say)
            else:
                loss = self._forward(micro)
                self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).double().mean())  # a GPU is waited for once a step, here

    def _forward(self, micro: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.engine(input_ids=micro, labels=micro, use_cache=False).loss
        return loss

    def _evaluate(self) -> float:
        """The held-out loss, NaN if nothing is held out."""
        if self.held_out is None:
            return math.nan
        with self.engine.traffic.phase("evaluation"), self.profile.peaks("evaluation"):
            return held_out_loss(self.engine, self.held_out, self.args.eval_tokens, self.micro, self.context)

    def _finish(self, before: float, after: float) -> None:
        folder = self.output / "model"
        if hasattr(self.engine, "rso") and self.engine.rso.config.communicate == "boundary":
            self.engine.rso.average_replicas()
            after = self._evaluate()  # of the one model that is saved, not the mean over the ranks' own
        with self.engine.traffic.phase("other"), self.profile.peaks("save"):
            save_dense(self.engine.module, folder, self.context.rank)
        if self.args.profile_memory:
            self.profile.report_phases(self.display.say)
        work = (lambda: self._present(folder, before, after)) if self.context.rank == 0 else None
        patiently(work, "writing the model's files and a sample of text", self.args.timeout)

    def _present(self, folder: Path, before: float, after: float) -> None:
        """What rank 0 alone leaves behind at the end."""
        args, taken = self.args, self.steps - self.first_step
        self.display.say(write_traffic(self.output, self.engine.traffic, self.context.world_size, taken))
        self.tokenizer.save_pretrained(folder)
        facts = {
            "data": " + ".join(Path(name).name for name in self.data.corpus.names), "steps": self.steps,
            "tokens a step": self.tokens_per_step, "ranks": self.context.world_size,
        }  # fmt: skip
        scores = {} if self.held_out is None else validation(after)
        rso = self.engine.rso.config if hasattr(self.engine, "rso") else None
        write_model_card(folder, args, self.ds_json, facts, scores, rso)
        if args.sample_tokens:
            beginning = str(self.tokenizer.decode(self.data.beginning(16)))
            self.display.say(sample_text(folder, self.tokenizer, args, beginning))
        if self.held_out is not None:
            self.display.say(
                f"held-out perplexity {perplexity(before):.2f} -> {perplexity(after):.2f}"
                f" (loss {before:.4f} -> {after:.4f})"
            )
        self.display.say(f"model: {folder}   metrics: {self.output / 'metrics.jsonl'}")
