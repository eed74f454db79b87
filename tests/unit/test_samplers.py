"""Statistics of P, and that it is a function of its arguments alone."""

import math

import pytest
import torch

from rso_ds.config import SAMPLERS
from rso_ds.subspace import (
    GENERATOR_VERSIONS,
    Subspace,
    add_lifted_,
    dense_projection,
    is_transform,
    lift,
    overlap,
    project,
    projection_seed,
    sample_projection,
)
from rso_ds.subspace.counter import random_bits
from rso_ds.subspace.transform import columns_of_q, factors, transform

IN, RANK, DRAWS = 12, 4, 4000


def draw(sampler, k, in_features=IN, rank=RANK, seed=0, name="g"):
    return dense_projection(sample_projection(sampler, seed, name, k, in_features, rank), in_features).float()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_second_moment_is_the_identity(sampler):
    """E[P P^T] = I: every entry of the mean over 4000 draws within 5 standard errors."""
    samples = torch.stack([p @ p.t() for p in (draw(sampler, k) for k in range(DRAWS))]).double()
    error = (samples.mean(0) - torch.eye(IN)).abs()
    assert (error <= 5 * samples.std(0) / math.sqrt(DRAWS) + 1e-6).all()


@pytest.mark.parametrize("sampler", ["haar", "coordinate", "srht"])
@pytest.mark.parametrize("shape", [(96, 32), (7, 3), (64, 64), (172, 43), (1024, 256)])
def test_columns_are_orthogonal_of_length_sqrt_in_over_rank(sampler, shape):
    p = draw(sampler, 0, *shape)
    n, rank = shape
    torch.testing.assert_close(p.t() @ p, n / rank * torch.eye(rank), atol=2e-5, rtol=0)


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


def test_bits_of_the_counter_are_those_of_splitmix64():
    """The published sequence of seed 1234567, and the same elements by their number alone."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    bits = random_bits(1234567, 0, 4)
    assert [int(b) & (2**64 - 1) for b in bits] == published
    assert torch.equal(random_bits(1234567, 2, 2), bits[2:])


def test_draws_of_srht_are_pinned():
    """A changed draw would silently change every resumed run: who changes it raises GENERATOR_VERSIONS."""
    assert GENERATOR_VERSIONS["srht"] == 1
    signs = [[-1, -1], [-1, 1], [1, 1], [1, -1], [1, 1], [-1, 1], [-1, -1], [-1, 1]]
    expected = torch.tensor(signs) * math.sqrt(0.5)
    torch.testing.assert_close(sample_projection("srht", 0, "layer", 1, 8, 2), expected, atol=1e-7, rtol=0)
    stored = sample_projection("srht", 0, "layer", 1, 128, 49)
    assert stored[:8].tolist() == [-1, 1, 1, 1, 1, 1, 1, -1]
    assert stored[128:136].tolist() == [0, 1, 2, 7, 16, 21, 24, 25]


def reference_q(n):
    """Kronecker product of Sylvester's Hadamard matrices and of the orthonormal DCT-II, in float64."""
    q = torch.ones(1, 1, dtype=torch.float64)
    while n % 2 == 0:
        q = torch.kron(q, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2))
        n //= 2
    dct = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        for k in range(n):
            dct[i, k] = math.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt((2 if k else 1) / n)
    return torch.kron(q, dct)


SIZES = [1, 2, 6, 8, 43, 96, 128, 172, 512, 2048]


@pytest.mark.parametrize("n", SIZES)
def test_the_transform_is_the_kronecker_product(n):
    q = reference_q(n)
    torch.testing.assert_close(q.t() @ q, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = factors(n, x)
    torch.testing.assert_close(transform(x, parts), x @ q, atol=1e-12, rtol=0)
    torch.testing.assert_close(transform(x, parts, transposed=True), x @ q.t(), atol=1e-12, rtol=0)
    columns = torch.arange(0, n, 3)
    torch.testing.assert_close(columns_of_q(n, columns), q[:, columns].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n", "rank"), [(256, 96), (512, 128), (1024, 512), (1376, 344)])
def test_without_a_matrix_every_product_is_that_of_the_matrix(n, rank):
    """The three products with P, the overlap, and the law: signs times the chosen columns of Q."""
    P = sample_projection("srht", 3, "g", 2, n, rank)
    assert is_transform(P)
    assert P.numel() == n + rank
    signs, columns = P[:n].double(), P[n:].long()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert len(set(columns.tolist())) == rank
    matrix = math.sqrt(n / rank) * signs[:, None] * reference_q(n)[:, columns]
    torch.testing.assert_close(dense_projection(P, n), matrix, atol=1e-12, rtol=0)
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(5, size, dtype=torch.float64, generator=generator) for size in (n, rank))
    torch.testing.assert_close(project(x, P), x @ matrix, atol=1e-11, rtol=0)
    torch.testing.assert_close(lift(z, P, n), z @ matrix.t(), atol=1e-11, rtol=0)
    torch.testing.assert_close(add_lifted_(x.clone(), z, P, beta=0.5), 0.5 * x + z @ matrix.t(), atol=1e-11, rtol=0)
    other = sample_projection("srht", 3, "g", 3, n, rank)
    turn = dense_projection(P, n).t() @ dense_projection(other, n) * (rank / n)
    torch.testing.assert_close(overlap(P, other, n).double(), turn, atol=1e-5, rtol=0)


def test_a_product_in_pieces_is_the_product(monkeypatch):
    P = sample_projection("srht", 0, "g", 0, 256, 96)
    x, z = torch.randn(50, 256), torch.randn(50, 96)
    whole = project(x, P), add_lifted_(x.clone(), z, P)
    monkeypatch.setattr(
        "rso_ds.subspace.projection.pieces", lambda rows, *_: [slice(i, i + 3) for i in range(0, rows, 3)]
    )
    torch.testing.assert_close(project(x, P), whole[0])
    torch.testing.assert_close(add_lifted_(x.clone(), z, P), whole[1])


def test_second_moment_of_the_transform_is_the_identity():
    """E[P P^T] = I where no matrix is stored, as the first test has it where one is."""
    eye = torch.eye(128)
    draws = [sample_projection("srht", 0, "g", k, 128, 80) for k in range(400)]
    assert all(map(is_transform, draws))
    samples = torch.stack([lift(project(eye, P), P, 128) for P in draws]).double()
    error = (samples.mean(0) - eye).abs()
    assert (error <= 5 * samples.std(0) / math.sqrt(len(draws)) + 1e-6).all()


def test_sixteen_bits_keep_the_transform_of_a_power_of_two_exact():
    P = sample_projection("srht", 0, "g", 0, 1024, 256)
    x = torch.zeros(4, 1024, dtype=torch.bfloat16)
    x[range(4), [0, 1, 500, 1023]] = 1.0
    assert torch.equal(project(x, P).double(), dense_projection(P, 1024)[[0, 1, 500, 1023]])
