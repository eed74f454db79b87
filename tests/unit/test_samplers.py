"""Statistics of P, and that it is a function of its arguments alone."""

import math

import pytest
import torch

from rso_ds.config import SAMPLERS
from rso_ds.subspace import Subspace, dense_projection, projection_seed, sample_projection

IN, RANK, DRAWS = 12, 4, 4000


def draw(sampler, k, in_features=IN, rank=RANK, seed=0, name="g"):
    return dense_projection(sample_projection(sampler, seed, name, k, in_features, rank), in_features).float()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_second_moment_is_the_identity(sampler):
    """E[P P^T] = I: every entry of the mean over 4000 draws within 5 standard errors."""
    samples = torch.stack([p @ p.t() for p in (draw(sampler, k) for k in range(DRAWS))]).double()
    error = (samples.mean(0) - torch.eye(IN)).abs()
    assert (error <= 5 * samples.std(0) / math.sqrt(DRAWS) + 1e-6).all()


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
def test_columns_are_orthogonal_of_length_sqrt_in_over_rank(sampler):
    p = draw(sampler, 0, 96, 32)
    torch.testing.assert_close(p.t() @ p, 3.0 * torch.eye(32), atol=2e-5, rtol=0)


def test_gaussian_entries_have_variance_one_over_rank():
    p = draw("gaussian", 0, 500, 100)
    assert p.std().item() == pytest.approx(0.1, rel=0.02)
    assert p.mean().abs().item() < 0.002


def test_haar_is_invariant_and_not_what_raw_qr_gives():
    """First entry of Q uniform on the sphere: symmetric about 0. Without the sign fix QR makes R's diagonal
    of one sign and the entry's mean far from 0 (for Householder QR, q_11 and g_11 then have opposite signs)."""
    first = torch.stack([draw("haar", k)[0, 0] for k in range(DRAWS)]) * math.sqrt(RANK / IN)
    assert first.mean().abs() < 5 / math.sqrt(IN * DRAWS)
    assert (first**2).mean().item() == pytest.approx(1 / IN, rel=0.1)
    raw = torch.stack(
        [
            torch.linalg.qr(torch.randn(IN, RANK, generator=torch.Generator().manual_seed(k)))[0][0, 0]
            for k in range(500)
        ]
    )
    assert raw.mean().abs() > 5 / math.sqrt(IN * 500)


def test_estimator_variance_is_in_over_rank_minus_one_for_haar():
    """E ||P P^T x||^2 = in/rank for unit x (docs/algorithm.md)."""
    x = torch.nn.functional.normalize(torch.randn(IN, generator=torch.Generator().manual_seed(1)), dim=0)
    norms = torch.stack([((p := draw("haar", k)) @ (p.t() @ x)).square().sum() for k in range(DRAWS)])
    assert norms.mean().item() == pytest.approx(IN / RANK, rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depends_on_its_arguments_only(sampler):
    torch.manual_seed(1)
    first = draw(sampler, 3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, draw(sampler, 3))
    torch.set_rng_state(state)
    assert torch.equal(state, torch.get_rng_state())
    for other in (draw(sampler, 4), draw(sampler, 3, seed=1), draw(sampler, 3, name="h")):
        assert not torch.equal(first, other)


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for sampler in SAMPLERS:
        draw(sampler, 0)
    assert torch.equal(expected, torch.rand(3))


def test_seed_is_pinned():
    """A changed seed derivation would silently change every resumed run."""
    assert projection_seed(0, "model.layers.0.mlp.down_proj", 7) == 4016450046952599017


def test_the_merge_uses_the_p_of_the_forward_pass():
    """FSDP2 keeps W in fp32 and computes in bf16: a P of other digits would not undo what B was trained for."""
    subspace = Subspace("x", 16, 4, "haar", 0)
    used = subspace.projection(torch.device("cpu"), torch.bfloat16)
    assert subspace.current(torch.device("cpu"), torch.float32) is used
    assert Subspace("x", 16, 4, "haar", 0).current(torch.device("cpu"), torch.float32).dtype == torch.float32
