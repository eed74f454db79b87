"""Before any test imports torch or DeepSpeed; and how two workers (``pytest -n 2``) share the tests."""

import os
from typing import Any

import pytest
from support.environment import prepare

prepare()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other worker needs a core too

# The longest come first, so that no worker is left alone with one of them at the end; those of one process beside the
# cluster, since ranks that have to wait for a core hold up all others.
LONGEST = (
    "tests/cluster", "tests/cli/test_plan.py", "tests/engines/test_deepspeed_equals_reference.py",
    "tests/unit/test_memory_account.py", "tests/cli/test_train_engines.py", "tests/checkpoint/test_resume.py",
    "tests/cli/test_train.py",
)  # fmt: skip


def unit_of(nodeid: str) -> str:
    """What stays with one worker: a module, which starts its ranks once, and all tests of the one virtual cluster."""
    module = nodeid.partition("::")[0]
    return "tests/cluster" if module.startswith("tests/cluster/") else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {unit: n for n, unit in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(unit_of(item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Units(config, log)
