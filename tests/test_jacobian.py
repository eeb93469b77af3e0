"""The Jacobian layer by layer, against autograd one example at a time; the small residual network."""

import dataclasses

import pytest
import torch
from torch import nn

from eos_utils import store
from eos_utils.experiment import Experiment, Measure
from eos_utils.gram import Gram
from eos_utils.jacobian import ModuleGram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.residual import gram_of
from eos_utils.resnet import ResidualBlock, small_resnet
from eos_utils.run import compute, forget

TINY = Experiment(
    dataset="cifar10", n=6, labels="pair", classes=(1, 0), network="small_resnet", width=2, depth=1, bias=False,
    init="fan_in", loss="mse", eta="1/50", steps=3, seed=100, dtype="float64",
)  # fmt: skip


def problem(model, features, n=5, loss="mse"):
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, k, generator=g, dtype=torch.float64) for k in (features, 1))
    return Objective(model.double(), loss, x, y)


def explicit(objective, theta):
    """(n, P), a gradient for each example by itself."""
    rows = []
    for x in objective.x:
        leaf = theta.clone().requires_grad_(True)
        rows.append(torch.autograd.grad(objective._call(leaf, x[None])[0, 0], leaf)[0])
    return torch.stack(rows)


def convolutional(**given):
    return nn.Sequential(
        nn.Unflatten(1, (2, 7, 6)), nn.Conv2d(2, 3, 3, **given), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(1),
        nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize("loss, factor", [("mse", 2), ("half_mse", 1)])
@pytest.mark.parametrize(
    "given", [{}, {"bias": False}, {"stride": 2}, {"padding": 1}, {"padding": (2, 1), "stride": (1, 2), "dilation": 2}]
)
def test_the_jacobian_of_a_convolutional_network_is_that_of_single_examples(given, loss, factor):
    torch.manual_seed(0)
    objective = problem(convolutional(**given), 84, loss=loss)
    theta, gram = objective.initial(), ModuleGram(objective)
    j, sweep = explicit(objective, theta), gram.factors(theta)
    assert torch.allclose(sweep.J, j, rtol=1e-12, atol=1e-14)
    assert torch.allclose(gram.outputs(theta, sweep), objective.outputs(theta), rtol=1e-13)
    parts = gram.at(theta)
    for found, part in ((parts.M, j), (parts.M_A, j[:, -4:]), (parts.M_W, j[:, :-4])):
        assert torch.allclose(found, factor / 5 * part @ part.T, rtol=1e-11, atol=1e-13)
        assert torch.equal(found, found.T)


def test_the_residual_network_as_it_is_described():
    model = small_resnet(width=8, blocks=2, seed=3)
    objective = problem(model, 3072, n=3)
    assert objective.P == 42_872 and objective.layers is None
    theta = objective.initial()
    assert torch.allclose(ModuleGram(objective).factors(theta).J, explicit(objective, theta), rtol=1e-10, atol=1e-12)
    # The signal at stage boundaries: 16, 8 and 4 pixels; 8, 16 and 32 channels.
    shapes, h = [], objective.x
    for module in model:
        h = module(h)
        if isinstance(module, ResidualBlock):
            shapes.append(tuple(h.shape[1:]))
    assert shapes == [(8, 16, 16)] * 2 + [(16, 8, 8)] * 2 + [(32, 4, 4)] * 2
    # He's variance in every convolution; the second of a block is smaller by the root of the number of blocks, 6.
    wide = small_resnet(width=32, blocks=2, seed=0)
    for block in (m for m in wide if isinstance(m, ResidualBlock)):
        for convolution, scale in ((block.first, 1), (block.second, 6)):
            fan_in = convolution.weight[0].numel()
            assert float(convolution.weight.detach().var() * fan_in / 2 * scale) == pytest.approx(1, rel=0.1)


def test_a_block_without_weights_is_its_shortcut():
    block = ResidualBlock(2, 5, 2, 1.0)
    with torch.no_grad():
        block.second.weight.zero_()
    x = torch.rand(3, 2, 6, 4)
    assert torch.equal(block(x)[:, :2], x[:, :, ::2, ::2]) and not block(x)[:, 2:].any()


def test_the_seed_alone_fixes_the_network_and_the_global_generator_is_left_alone():
    x = torch.rand(2, 3072)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    made = [Objective(small_resnet(2, 1, seed=s), "mse", x, torch.ones(2, 1)).initial() for s in (1, 1, 2)]
    one, two, other = made
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_has_no_jacobian_here_is_refused():
    with pytest.raises(ValueError, match="one output; these labels have 2"):
        ModuleGram(Objective(nn.Linear(3, 2), "mse", torch.rand(4, 3), torch.rand(4, 2)))
    cases = [
        (nn.Sequential(nn.Flatten(1), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "BatchNorm couples"),
        (nn.Sequential(nn.Flatten(1), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 1)), "2 is a LayerNorm"),
        (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3), nn.Flatten(1), nn.Linear(2, 1)), "1 is a Conv1d"),
        (
            nn.Sequential(
                nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 2, (3, 1), groups=2), nn.Flatten(1), nn.Linear(2, 1)
            ),
            "1 has groups",
        ),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            ModuleGram(Objective(model, "mse", torch.rand(4, 6), torch.rand(4, 1)))
    shared = nn.Linear(3, 3)
    twice = ModuleGram(problem(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 1)), 3))
    with pytest.raises(ValueError, match="used twice"):
        twice.at(twice.objective.initial())
    for wrong in ({"width": 0}, {"blocks": 0}, {"outputs": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0: must be at least 1"):
            small_resnet(**wrong)
    for field, value in (("activation", "tanh"), ("bias", True)):
        with pytest.raises(ValueError, match="network='small_resnet' has activation='relu', bias=False"):
            dataclasses.replace(TINY, **{field: value})


def test_a_fully_connected_network_keeps_its_factors():
    objective = problem(fully_connected(4, 3, 1, 1, "tanh", False), 4)
    theta = objective.initial()
    assert isinstance(gram_of(objective), Gram)
    for a, b in zip(gram_of(objective).at(theta), ModuleGram(objective).at(theta), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.cifar
def test_a_run_of_the_residual_network_is_observed():
    measure = Measure(k=1, stride=3, gram=2, snapshots=(0, 3))
    run, _ = compute(TINY, measure, progress=False)
    forget(TINY, measure)
    objective = TINY.objective(torch.device("cpu"))
    for label, at in (("0", 0), ("3", 3)):
        theta = torch.from_numpy(run["theta"].values[list(run["snapshot"].values).index(label)])
        j = explicit(objective, theta)
        values = torch.linalg.eigvalsh(2 / 6 * j @ j.T)
        assert float(run["sharpness"][at]) == pytest.approx(float(values[-1]), rel=1e-9)
        assert float(run["second"][at]) == pytest.approx(float(values[-2]), rel=1e-6)
        assert float(run["norm_A2"][at]) == pytest.approx(float(theta[-8:].square().sum()), rel=1e-12)
        assert float(run["layer_norm2"][at].sum()) == pytest.approx(float(theta.square().sum()), rel=1e-6)


def test_its_records_carry_the_code_of_the_network():
    assert set(store.optional(["observed", "small_resnet"])) == {"gram", "residual", "jacobian", "resnet"}
    assert store.optional(["step", "fc"]) == [] and store.optional(["observed", "fc"]) == ["gram", "residual"]
    assert {"jacobian", "resnet"} <= store.fingerprints(store.optional(["small_resnet"])).keys()
