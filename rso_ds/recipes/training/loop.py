"""The main job, start to end. ``launch/train.py`` calls it through ``rso_ds.recipes.training.command``."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from rso_ds.checkpoint import Retention, save_dense
from rso_ds.checkpoint.folder import MANIFEST, automatic_tag, has_checkpoints
from rso_ds.comm.agreement import agree_on
from rso_ds.comm.decisions import decided, patiently
from rso_ds.comm.failures import limit_waiting
from rso_ds.comm.outcome import agreed
from rso_ds.comm.rank_context import RankContext
from rso_ds.config import RSOConfig
from rso_ds.engines.observer import Observer
from rso_ds.errors import RSOCheckpointError, RSOConfigError, RSOError
from rso_ds.models import LLAMA_SHAPES
from rso_ds.planning.memory.account import Account, Accountant, model_builder
from rso_ds.planning.memory.peak import peak_memory_bytes
from rso_ds.planning.memory.profile import StepProfiler, report
from rso_ds.planning.memory.states import Engine
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import PackedTokens, token_file
from rso_ds.recipes.data.read_ahead import read_ahead
from rso_ds.recipes.data.tokenization import load_tokenizer, tokenizer_fingerprint
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.engines import build_engine
from rso_ds.recipes.training.fill_json import batch_sizes, fill
from rso_ds.recipes.training.held_out import held_out_loss, perplexity, sample
from rso_ds.recipes.training.metrics import Display, MetricsFile, Waits, per_step, traffic_summary, validation
from rso_ds.recipes.training.model_card import write_card
from rso_ds.recipes.training.monitor import Monitor, check_monitors
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
        self.tokenizer, train_file, held_out_file = self._prepare_data()
        self.train_data = PackedTokens(train_file, args.seq_len, args.seed)
        self.held_out = PackedTokens(held_out_file, args.seq_len)
        self.micro, self.accumulation = batch_sizes(ds_json, args, context.world_size)
        self.tokens_per_step = self.micro * self.accumulation * context.world_size * args.seq_len
        self.steps = self._number_of_steps()
        self._agree_on_data()
        self.ds_json = fill(ds_json, args, context.world_size, self.steps, context.on_gpu)
        if check_monitors(self.ds_json):
            os.environ.setdefault("WANDB_DIR", str(self.output))  # not the working directory
        self.engine = build_engine(args, self.ds_json, len(self.tokenizer), context)
        agreed(lambda: self._write_settings() if context.rank == 0 else None, whose=True)
        self.first_step = self._resume()
        if args.profile_memory and args.engine != "deepspeed":
            raise RSOConfigError("--profile-memory knows where DeepSpeed keeps its state: use --engine deepspeed.")
        if args.profile_memory and self.steps < self.first_step + 2:
            raise RSOConfigError("--profile-memory measures the second step, and this run takes fewer than two.")
        self.batches = read_ahead(self._read, self.first_step, context.device)
        self.waits = Waits()
        self.monitor = Monitor(self.ds_json, self.engine, self.tokens_per_step // args.seq_len)
        self.display = Display(self.steps, self.first_step, context.rank == 0)

    # -- building ------------------------------------------------------------------------------------

    def _prepare_data(self) -> tuple[Any, Path, Path]:
        """Tokenizer and token files. One rank a node makes what is missing while the others wait."""
        cache = Path(self.args.cache).expanduser()

        def load() -> tuple[Any, Path, Path]:
            try:
                tokenizer = load_tokenizer(self._tokenizer_name(), self.corpus, self.args.vocab_size, cache)
                parts = [token_file(self.corpus, part, tokenizer, cache) for part in ("train", "held_out")]
            except RSOError:
                raise
            except Exception as error:
                raise RSOConfigError(
                    f"--data {self.args.data} cannot be prepared: {type(error).__name__}: {error}"
                ) from error
            return tokenizer, parts[0], parts[1]

        work = load if self.context.local_rank == 0 else None
        made = patiently(work, "preparing the data", self.args.timeout, RSOConfigError)
        ready = agreed(lambda: load() if made is None else made, kind=RSOConfigError)
        return ready

    def _write_settings(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.args.save(self.output / "config.yaml")
        (self.output / "deepspeed.json").write_text(json.dumps(self.ds_json, indent=2))

    def _agree_on_data(self) -> None:
        """Ranks read files of their own: another text, tokenizer or length would end in steps that do not match."""
        mine = {
            "training data (tokens)": _of_tokens(self.train_data),
            "held-out data (tokens)": _of_tokens(self.held_out),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "number of steps": self.steps,
            "batch": [self.micro, self.accumulation, self.args.seq_len, self.args.seed],
        }
        agree_on(mine, "Give every rank the same --data, --tokenizer, --cache and flags.")

    def _tokenizer_name(self) -> str | None:
        """``--tokenizer``, else the model's own where its weights are used, else None (train a BPE)."""
        args = self.args
        if args.tokenizer is not None or args.model in LLAMA_SHAPES or args.init == "random":
            return args.tokenizer
        return args.model

    def _number_of_steps(self) -> int:
        if self.args.max_steps is not None:
            return self.args.max_steps
        tokens = self.args.train_tokens or self.train_data.count * self.args.seq_len
        return max(1, tokens // self.tokens_per_step)

    # -- checkpoints ---------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the data that the first one would have seen."""
        return {
            "seed": self.args.seed,
            "seq_len": self.args.seq_len,
            "sequences_per_step": self.tokens_per_step // self.args.seq_len,
            "data": self.corpus.fingerprint(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "steps": self.steps,
        }

    def _resume(self) -> int:
        """Load the checkpoint that ``--resume`` names; returns the number of steps already taken."""
        wanted = self.args.resume
        if wanted is None:
            return 0
        folder, tag = self.output / "checkpoints" if wanted == "auto" else Path(wanted), None
        if wanted == "auto":
            found, tag, remark = decided(lambda: (has_checkpoints(folder), *automatic_tag(folder)))
            if self.context.rank == 0 and remark:
                print(f"--resume auto: {remark}", flush=True)
            if not found:
                return 0
        if decided(lambda: (folder / MANIFEST).is_file()):
            folder, tag = folder.parent, folder.name

        def same_run(client: dict[str, Any]) -> None:
            if "run" not in client:
                raise RSOCheckpointError(f"--resume {wanted}: it was not saved by train.py.")
            for key, value in self._identity().items():
                if client["run"].get(key) != value:
                    raise RSOCheckpointError(
                        f"--resume {wanted}: that run had {key} = {client['run'].get(key)!r}, this one {value!r}: the"
                        " data would not continue where it stopped. Use the same settings, or start anew without"
                        " --resume."
                    )

        path, client = self.engine.checkpoints.load(folder, tag, same_run)
        if self.context.rank == 0:
            print(f"--resume {wanted}: continuing from {path}, after step {client['step']}", flush=True)
        return int(client["step"])

    def _save(self, step: int, score: float) -> None:
        background = {"wait": False} if self.args.async_save else {}
        with self.engine.traffic.phase("other"):
            self.engine.checkpoints.save(
                self.output / "checkpoints",
                f"step{step}",
                {"step": step, "run": self._identity()},
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

    def _train(self, interruption: Interruption) -> bool:
        args, engine, display = self.args, self.engine, self.display
        metrics = (
            MetricsFile(self.output / "metrics.jsonl", self.first_step if self.first_step else None)
            if self.context.rank == 0
            else None
        )
        display.say(
            f"{args.model}: {self.steps} steps of {self.tokens_per_step:,} tokens on {self.context.world_size} ranks,"
            f" micro batch {self.micro} x accumulation {self.accumulation};"
            f" {len(self.train_data.tokens):,} training and {len(self.held_out.tokens):,} held-out tokens"
        )
        before = self._evaluate()
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
            lr = engine.optimizer.param_groups[0]["lr"]
            evaluate = step == self.steps or (args.eval_interval > 0 and step % args.eval_interval == 0)
            log = step % args.log_interval == 0 or evaluate or step == self.first_step + 1
            if observer and log:
                observer.watch_step()
            skipped_before = engine.skipped_steps
            own_loss = self._train_step(step - 1)
            loss, stop, skipped = sync(own_loss, interruption.requested, engine.skipped_steps > skipped_before)
            watch.after(step, loss, skipped)
            if log:
                taken = step - window_first
                elapsed = time.monotonic() - window_start
                record = {
                    "step": step,
                    "loss": watch.window(),
                    "lr": lr,
                    "tokens": step * self.tokens_per_step,
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

    def _read(self, step: int) -> torch.Tensor:
        context = self.context
        return self.train_data.micro_batches(step, self.accumulation, context.world_size, context.rank, self.micro)

    def _train_step(self, step: int) -> float:
        with self.waits.of("data"):
            ids = next(self.batches)
        losses = []
        for i, micro in enumerate(ids):
            if self.args.profile_memory and step == self.first_step + 1 and i == 0:
                loss = self._profiled(micro)
            else:
                loss = self._forward(micro)
                self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).double().mean())  # a GPU is waited for once a step, here

    def _forward(self, micro: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.engine(input_ids=micro, labels=micro, use_cache=False).loss
        return loss

    def _profiled(self, micro: torch.Tensor) -> torch.Tensor:
        """One micro batch with its memory measured; rank 0 prints it beside the model and writes memory.json."""
        profiler = StepProfiler(self.engine, self.args.gradient_checkpointing)
        with profiler:
            loss = profiler.forward(lambda: self._forward(micro))
            self.engine.backward(loss)
        if self.context.rank == 0:
            text, details = report(profiler.result, self._account())
            (self.output / "memory.json").write_text(json.dumps(details, indent=2))
            self.display.say(text)
        return loss

    def _account(self) -> Account:
        """What ``rso-ds memory`` says about this run."""
        is_rso = hasattr(self.engine, "rso")
        accountant = Accountant(
            model_builder(self.engine.module.config),
            self.engine.rso.config if is_rso else RSOConfig(),
            Engine.from_json(self.ds_json, self.context.world_size),
            self.args.gradient_checkpointing,
        )
        return accountant.account("rso" if is_rso else "adamw", self.micro, self.args.seq_len)

    def _evaluate(self) -> float:
        with self.engine.traffic.phase("evaluation"):
            return held_out_loss(self.engine, self.held_out, self.args.eval_tokens, self.micro, self.context)

    def _finish(self, before: float, after: float) -> None:
        folder = self.output / "model"
        if hasattr(self.engine, "rso") and self.engine.rso.config.communicate == "boundary":
            self.engine.rso.average_replicas()
            after = self._evaluate()  # of the one model that is saved, not the mean over the ranks' own
        with self.engine.traffic.phase("other"):
            save_dense(self.engine.module, folder, self.context.rank)
        work = (lambda: self._present(folder, before, after)) if self.context.rank == 0 else None
        patiently(work, "writing the model's files and a sample of text", self.args.timeout)

    def _present(self, folder: Path, before: float, after: float) -> None:
        """What rank 0 alone leaves behind at the end."""
        self._report_traffic()
        self.tokenizer.save_pretrained(folder)
        self._write_card(folder, after)
        if self.args.sample_tokens:
            from transformers import AutoModelForCausalLM

            prompt = self.args.prompt or self.tokenizer.decode(self.held_out.tokens[:16].tolist())
            model = AutoModelForCausalLM.from_pretrained(folder)
            text = sample(model, self.tokenizer, prompt, self.args.sample_tokens, self.args.seed)
            self.display.say(f"--- sample\n{text}\n---")
        self.display.say(
            f"held-out perplexity {perplexity(before):.2f} -> {perplexity(after):.2f}"
            f" (loss {before:.4f} -> {after:.4f})\nmodel: {folder}   metrics: {self.output / 'metrics.jsonl'}"
        )

    def _write_card(self, folder: Path, loss: float) -> None:
        args = self.args
        recipe = {
            "data": Path(args.data).name, "steps": self.steps, "sequence length": args.seq_len,
            "tokens a step": self.tokens_per_step, "engine": args.engine, "ranks": self.context.world_size,
            "optimizer": self.ds_json["optimizer"]["type"], "learning rate": self.ds_json["optimizer"]["params"]["lr"],
            "seed": args.seed,
        }  # fmt: skip
        scores = validation(loss)
        base = None if args.model in LLAMA_SHAPES or args.init == "random" else args.model
        rso = self.engine.rso.config if hasattr(self.engine, "rso") else None
        write_card(folder, {"shape": args.model, **recipe} if base is None else recipe, scores, rso, base)

    def _report_traffic(self) -> None:
        """Everything that rank 0 sent, on the screen and in ``comm.json``."""
        traffic, taken = self.engine.traffic, self.steps - self.first_step
        details = {"ranks": self.context.world_size, "nodes": traffic.node_count, "steps": taken}
        (self.output / "comm.json").write_text(json.dumps({**details, "traffic": traffic.table()}, indent=2))
        self.display.say(traffic_summary(traffic, taken))


def _of_tokens(data: PackedTokens) -> list[int]:
    """Length and a checksum of a share of the tokens, without reading all of a large file."""
    tokens = data.tokens
    some = tokens[:: max(1, len(tokens) // 100_000)]
    return [len(tokens), zlib.crc32(some.tobytes())]
