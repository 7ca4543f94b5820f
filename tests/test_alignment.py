"""The alignment gradient against finite differences of an enumerated expectation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyhealth.bilevel.alignment import MAGNITUDE_STEP, alignment_gradient
from pyhealth.models.taskaug_policy import TaskAugPolicy

LEADS, LENGTH, RECORDS = 2, 40, 3


class Net(nn.Module):
    """Two layers with ReLUs: its loss has kinks in the signal and in the weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(LEADS * LENGTH, 5)
        self.out = nn.Linear(5, 1)
        self.double()

    def forward(self, x):
        return self.out(self.hidden(x.flatten(1)).relu())


def record_losses_of(net):
    def record_losses(params, x, labels):
        logit = torch.func.functional_call(net, dict(params), (x,))[:, 0]
        target = labels.reshape(-1)
        return nn.functional.binary_cross_entropy_with_logits(
            logit, target, reduction="none"
        )

    return record_losses


@pytest.fixture
def problem():
    net = Net()
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    params = {name: p.detach() for name, p in net.named_parameters()}
    direction = {name: normal(*p.shape) for name, p in params.items()}
    x, labels = normal(RECORDS, LEADS, LENGTH), torch.tensor([[1.0], [0.0], [1.0]])
    return record_losses_of(net), params, direction, x, labels.double()


OPERATIONS = ("no_op", "time_mask", "lead_dropout")


def policy_of(stages=1, shared=False, operations=OPERATIONS):
    policy = TaskAugPolicy(
        stages, shared_magnitudes=shared, operations=operations, sampling_rate=20
    ).double()
    return policy.randomize_(torch.Generator().manual_seed(2))


def expectation(policy, problem, seed):
    """Mean over all choices of one stage of the slope along the direction, negated.

    By central differences in the weights and explicit sums, with the noise that the
    seed makes: nothing of the code under test but the policy's operations.
    """
    record_losses, params, direction, x, labels = problem
    draw = policy.sample(x.shape, labels, torch.Generator().manual_seed(seed))

    def slope(signals):
        up, down = (
            record_losses(
                {n: params[n] + e * direction[n] for n in params}, signals, labels
            )
            for e in (1e-6, -1e-6)
        )
        return (up - down) / 2e-6

    total = 0.0
    probability = policy.logits[0].softmax(dim=0)
    for column, op in enumerate(policy.operations):
        low, high = op.low, op.high
        share = torch.where(
            labels[:, 0] == 1,
            policy.mag_pos[0, column].sigmoid(),
            policy.mag_neg[0, column].sigmoid(),
        )
        signals = op.apply(
            x, low + (high - low) * share, draw.stages[0].noise[op.name], 20
        )
        total = total - probability[column] * slope(signals).mean()
    return total


def shifted(policy, name, column, by):
    moved = TaskAugPolicy(
        policy.num_stages,
        shared_magnitudes=policy.shared_magnitudes,
        operations=policy.op_names,
        sampling_rate=20,
    ).double()
    moved.load_state_dict(policy.state_dict())
    with torch.no_grad():
        getattr(moved, name)[0, column] += by
    return moved


def test_logit_gradient_is_the_slope_of_the_enumerated_expectation(problem):
    policy = policy_of()
    record_losses, params, direction, x, labels = problem
    found = alignment_gradient(
        policy, x, labels, record_losses, params, direction, seeded(7)
    )["logits"][0]
    # Logits do not move the magnitudes, whose central values are averaged here too.
    for column in range(3):
        up, down = (
            mean_of_halves(shifted(policy, "logits", column, by), problem, 7)
            for by in (1e-5, -1e-5)
        )
        slope = (up - down).item() / 2e-5
        assert found[column].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)
    assert found.abs().max() > 1e-3


def mean_of_halves(policy, problem, seed):
    """The expectation, averaged over both shifts of every magnitude."""
    halves = []
    for by in (MAGNITUDE_STEP, -MAGNITUDE_STEP):
        moved = policy
        for name in ("mag_neg", "mag_pos"):
            for column in range(len(policy.operations)):
                moved = shifted(moved, name, column, by)
        halves.append(expectation(moved, problem, seed))
    return sum(halves) / 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["mag_neg", "mag_pos"])
def test_magnitude_gradient_is_the_central_difference_of_the_expectation(problem, name):
    policy = policy_of()
    record_losses, params, direction, x, labels = problem
    found = alignment_gradient(
        policy, x, labels, record_losses, params, direction, seeded(7)
    )[name][0]
    for column in range(3):
        up, down = (
            expectation(shifted(policy, name, column, by), problem, 7)
            for by in (MAGNITUDE_STEP, -MAGNITUDE_STEP)
        )
        slope = (up - down).item() / (2 * MAGNITUDE_STEP)
        assert found[column].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)
    assert found[1:].abs().min() > 1e-6


def test_shared_magnitudes_get_the_sum_over_the_classes(problem):
    record_losses, params, direction, x, labels = problem
    apart, shared = policy_of(), policy_of(shared=True)
    with torch.no_grad():
        apart.mag_pos.copy_(apart.mag_neg)
        shared.load_state_dict(
            {"logits": apart.logits, "mag_neg": apart.mag_neg, "mag_pos": apart.mag_neg}
        )
    one, other = (
        alignment_gradient(p, x, labels, record_losses, params, direction, seeded(3))
        for p in (apart, shared)
    )
    torch.testing.assert_close(one["mag_neg"] + one["mag_pos"], other["mag_neg"])
    assert set(other) == {"logits", "mag_neg"}


def test_a_stage_before_or_behind_that_does_nothing_changes_nothing(problem):
    single = policy_of()
    for live in (0, 1):
        double = policy_of(stages=2)
        with torch.no_grad():
            for name in ("logits", "mag_neg", "mag_pos"):
                getattr(double, name)[live] = getattr(single, name)[0]
            double.logits[1 - live] = torch.tensor([60.0, 0.0, 0.0])  # only no_op
        values = [
            expected_over_seeds(p, problem, stage)
            for p, stage in ((single, 0), (double, live))
        ]
        torch.testing.assert_close(*values, rtol=0.1, atol=2e-3)


def expected_over_seeds(policy, problem, stage):
    record_losses, params, direction, x, labels = problem
    found = [
        alignment_gradient(
            policy, x, labels, record_losses, params, direction, seeded(seed)
        )["logits"][stage]
        for seed in range(400)
    ]
    return torch.stack(found).mean(dim=0)


def test_logit_gradients_of_a_stage_sum_to_zero(problem):
    record_losses, params, direction, x, labels = problem
    found = alignment_gradient(
        policy_of(stages=3), x, labels, record_losses, params, direction, seeded(0)
    )["logits"]
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(3).double())


def test_a_loss_without_the_weights_is_an_error(problem):
    _, params, direction, x, labels = problem
    with pytest.raises(ValueError, match="does not depend on the weights"):
        alignment_gradient(
            policy_of(),
            x,
            labels,
            lambda params, x, labels: x.sum(dim=(1, 2)),
            params,
            direction,
        )
