"""The alignment gradient against finite differences of an enumerated expectation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pyhealth.bilevel import alignment
from pyhealth.bilevel.alignment import (
    MAGNITUDE_STEP,
    alignment_gradient,
    magnitude_signs,
)
from pyhealth.models.policy_draw import PolicyDraw
from pyhealth.models.taskaug_policy import TaskAugPolicy

LEADS, LENGTH, RECORDS = 2, 40, 3
LABELS = torch.tensor([[1.0], [0.0], [1.0]]).double()


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
    def record_losses(params, x, rows):
        logit = torch.func.functional_call(net, dict(params), (x,))[:, 0]
        target = LABELS[rows].reshape(-1)
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
    x = normal(RECORDS, LEADS, LENGTH)
    return record_losses_of(net), params, direction, x, LABELS


OPERATIONS = ("no_op", "time_mask", "lead_dropout")


def policy_of(stages=1, shared=False, operations=OPERATIONS):
    policy = TaskAugPolicy(
        stages, shared_magnitudes=shared, operations=operations, sampling_rate=20
    ).double()
    return policy.randomize_(torch.Generator().manual_seed(2))


def replayed(policy, x, labels, seed):
    """The draw and the signs that a generator of this seed leads to."""
    generator = seeded(seed)
    draw = policy.sample(x.shape, labels, generator)
    return draw, magnitude_signs(labels, len(policy.operations), generator)


def slopes(policy, problem, draw, signs):
    """The slope along the direction for each operation of stage 0 and record (O, R).

    By central differences in the weights: nothing of the code under test but the
    policy's operations.
    """
    record_losses, params, direction, x, labels = problem
    found, all_rows = [], list(range(len(x)))
    for column, op in enumerate(policy.operations):
        unbounded = torch.where(
            labels[:, 0] == 1, policy.mag_pos[0, column], policy.mag_neg[0, column]
        )
        share = (unbounded + MAGNITUDE_STEP * signs[column]).sigmoid()
        magnitude = (op.low + (op.high - op.low) * share).detach()
        signals = op.apply(x, magnitude, draw.stages[0].noise[op.name], 20)
        up, down = (
            record_losses(
                {n: params[n] + e * direction[n] for n in params}, signals, all_rows
            )
            for e in (1e-6, -1e-6)
        )
        found.append((up - down) / 2e-6)
    return torch.stack(found)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_logit_gradient_is_the_slope_of_the_enumerated_expectation(problem):
    policy = policy_of()
    record_losses, params, direction, x, labels = problem
    found = alignment_gradient(
        policy, x, labels, record_losses, params, direction, seeded(7)
    )["logits"][0]
    value = slopes(policy, problem, *replayed(policy, x, labels, 7)).mean(dim=1)

    def expectation(logits):
        return -(logits.softmax(dim=0) * value).sum()

    logits = policy.logits[0].detach()
    for column in range(3):
        step = 1e-5 * torch.eye(3).double()[column]
        slope = (expectation(logits + step) - expectation(logits - step)) / 2e-5
        assert found[column].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_magnitude_gradient_is_on_average_the_central_difference(
    problem, shared, monkeypatch
):
    """Averaged over all 2^O signs that the operations can have, it is exactly that."""
    policy = policy_of(shared=shared)
    record_losses, params, direction, x, labels = problem
    draw, signs = replayed(policy, x, labels, 7)
    found = []
    for pattern in product((-1.0, 1.0), repeat=len(OPERATIONS)):
        given = torch.tensor(pattern)[:, None].expand_as(signs)
        monkeypatch.setattr(alignment, "magnitude_signs", lambda *_, s=given: s)
        found.append(
            alignment_gradient(
                policy, x, labels, record_losses, params, direction, seeded(7)
            )
        )
    up, down = (
        slopes(policy, problem, draw, torch.full_like(signs, sign)) for sign in (1, -1)
    )
    central = -policy.probabilities()[0][:, None] * (up - down) / (2 * MAGNITUDE_STEP)
    weights = {"mag_neg": 1 - labels.T, "mag_pos": labels.T}
    if shared:
        weights = {"mag_neg": torch.ones_like(labels.T)}
    assert set(found[0]) == {"logits", *weights}
    for name, weight in weights.items():
        mean = torch.stack([h[name][0] for h in found]).mean(dim=0)
        expected = (central * weight).mean(dim=1)
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-9)
        assert expected[1:].abs().min() > 1e-6


def test_an_operation_without_a_magnitude_moves_none(problem):
    record_losses, params, direction, x, labels = problem
    found = alignment_gradient(policy_of(), x, labels, record_losses, params, direction)
    assert found["mag_neg"][0, 0] == 0  # of no_op
    assert found["mag_neg"][0, 1:].abs().min() > 0


@pytest.mark.parametrize("records", [1, 2, 7, 8])
def test_signs_are_balanced_in_each_class_and_fair(records):
    labels = (torch.arange(records) % 2)[:, None].float()
    drawn = torch.stack([magnitude_signs(labels, 5, seeded(s)) for s in range(400)])
    assert drawn.abs().eq(1).all()
    assert drawn.sum(dim=2).abs().max() <= 1
    for label in (0, 1):
        assert drawn[:, :, labels[:, 0] == label].sum(dim=2).abs().max() <= 1
    assert drawn.mean(dim=0).abs().max() < 4 / 400**0.5


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


@pytest.mark.slow
@pytest.mark.parametrize("live", [0, 1])
def test_stages_share_the_records_and_those_that_do_nothing_change_nothing(
    problem, live
):
    single, double = policy_of(), policy_of(stages=2)
    with torch.no_grad():
        for name in ("logits", "mag_neg", "mag_pos"):
            getattr(double, name)[live] = getattr(single, name)[0]
        double.logits[1 - live] = torch.tensor([60.0, 0.0, 0.0])  # only no_op
    own = range(RECORDS)[live::2]
    alone = over_seeds(single, problem, list(own))[:, 0]
    among = over_seeds(double, problem, list(range(RECORDS)))[:, live]
    difference = alone.mean(dim=0) - among.mean(dim=0)
    noise = ((alone.var(dim=0) + among.var(dim=0)) / len(alone)).sqrt()
    assert difference.abs().le(3 * noise + 1e-9).all()
    # The noise is small enough for the wrong records or stage to be seen.
    assert noise.norm() < 0.2 * alone.mean(dim=0).norm()


def over_seeds(policy, problem, chosen):
    """The logits' derivatives (seeds, K, O), from the chosen records alone."""
    record_losses, params, direction, x, labels = problem

    def losses(params, x, rows):
        return record_losses(params, x, [chosen[row] for row in rows])

    found = [
        alignment_gradient(
            policy, x[chosen], labels[chosen], losses, params, direction, seeded(seed)
        )["logits"]
        for seed in range(500)
    ]
    return torch.stack(found)


def test_the_other_stages_do_what_they_drew():
    """To the byte what the complete draw makes of each operation's signals."""
    x = torch.randn(36, 3, 50, generator=seeded(1), dtype=torch.float64)
    labels = (torch.arange(36) % 2)[:, None].double()
    w = {"w": torch.ones(())}
    operations = ("gaussian_noise", "no_op", "temporal_warp", "lead_dropout")
    policy, classified = policy_of(stages=3, operations=operations), []

    def losses(params, signals, rows):
        classified.append(signals)
        return params["w"] * signals.std(dim=(1, 2))

    alignment_gradient(policy, x, labels, losses, w, w, seeded(3))
    generator, expected = seeded(3), []
    for stage in range(3):
        own, classes = x[stage::3], labels[stage::3]
        draw = policy.sample(own.shape, classes, generator)
        signs = magnitude_signs(classes, len(operations), generator)
        with torch.no_grad():
            own = policy.apply(own, classes, PolicyDraw(draw.stages[:stage]))
            shift = MAGNITUDE_STEP * signs.T
            each = policy.enumerate_stage(
                stage, own, classes, draw.stages[stage], shift
            )
            after = PolicyDraw(draw.stages[stage + 1 :], stage + 1)
            expected += [policy.apply(one, classes, after) for one in each]
    assert torch.cat(expected).equal(classified[0])


def test_more_stages_than_records_share_all_of_them(problem):
    record_losses, params, direction, x, labels = problem
    found = alignment_gradient(
        policy_of(stages=3), x[:1], labels[:1], record_losses, params, direction
    )
    assert found["logits"].abs().sum(dim=1).min() > 0


class OnlyBackward(torch.autograd.Function):
    """The exponential, without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def test_a_layer_without_forward_mode_gives_the_same_numbers(problem):
    record_losses, params, direction, x, labels = problem

    def gradient_with(function):
        def losses(params, x, rows):
            return function(record_losses(params, x, rows))

        return alignment_gradient(
            policy_of(stages=2), x, labels, losses, params, direction, seeded(5)
        )

    expected, found = gradient_with(torch.exp), gradient_with(OnlyBackward.apply)
    assert expected["logits"].abs().max() > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        assert not found[name].requires_grad


def test_a_layer_that_cannot_be_differentiated_twice_is_an_error(problem):
    """Left to itself, torch drops what lies below such a layer from the derivative."""
    record_losses, params, direction, x, labels = problem

    class Once(OnlyBackward):
        backward = staticmethod(once_differentiable(OnlyBackward.backward))

    def losses(params, x, rows):
        return record_losses({n: Once.apply(p) for n, p in params.items()}, x, rows)

    with pytest.raises(RuntimeError, match="only once in reverse mode"):
        alignment_gradient(policy_of(), x, labels, losses, params, direction)


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
            lambda params, x, rows: x.sum(dim=(1, 2)),
            params,
            direction,
        )
