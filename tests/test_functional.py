"""A model called with other parameters comes back as it was."""

import pytest
import torch
from torch import nn

from pyhealth.bilevel.functional import call_with


class Shared(nn.Module):
    """One module under two names, one tensor in two modules, and buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.again = nn.Sequential(self.first)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.own = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.norm(self.tied(self.again(self.first(x)))) + self.own


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Shared()


X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])


def test_every_place_of_a_parameter_is_replaced(model):
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.5]], requires_grad=True)
    out = call_with(model, {"first.weight": weight}, {"x": X})
    x = X @ weight.T @ weight.T @ weight.T
    expected = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt() + 1
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out[0, 0], weight)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected[0, 0], weight)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_keeps_parameters_and_buffers(model, fails):
    own = {name: p for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = {name: p.detach() + 1 for name, p in own.items()}
    if fails:
        with pytest.raises(RuntimeError):
            call_with(model, other, {"x": X[:, :1]})
    else:
        call_with(model, other, {"x": X})
    assert {name: p for name, p in model.named_parameters()} == own  # the same objects
    assert model.tied.weight is model.first.weight is model.again[0].weight
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name


def test_parameters_left_out_are_the_models_own(model):
    model.eval()
    out = call_with(model, {"own": torch.zeros(2)}, {"x": X})
    torch.testing.assert_close(out, model(X) - 1)
