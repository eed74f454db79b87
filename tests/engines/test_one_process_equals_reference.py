"""The torch optimizer in float64 against the reference: every option of the algorithm, over 4 boundaries."""

import pytest
import torch
from reference.rso import Settings, train
from torch import nn

import rso_ds
from rso_ds.subspace import is_transform, sample_projection

STEPS, INTERVAL, RANK = 14, 3, 3
GROUPS = {"q_proj+k_proj": ["q_proj", "k_proj"], "out": ["out"]}


class Net(nn.Module):
    """Two layers with one input, a bias, a norm, one more layer; small enough to read."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(7, 5)
        self.k_proj = nn.Linear(7, 4, bias=False)
        self.norm = nn.LayerNorm(9)
        self.out = nn.Linear(9, 6)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(torch.cat([self.q_proj(x), self.k_proj(x)], -1))))


def build() -> Net:
    torch.manual_seed(0)
    return Net().double()


def data(step: int):
    g = torch.Generator().manual_seed(step % 3)
    return [torch.randn(8, 7, generator=g).double(), torch.randn(8, 6, generator=g).double()]


def loss_of(forward, batch):
    x, y = batch
    return ((forward(x) - y) ** 2).mean()


CASES = {
    "default": {},
    "reset": {"carry_over": "reset"},
    "keep_second": {"carry_over": "keep_second"},
    "project": {"carry_over": "project"},
    "gaussian": {"sampler": "gaussian", "carry_over": "project"},
    "coordinate": {"sampler": "coordinate"},
    "proximal": {"proximal": 0.3},
    "weight_decay": {"weight_decay": 0.1},
    "dense_lr": {"dense_lr": 3e-3},
    "adam": {"solver": "adam", "weight_decay": 0.1, "proximal": 0.2},
    "sgd": {"solver": "sgd", "carry_over": "reset", "lr": 1e-2, "weight_decay": 0.1},
    "sgd_project": {"solver": "sgd", "carry_over": "project", "lr": 1e-2},
    "interval_1": {"interval": 1},
    "folded": {"form": "folded"},
    "folded_coordinate": {"form": "folded", "sampler": "coordinate", "carry_over": "project"},
    "folded_decay": {"form": "folded", "weight_decay": 0.1},
    "folded_sgd": {"form": "folded", "solver": "sgd", "carry_over": "project", "lr": 1e-2},
    "srht": {"sampler": "srht"},
}
WITHOUT_A_MATRIX = {
    "project": {"carry_over": "project"},
    "folded": {"form": "folded"},
    "decay_proximal": {"weight_decay": 0.1, "proximal": 0.2},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case):
    equals_reference(CASES[case])


@pytest.mark.parametrize("case", WITHOUT_A_MATRIX)
def test_equals_reference_where_srht_stores_no_matrix(case, monkeypatch):
    monkeypatch.setattr("rso_ds.subspace.samplers.transform_cost", lambda in_features, rank: 0)
    assert is_transform(sample_projection("srht", 0, "out", 0, 6, RANK))
    equals_reference({"sampler": "srht", **WITHOUT_A_MATRIX[case]})


def equals_reference(options):
    options = {"lr": 1e-2, "eps": 1e-6, "interval": INTERVAL, **options}
    expected = train(build(), Settings(groups=GROUPS, rank=RANK, **options), loss_of, [[data(i)] for i in range(STEPS)])
    model = build()
    config = rso_ds.RSOConfig(rank=RANK, targets=["q_proj", "k_proj", "out"], **options)
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    losses = []
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, data(i))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.boundary.draw == STEPS // options["interval"] >= 4
    torch.testing.assert_close(losses, expected.losses, rtol=1e-11, atol=1e-12)
    final = rso_ds.to_dense(model).state_dict()
    assert set(final) == set(expected.weights)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(final[name], weight, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_resume_in_the_middle_of_a_subspace(form):
    def run(resume_at: int | None):
        model = build()
        config = rso_ds.RSOConfig(rank=RANK, targets=["q_proj", "k_proj", "out"], interval=INTERVAL, form=form)
        rso_ds.convert(model, config)
        optimizer = rso_ds.RSO(model, config)
        for i in range(STEPS):
            if i == resume_at:
                saved = model.state_dict(), optimizer.state_dict()
                saved = torch.load(_dump(saved), weights_only=True)
                model = build()
                rso_ds.convert(model, config)
                model.load_state_dict(saved[0])
                optimizer = rso_ds.RSO(model, config)
                optimizer.load_state_dict(saved[1])
            optimizer.zero_grad()
            loss_of(model, data(i)).backward()
            optimizer.step()
        return rso_ds.to_dense(model).state_dict()

    straight, resumed = run(None), run(7)
    assert 7 % INTERVAL != 0
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name


def test_what_was_loaded_is_not_trained():
    """fp32 masters are merged in place: in the optimizer's own memory, not in the state dict's."""
    config = rso_ds.RSOConfig(rank=RANK, targets=["out"], interval=INTERVAL, master_weights="device")

    def start():
        model = build().bfloat16()
        rso_ds.convert(model, config)
        return model, rso_ds.RSO(model, config)

    def train(model, optimizer):
        for i in range(INTERVAL):
            loss_of(model, [x.bfloat16() for x in data(i)]).backward()
            optimizer.step()

    model, optimizer = start()
    train(model, optimizer)
    saved = torch.load(_dump([model.state_dict(), optimizer.state_dict()]), weights_only=True)
    masters = saved[1]["rso_rows"]["masters"]["out"]
    before = masters.clone()
    model, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer)
    assert torch.equal(masters, before)
    assert not torch.equal(optimizer.state_dict()["rso_rows"]["masters"]["out"], before)


def _dump(obj):
    import io

    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return buffer


def test_optimizer_on_an_unconverted_model_is_refused():
    with pytest.raises(rso_ds.RSOConversionError, match="would be plain AdamW"):
        rso_ds.RSO(build(), rso_ds.RSOConfig())


def test_state_of_another_rank_is_refused():
    def optimizer(rank):
        model = build()
        config = rso_ds.RSOConfig(rank=rank, targets=["q_proj"])
        rso_ds.convert(model, config)
        return rso_ds.RSO(model, config)

    with pytest.raises(rso_ds.RSOCheckpointError, match=r"layer 'q_proj' .* \[5, 7, 2, 'q_proj'\]"):
        optimizer(3).load_state_dict(optimizer(2).state_dict())


@pytest.mark.parametrize(
    ("key", "value", "also"),
    [
        ("rank", 2, {}),
        ("sampler", "gaussian", {}),
        ("seed", 1, {}),
        ("rank_ratio", 0.5, {"rank": None}),
        ("targets", ("q_proj", "k_proj"), {}),
        ("targets", "all-linear", {}),
        ("share_projection", "shape", {}),
        ("dense", "none", {}),
        ("lean", "none", {}),
    ],
)
def test_model_converted_with_another_configuration_is_refused(key, value, also):
    model = build()
    settings = {"rank": 3, "targets": ["q_proj"]}
    rso_ds.convert(model, rso_ds.RSOConfig(**settings))
    with pytest.raises(rso_ds.RSOConversionError) as refused:
        rso_ds.RSO(model, rso_ds.RSOConfig(**{**settings, key: value, **also}))
    assert f"'{key}': " in str(refused.value)
    assert f"the configuration says {value!r}" in str(refused.value)


def test_what_conversion_does_not_use_may_change():
    model = build()
    rso_ds.convert(model, rso_ds.RSOConfig(rank=3, targets=["q_proj"]))
    rso_ds.RSO(
        model, rso_ds.RSOConfig(rank=3, targets=["q_proj"], lr=1.0, interval=2, solver="sgd", carry_over="reset")
    )
