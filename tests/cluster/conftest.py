"""One virtual cluster for all tests of this folder; RSO_DS_CLUSTER_NODES (2, or 4) says of how many nodes."""

import pytest
from jobs import NODES, make_work, train_on_one_node
from virtual_cluster import VirtualCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with VirtualCluster(tmp_path_factory.mktemp("cluster"), NODES) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def one_node(work):
    """Losses of 6 steps of the same ranks and global batch on one node."""
    return train_on_one_node(work, 6, work / "one_node")
