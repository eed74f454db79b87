"""What ranks average after local steps goes in buckets: every element once, in order, as the memory itself."""

import pytest
import torch

from rso_ds.engines import local_steps


@pytest.mark.parametrize("sizes", [[3, 0, 6, 1], [4, 4], [9], [1, 1, 1], [2, 13, 5]])
def test_buckets_are_full_views_of_all_elements(sizes, monkeypatch):
    monkeypatch.setattr(local_steps, "BUCKET", 4)
    elements = torch.arange(float(sum(sizes)))
    flats = list(elements.clone().split(sizes))
    buckets = list(local_steps._buckets(flats))
    counts = [sum(piece.numel() for piece in bucket) for bucket in buckets]
    assert counts[:-1] == [4] * (len(counts) - 1)
    assert 0 < counts[-1] <= 4
    assert torch.equal(torch.cat([piece for bucket in buckets for piece in bucket]), elements)
    for bucket in buckets:
        for piece in bucket:
            piece += 100
    assert torch.equal(torch.cat(flats), elements + 100)


def test_the_mean_does_not_depend_on_the_buckets(monkeypatch):
    """Against one sum over everything: a second rank that has twice the values of this one."""
    monkeypatch.setattr(local_steps.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(local_steps.dist, "all_reduce", lambda flat, group: flat.mul_(3))
    for bucket in (5, 1 << 25):
        monkeypatch.setattr(local_steps, "BUCKET", bucket)
        tensors = [torch.ones(3, 4), torch.full((7,), 2.0, dtype=torch.bfloat16)]
        local_steps.average_(tensors, None)
        assert torch.equal(tensors[0], torch.full((3, 4), 1.5))
        assert torch.equal(tensors[1], torch.full((7,), 3.0, dtype=torch.bfloat16))
