"""One default recipe, ``rso_ds/defaults.py``: every document, example and JSON shows it, or says that it does not."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from support.environment import ROOT
from support.recipe_places import MARK, ROWS, Place, places

from rso_ds import RSOConfig, defaults
from rso_ds.planning.plan.config_json import DEFAULT_BASE
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.fill_json import fill, read_json

# What is compared; experiments (benchmarks/, but for their documents) have settings of their own.
FILES = [ROOT / "README.md", ROOT / "rso_ds" / "recipes" / "finetuning" / "arguments.py"]
FILES += [ROOT / "rso_ds" / "recipes" / "training" / "arguments.py"]
for folder, pattern in (
    ("docs", "*.md"), ("examples", "*"), ("ds_configs", "*.json"), ("launch", "**/*.*"), ("rso_ds/planning", "**/*.py"),
):  # fmt: skip
    FILES += sorted(p for p in (ROOT / folder).glob(pattern) if p.is_file() and p.suffix != ".pyc")
PLACES = [place for path in FILES for place in places(path, ROOT)]


def test_everything_that_is_shown_is_the_recipe_or_marked():
    wrong = {place.where: place.why_not() for place in PLACES if place.why_not() and not place.marked}
    assert not wrong, f"change these, or write '{MARK}WHY' above them: {json.dumps(wrong, indent=1)}"


def test_no_mark_is_left_where_the_recipe_is_shown():
    """A mark must have something below it that it excuses."""
    excused = {place.where for place in PLACES if place.marked and place.why_not()}
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MARK in line and path.suffix != ".py":
                near = {f"{path.relative_to(ROOT)}:{n}" for n in range(number, number + 4)}
                assert near & excused, f"{path.relative_to(ROOT)}:{number} excuses nothing"


@pytest.mark.parametrize(
    "file",
    ["README.md", "docs/quickstart.md", "docs/engines.md", "docs/migration.md", "docs/trainers.md", "docs/plan.md",
     "docs/finetuning.md", "ds_configs/rso.json", "ds_configs/rso_7b_zero3.json", "examples/torch_ranks.py",
     "examples/deepspeed_loop.py", "examples/what_it_saves.py"],
)  # fmt: skip
def test_places_are_found(file):
    assert any(place.file == file for place in PLACES)


LONG, TRAINED = defaults.RANDOM_LONG, defaults.PRETRAINED


@pytest.mark.parametrize(
    "text",
    [
        '```json\n"optimizer": {"type": "RSO", "params": {"lr": 4e-3, "rank_ratio": 0.25, "interval": 10}}\n```',
        f'```json\n"optimizer": {{"type": "RSO", "params": {{"lr": {LONG.lr}, "interval": {LONG.interval}}}}}\n```',
        '```text\n{"optimizer": {\n "type": "RSO",\n "params": {"sampler": "gaussian"}}}\n```',
        '```json\n{"type": "RSO", "params": {"lr": "auto", "weight_decay": 0.1}}\n```',
        "```python\nconfig = rso_ds.RSOConfig(lr=4e-3, rank_ratio=0.25)\n```",
        "```python\nargs = TrainingArguments('out', learning_rate=7e-3)\n```",
        '```python\ntrainer = with_rso(Trainer)(rso={"rank_ratio": 0.125})\n```',
        "```bash\npython launch/train.py --set optimizer.params.interval=17\n```",
        "```bash\npython launch/finetune.py \\\n  --learning_rate 7e-3 --rso rank_ratio=0.25\n```",
        'In the table | `"lr": 3e-3`: about twice |',
        "Begin with `interval` 17 and go on.",
    ],
)
def test_another_recipe_is_found_wherever_it_stands(tmp_path, text):
    (tmp_path / "a.md").write_text(f"# A document\n\n{text}\n")
    found = places(tmp_path / "a.md", tmp_path)
    assert any(place.why_not() for place in found)
    assert not any(place.marked for place in found)
    (tmp_path / "a.md").write_text(f"# A document\n\n<!-- {MARK}a test -->\n{text}\n")
    assert all(place.marked for place in places(tmp_path / "a.md", tmp_path))


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_the_recipe_and_its_neighbours_are_not(row):
    said = dataclasses.asdict(row)
    assert Place("a", 1, said, False).why_not() is None
    for key, other in (("lr", 7e-3), ("dense_lr", 7e-3), ("interval", 17)):
        assert Place("a", 1, {**said, key: other}, False).why_not()


# -- who takes it from there ----------------------------------------------------------------------------


def test_the_library_has_the_row_of_trained_weights():
    config = RSOConfig()
    assert {key: getattr(config, key) for key in dataclasses.asdict(TRAINED)} == dataclasses.asdict(TRAINED)
    alike = (config.rank_ratio, config.sampler, config.carry_over, config.targets)
    assert alike == (defaults.RANK_RATIO, defaults.SAMPLER, defaults.CARRY_OVER, defaults.TARGETS)
    assert (config.betas, config.eps, config.weight_decay) == (defaults.BETAS, defaults.EPS, defaults.WEIGHT_DECAY)


@pytest.mark.parametrize(
    ("flags", "steps", "row"),
    [
        ({}, defaults.LONG_RUN, defaults.RANDOM_LONG),
        ({}, defaults.LONG_RUN - 1, defaults.RANDOM_SHORT),
        ({"model": "gpt2"}, defaults.LONG_RUN, TRAINED),
        ({"model": "gpt2"}, 10, TRAINED),
    ],
)
def test_the_main_job_fills_it_in(flags, steps, row):
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs" / "rso.json"), **flags)
    config = fill(read_json(args), args, 2, steps, on_gpu=False)
    params = config["optimizer"]["params"]
    assert {key: params.get(key) for key in dataclasses.asdict(row)} == dataclasses.asdict(row)
    alike = (params["rank_ratio"], params["sampler"], params["carry_over"])
    assert alike == (defaults.RANK_RATIO, defaults.SAMPLER, defaults.CARRY_OVER)
    assert config["gradient_clipping"] == defaults.CLIPPING
    assert params["weight_decay"] == defaults.WEIGHT_DECAY


def test_a_plan_writes_the_row_of_large_models():
    params = DEFAULT_BASE["optimizer"]["params"]
    assert Place("plan", 1, params, False).why_not() is None
    assert (params["lr"], params["interval"]) == (defaults.LARGE.lr, defaults.LARGE.interval)


@pytest.mark.parametrize("before", [{"lr": 3e-3, "dense_lr": 5e-3, "interval": 33}, {"lr": 3e-3}])
def test_a_resumed_run_keeps_its_own_where_nothing_else_is_said(before):
    """Whatever the defaults are by then; older checkpoints say ``lr`` alone."""
    args = TrainArguments(deepspeed=str(ROOT / "ds_configs" / "rso.json"))
    params = fill(read_json(args), args, 2, defaults.LONG_RUN, on_gpu=False, before=before)["optimizer"]["params"]
    assert {key: params[key] for key in before} == before
    assert params["interval"] == before.get("interval", LONG.interval)
    args = TrainArguments(deepspeed=args.deepspeed, learning_rate=1e-2, set=["optimizer.params.interval=7"])
    params = fill(read_json(args), args, 2, defaults.LONG_RUN, on_gpu=False, before=before)["optimizer"]["params"]
    assert (params["lr"], params["interval"]) == (1e-2, 7)


# -- the table of the documents -------------------------------------------------------------------------


def table(head: str) -> list[list[str]]:
    lines = (ROOT / "docs" / "rank-and-interval.md").read_text().splitlines()
    start = lines.index(head) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def test_the_table_of_runs_has_the_values_of_the_code():
    rows = table("| run | `lr` | `dense_lr` | `interval` |")
    assert [[json.loads(cell) for cell in row[1:]] for row in rows] == [list(dataclasses.astuple(row)) for row in ROWS]
    assert re.search(r"(\d+) steps", rows[0][0])[1] == str(defaults.LONG_RUN)


def test_the_table_of_what_is_alike_has_the_values_of_the_code():
    head = (
        "| `rank_ratio` | `sampler` | `carry_over` | `targets` | `betas` | `eps` | `weight_decay` | clipping |"
        " schedule | warm-up | final rate |"
    )
    (row,) = table(head)
    schedule = row.pop(8)
    d = defaults
    assert [json.loads(cell) for cell in row] == [
        d.RANK_RATIO, d.SAMPLER, d.CARRY_OVER, d.TARGETS, list(d.BETAS), d.EPS, d.WEIGHT_DECAY, d.CLIPPING, d.WARMUP,
        d.FINAL_LR,
    ]  # fmt: skip
    assert schedule == d.SCHEDULE


def test_the_schedule_of_the_documents_is_that_of_the_code():
    text = (ROOT / "docs" / "configuration.md").read_text()
    shares = re.search(r"`--warmup` \(([\d.]+)\).*`--decay-share` \(([\d.]+)\).*`--final-lr` \(([\d.]+)\)", text)
    assert shares is not None
    assert [float(share) for share in shares.groups()] == [defaults.WARMUP, defaults.DECAY_SHARE, defaults.FINAL_LR]
    assert f"`--lr-schedule {defaults.SCHEDULE}`, the default" in text
