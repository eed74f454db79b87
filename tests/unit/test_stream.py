"""The stream: every record once an epoch, in an order that only data, seed and batch decide, exact after any stop."""

import csv
import gzip
import json
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from support import byte_tokenizer
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick

from rso_ds import RSOConfigError
from rso_ds.errors import RSOError
from rso_ds.recipes.data.blocks import BlockOrder, block_texts
from rso_ds.recipes.data.corpus import Corpus, Member
from rso_ds.recipes.data.files import DataFile, local_file
from rso_ds.recipes.data.lanes import LaneReader, StreamPlan, first_places
from rso_ds.recipes.data.mixture import names_and_weights
from rso_ds.recipes.data.sources import Source
from rso_ds.recipes.data.stream import StreamSteps, furthest, lanes_for, lost_reader, plan_stream
from rso_ds.recipes.training.data import Batches

needs("transformers", "datasets", "pyarrow")

SEQ, BATCH, SEED = 48, 16, 5
RECORDS = 700
TOKENIZER = byte_tokenizer.build()


def record(number: int) -> str:
    return f"<{number}> " + "words of many lengths, é and 東 too\n" * (number % 5) + f"{number}\n"


def write(folder: Path, kind: str, numbers=range(RECORDS)) -> Path:
    """The records in files of ``kind`` below ``folder``."""
    rows = [record(n) for n in numbers]
    lines = [json.dumps({"text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        for shard in range(3):
            (folder / f"train-{shard}.jsonl").write_text("\n".join(lines[shard::3]), encoding="utf-8")
    elif kind == "jsonl.gz":
        for shard in range(3):
            (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[shard::3]).encode()))
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps([{"text": text} for text in rows], indent=1))
    elif kind == "csv":
        with open(folder / "a.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([["id", "text"], *enumerate(rows)])
    elif kind == "txt":
        for n, text in zip(numbers, rows, strict=True):
            (folder / f"{n}.txt").write_text(text, encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": rows}), folder / "a.parquet", row_group_size=RECORDS if "one" in kind else 90)
    return folder


def plan_of(source, weights=None, held_out=0.0, batch=BATCH):
    names = [str(s) for s in source] if isinstance(source, list) else str(source)
    return plan_stream(Corpus(names, held_out).streamed(), weights, TOKENIZER, SEQ, SEED, lanes_for(batch))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write(tmp_path_factory.mktemp("stream"), "jsonl"))


def run(plan, steps, ranks=1, micro=1, taken=0, places=None, batch=BATCH, workers=0):
    """(ids of each step [batch, SEQ], sorted; where the lanes go on), from all ranks together."""
    shapes = [(batch // ranks // micro, ranks, rank, micro) for rank in range(ranks)]
    streams = [StreamSteps(plan, shape, taken, places, workers) for shape in shapes]
    out, last = [], places
    for _ in range(steps):
        parts = [stream.next() for stream in streams]
        rows = torch.cat([tokens.view(-1, SEQ) for tokens, _ in parts]).numpy()
        out.append(rows[np.lexsort(rows.T)])
        last = furthest([p for _, p in parts])
    for stream in streams:
        stream.close()
    return out, last


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def epoch_of(plan):
    """The records of each lane, one after the other, until it is in its second epoch."""
    (order,) = plan.orders
    for lane in range(plan.lanes):
        reader = LaneReader(plan, first_places(plan.lanes, 1), 0)
        ids, number, block = [], lane, 0
        while block * plan.lanes + lane < order.count:
            ids += reader.sequence(number).tolist()
            number, block = number + plan.lanes, reader.places(lane)[0][0]
        yield from TOKENIZER.decode(ids).split("<|endoftext|>")[:-1]  # the last may be cut


# -- what is in it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "txt", "parquet", "one row group"])
def test_an_epoch_has_every_record_once_and_whole(tmp_path, kind):
    """Lanes are read until each is in its second epoch; what they had in the first is the data, record for record."""
    plan = plan_of(write(tmp_path / "data", kind))
    (order,) = plan.orders
    assert order.count >= plan.lanes
    seen = Counter(epoch_of(plan))
    assert set(seen) == {record(n) for n in range(RECORDS)}
    beyond = seen - Counter(set(seen))
    assert sum(beyond.values()) <= plan.lanes * max(1, RECORDS // order.count)  # of the second epoch's first blocks


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "latin.txt", "b.txt"])
def test_held_out_lines_of_a_plain_text_never_train(tmp_path, name):
    """Of a long one, which is a document for each 64 KiB wherever it is cut into blocks; and of a folder of texts."""
    encoding = "cp1252" if "latin" in name else "utf-8"
    numbers = iter(range(10**6))
    for copy in range(60 if name == "b.txt" else 1):
        raw = "".join(f"<{next(numbers)}> é {'words ' * 9}\n" for _ in range(900 if name == "b.txt" else 60_000))
        path = tmp_path / f"{copy}{name}"
        path.write_bytes(gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode(encoding))
    corpus = Corpus(str(tmp_path), 0.1, encoding=encoding).streamed()
    held_out, train = (set("".join(corpus.documents(part)).splitlines()) for part in ("held_out", "train"))
    assert held_out
    assert not held_out & train
    assert len(held_out | train) == next(numbers)
    plan = plan_stream(corpus, None, TOKENIZER, SEQ, SEED, 16)
    (member,) = plan.members
    streamed = set()
    for place in range(plan.orders[0].count):
        block, _ = plan.orders[0].block(place)
        file = member.source.train[block.file]
        for text in block_texts(file, block, "", encoding):
            streamed |= set(member.split.part(text, held_out=False).splitlines())
    assert streamed == train


def test_files_of_the_hub_are_read_from_their_start(tmp_path):
    """As any file of another machine: a file system in memory stands for it."""
    folder = write(tmp_path / "a", "jsonl.gz", range(400))
    write(folder, "parquet", range(400, RECORDS))
    remote = fsspec.filesystem("memory")
    files = []
    for path in sorted(folder.iterdir()):
        remote.pipe_file(f"/hub/{path.name}", path.read_bytes())
        own = local_file(path)
        files.append(DataFile(f"memory://hub/{path.name}", own.name, own.size, own.kind, own.compression))
    member = Member(Source("org/name", tuple(files)), 0.0, "text", "utf-8")
    order = BlockOrder(files, "utf-8", BATCH, SEED)
    plan = StreamPlan([member], [1.0], TOKENIZER, SEQ, SEED, BATCH, [order])
    assert set(epoch_of(plan)) == {record(n) for n in range(RECORDS)}
    whole, _ = run(plan, 30)
    begun, places = run(plan, 11)
    assert same(begun + run(plan, 19, ranks=2, taken=11 * BATCH, places=places)[0], whole)


def test_epochs_have_other_orders(plan):
    (order,) = plan.orders
    first, second = ([order.block(e * order.count + i)[0] for i in range(order.count)] for e in (0, 1))
    assert first != second
    assert set(first) == set(second)
    assert first != sorted(first, key=lambda b: (b.file, b.part))


def test_the_seed_changes_the_order_and_nothing_else(plan, tmp_path):
    import dataclasses

    other = dataclasses.replace(plan, seed=SEED + 1)
    assert not same(run(plan, 1)[0], run(other, 1)[0])


def test_held_out_records_never_train(tmp_path):
    folder = write(tmp_path / "data", "jsonl")
    plan = plan_of(folder, held_out=0.2)
    held_out = set(Corpus(str(folder), 0.2).documents("held_out"))
    assert 80 < len(held_out) < 200
    seen = set(epoch_of(plan))
    assert not seen & held_out
    assert seen | held_out == {record(n) for n in range(RECORDS)}


# -- the same for any readers --------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (4, 2), (16, 1)])
def test_steps_are_the_same_on_any_number_of_ranks(plan, ranks, micro):
    assert same(run(plan, 6)[0], run(plan, 6, ranks, micro)[0])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stop", quick([1, 7, 23], {7}))
def test_a_stream_goes_on_exactly_on_any_number_of_ranks(plan, stop, ranks):
    """Also over the end of an epoch: an epoch has some 90 steps."""
    whole, _ = run(plan, 120)
    begun, places = run(plan, stop, ranks=2)
    again, places = run(plan, 80, ranks, taken=stop * BATCH, places=places)
    rest, _ = run(plan, 40 - stop, taken=(stop + 80) * BATCH, places=places)
    assert same(begun + again + rest, whole)


def test_a_stream_goes_on_with_another_batch(plan):
    """The same sequences one after the other, in steps of 16 and then of 24 or 10, on ranks that share lanes."""
    whole = np.concatenate(run(plan, 30)[0])
    begun, places = run(plan, 6)
    more, places = run(plan, 10, ranks=2, taken=6 * 16, places=places, batch=24)
    rest, _ = run(plan, 14, ranks=2, taken=6 * 16 + 240, places=places, batch=10)
    rows = np.concatenate([*begun, *more, *rest])
    assert len(rows) <= len(whole)
    assert Counter(map(bytes, rows)) <= Counter(map(bytes, whole))
    assert len(rows) == 6 * 16 + 240 + 140


def test_other_data_at_the_place_of_the_stop_are_noticed(tmp_path):
    folder = write(tmp_path / "data", "jsonl")
    _, places = run(plan_of(folder), 5)
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("lengths", "breadth"))
    with pytest.raises(RSOConfigError, match="the text at the place where this run stopped is another"):
        run(plan_of(folder), 1, taken=5 * BATCH, places=places)


@pytest.mark.parametrize("processes", quick([1, 2], {1}))
def test_processes_read_the_same_and_are_deaf_to_a_scheduler(plan, processes):
    """SIGTERM goes to all processes of a job; the one that trains still needs data until it has saved."""
    whole, _ = run(plan, 30)
    before = set(multiprocessing.active_children())
    stream = StreamSteps(plan, (BATCH, 1, 0, 1), 0, None, processes)
    children = set(multiprocessing.active_children()) - before
    assert len(children) == processes
    got = []
    for step in range(30):
        if step == 2:
            for child in children:
                os.kill(child.pid, signal.SIGTERM)
        rows = stream.next()[0].view(-1, SEQ).numpy()
        got.append(rows[np.lexsort(rows.T)])
    assert same(got, whole)
    os.kill(min(child.pid for child in children), signal.SIGKILL)
    with pytest.raises(RSOError, match="a process that reads --data is gone"):
        list(iter(stream.next, None))
    stream.close()


@EXHAUSTIVE
def test_readers_end_with_the_process_that_started_them(plan):
    """Killed while they still start, and when they read: nobody is left who could tell them."""
    for after in (0.3, 15.0):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=start_readers, args=(plan, theirs))
        process.start()
        readers = ours.recv()
        time.sleep(after)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        end = time.monotonic() + 60
        while any(Path(f"/proc/{pid}/stat").exists() for pid in readers) and time.monotonic() < end:
            time.sleep(0.2)
        assert not [pid for pid in readers if Path(f"/proc/{pid}/stat").exists()]


def start_readers(plan, pipe):
    before = set(multiprocessing.active_children())
    stream = StreamSteps(plan, (BATCH, 1, 0, 1), 0, None, 1)
    pipe.send([child.pid for child in set(multiprocessing.active_children()) - before])
    time.sleep(600)
    stream.next()


def test_the_words_for_a_lost_reader():
    said = lost_reader(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"))
    assert said is not None
    assert said.endswith("is gone (out of memory?): DataLoader worker (pid 7) is killed by signal: Killed.")
    assert lost_reader(RuntimeError("another")) is None


def test_unreadable_data_end_with_the_message_alone(tmp_path):
    folder = write(tmp_path / "data", "jsonl")
    with open(folder / "train-1.jsonl", "a") as f:
        f.write('\n{"body": 1}\n')
    with pytest.raises(RSOConfigError, match=r"train-1.jsonl, line 234: no key 'text' \(there are body\)"):
        run(plan_of(folder), 100)


def test_steps_read_ahead_do_not_count_as_taken(plan):
    """The position saved after step 3 is that of step 3, though step 4 has been read."""
    batches = Batches(StreamSteps(plan, (BATCH, 1, 0, 1), 0, None, 0), (BATCH, 1, 0, 1), 0, torch.device("cpu"))
    for _ in range(3):
        next(batches)
    position = batches.position()
    batches.close()
    assert position["sequences"] == 3 * BATCH
    places = position["stream"]["places"].numpy()
    assert same(run(plan, 4, taken=3 * BATCH, places=places)[0], run(plan, 7)[0][3:])


# -- mixtures ------------------------------------------------------------------------------------------


def test_a_mixture_has_the_shares_asked_for(tmp_path):
    one, two = write(tmp_path / "one", "jsonl"), write(tmp_path / "two", "parquet", range(10_000, 10_000 + RECORDS))
    names, weights = names_and_weights([f"{one}:3", f"{two}:1"])
    plan = plan_of(names, weights)
    of_two = [plan.member_of(q) for q in range(4000)]
    assert abs(sum(of_two) - 1000) <= 3
    for begin in range(0, 4000, 100):
        assert abs(sum(of_two[begin : begin + 100]) - 25) <= 3
    whole, _ = run(plan, 30)
    begun, places = run(plan, 11, ranks=4)
    assert same(begun + run(plan, 19, ranks=2, taken=11 * BATCH, places=places)[0], whole)
    text = TOKENIZER.decode(np.concatenate(whole).reshape(-1))
    numbers = [int(n) for n in re.findall(r"<(\d+)> ", text)]
    assert 0.6 < sum(n < 10_000 for n in numbers) / len(numbers) < 0.9


@pytest.mark.parametrize(
    ("data", "names", "weights"),
    [
        (["org/name:1.0"], ["org/name:1.0"], None),
        (["a:3", "b:1"], ["a", "b"], [0.75, 0.25]),
        (["org/name:en:0.5", "b:0.5"], ["org/name:en", "b"], [0.5, 0.5]),
        (["a", "b"], ["a", "b"], None),
    ],
)
def test_names_and_weights(data, names, weights):
    assert names_and_weights(data) == (names, weights)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a:0.5", "b"], "--data b has no weight, and others have"),
        (["a:0", "b:1"], "--data a:0: a weight must be a number above 0"),
        (["a:nan", "b:1"], "a weight must be a number above 0"),
        (["a:1", "a:2"], "--data a is there twice"),
    ],
)
def test_bad_weights(data, message):
    with pytest.raises(RSOConfigError, match=message):
        names_and_weights(data)


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [("a.txt", "a few words\n" * 100), ("a.jsonl", '{"text": "a"}\n' * 9)])
def test_data_too_small_for_the_lanes_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RSOConfigError, match=r"has \d documents in \d+ blocks, .*too small to stream. Use --stream no"):
        plan_of(tmp_path / name)


def test_data_without_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 100)
    with pytest.raises(RSOConfigError, match="no text in its train part"):
        plan_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("records", [1, 3])
def test_a_small_member_of_a_mixture_is_repeated(tmp_path, records):
    """It has fewer records than lanes, and most of its blocks have none."""
    big = write(tmp_path / "big", "jsonl")
    (tmp_path / "small.jsonl").write_text("".join(f'{{"text": "<{10_000 + i}> small"}}\n' for i in range(records)))
    names, weights = names_and_weights([f"{big}:0.5", f"{tmp_path}/small.jsonl:0.5"])
    whole, _ = run(plan_of(names, weights), 40)
    begun, places = run(plan_of(names, weights), 17)
    assert same(begun + run(plan_of(names, weights), 23, ranks=2, taken=17 * BATCH, places=places)[0], whole)
    found = Counter(re.findall(r"<(1000\d)> small", TOKENIZER.decode(np.concatenate(whole).reshape(-1))))
    assert len(found) == records


def test_one_row_group_is_enough_for_many_lanes(tmp_path):
    folder = write(tmp_path / "data", "one row group")
    assert plan_of(folder, batch=128).orders[0].count >= 128


@pytest.mark.parametrize("form", ["array", "returns"])
def test_files_that_are_not_lines_whatever_their_name_says(tmp_path, form):
    rows = [json.dumps({"text": record(n)}) for n in range(RECORDS)]
    whole = f"[\n{', '.join(rows)}]" if form == "array" else "\r".join(rows)
    (tmp_path / "a.jsonl").write_text(whole, newline="")
    assert set(epoch_of(plan_of(tmp_path / "a.jsonl"))) == {record(n) for n in range(RECORDS)}


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (32, 32), (512, 128), (100, 100), (127, 127), (4096, 128)])
def test_lanes_divide_the_batch(batch, lanes):
    assert lanes_for(batch) == lanes
