"""Before any test imports torch or DeepSpeed; which tests run, and how two workers (``pytest -n 2``) share them.

Without a flag the quick suite runs: all but what is marked ``exhaustive``. ``--all`` runs everything, ``--part 2/6``
the second of six parts of what the quick suite leaves out. With the environment variable RSO_DS_TEST_TIMINGS=FILE each
phase of each test writes a line of JSON with what it took.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from support.environment import prepare

prepare()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other worker needs a core too

# The longest come first, so that no worker is left alone with one of them at the end; those of one process beside the
# cluster, since ranks that have to wait for a core hold up all others.
LONGEST = (
    "tests/cluster",
    "ranks",
    "tests/cli/test_plan.py",
    "tests/cli/test_train_engines.py",
    "tests/cli/test_train.py",
)
# These share the ranks of one pool (support/ranks.py), so that one worker runs them all.
POOLED = (
    "tests/engines/test_deepspeed_equals_reference.py", "tests/engines/test_deepspeed_low_precision_and_refusals.py",
    "tests/engines/test_torch_equals_reference.py", "tests/engines/test_torch_hooks_and_refusals.py",
    "tests/engines/test_bytes_sent.py", "tests/engines/test_states_of_live_engines.py",
    "tests/checkpoint/test_export_engines.py", "tests/checkpoint/test_resume.py", "tests/integrations/test_trainer.py",
    "tests/integrations/test_accelerate_trl_lightning.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rso_ds")
    group.addoption("--all", action="store_true", help="the exhaustive matrix too")
    group.addoption("--part", metavar="K/N", help="the Kth of N parts of what the quick suite leaves out, alone")


def unit_of(nodeid: str) -> str:
    """What stays with one worker: a module, all that share one pool of ranks, all tests of the one virtual cluster."""
    module = nodeid.partition("::")[0]
    if module in POOLED:
        return "ranks"
    return "tests/cluster" if module.startswith("tests/cluster/") else module


def part_of(nodeid: str, parts: int) -> int:
    """1 to ``parts``. Tests that ask for one case are in one part, so that it is run once."""
    module, _, test = nodeid.partition("::")
    _, bracket, case = test.partition("[")
    return 1 + zlib.crc32((module + (case if bracket else test)).encode()) % parts


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = items
    if part := config.getoption("--part"):
        which, parts = map(int, part.split("/"))
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        chosen = [item for item in left_out if part_of(item.nodeid, parts) == which]
    elif not config.getoption("--all"):
        chosen = [item for item in items if not item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    place = {unit: n for n, unit in enumerate(LONGEST)}
    items[:] = sorted(chosen, key=lambda item: place.get(unit_of(item.nodeid), len(LONGEST)))


@pytest.fixture(scope="session")
def pools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ranks that wait for cases; see ``support.ranks.Pools``."""
    from support.ranks import Pools

    pools = Pools(tmp_path_factory.mktemp("ranks"))
    yield pools
    pools.close()
    told = {"memory of ranks": pools.peak_bytes, "replaced ranks": pools.replaced}
    if hasattr(request.config, "workeroutput"):
        request.config.workeroutput["ranks"] = told
    else:
        request.config.stash[RANKS].append(told)


RANKS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RANKS] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if told := getattr(node, "workeroutput", {}).get("ranks"):
        node.config.stash[RANKS].append(told)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for told in config.stash[RANKS]:
        memory = ", ".join(f"{what}: {n / 2**20:,.0f} MiB" for what, n in sorted(told["memory of ranks"].items()))
        terminalreporter.write_line(f"ranks: {memory}; replaced {len(told['replaced ranks'])} times")
        for why in told["replaced ranks"]:
            terminalreporter.write_line(f"  {why}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Units(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = os.environ.get("RSO_DS_TEST_TIMINGS")
    if file and "PYTEST_XDIST_WORKER" not in os.environ:  # the workers' reports come to the controller
        line = {
            "test": report.nodeid,
            "phase": report.when,
            "seconds": round(report.duration, 3),
            "outcome": report.outcome,
        }
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
