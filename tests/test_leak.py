"""The leak probe: it finds what a policy gives away of the label, and only that."""

import pytest
import torch

from pyhealth.bilevel.leak import leak_auroc
from pyhealth.models.ecg_augmentations import AUGMENTATIONS
from pyhealth.models.taskaug_policy import TaskAugPolicy

RATE = 50
MOVING = [name for name in AUGMENTATIONS if name != "no_op"]


@pytest.fixture(scope="module")
def signals():
    """Walks of unit variance, of very different loudness a record."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 250, generator=generator).cumsum(dim=-1)
    x = (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, keepdim=True)
    return x * torch.logspace(-1, 1, 64)[:, None, None]


def policy_of(neg, pos, operations=None, **settings):
    """A policy whose magnitudes are these shares of the intervals."""
    policy = TaskAugPolicy(1, operations=operations, sampling_rate=RATE, **settings)
    with torch.no_grad():
        policy.mag_neg.fill_(torch.tensor(neg).logit())
        policy.mag_pos.fill_(torch.tensor(pos).logit())
    return policy


@pytest.mark.parametrize("operation", MOVING)
def test_very_different_magnitudes_are_seen_in_every_operation(signals, operation):
    # A gain or a delay is drawn between zero and its magnitude: often both could be.
    uniform = operation in ("magnitude_scale", "temporal_displacement")
    auroc = leak_auroc(policy_of(0.02, 0.9, [operation]), signals)
    assert auroc > (0.9 if uniform else 0.97)


def test_equal_magnitudes_give_nothing_away(signals):
    values = [leak_auroc(policy_of(0.5, 0.5), signals, seed=seed) for seed in range(5)]
    assert abs(sum(values) / 5 - 0.5) < 0.05  # one has a deviation of 0.04
    assert max(abs(value - 0.5) for value in values) < 0.15


def test_shared_magnitudes_give_nothing_away(signals):
    policy = policy_of(0.9, 0.9, shared_magnitudes=True)
    assert abs(leak_auroc(policy, signals) - 0.5) < 0.15


def test_more_difference_is_more_leak(signals):
    values = [leak_auroc(policy_of(0.5, pos), signals) for pos in (0.5, 0.6, 0.95)]
    assert values[0] + 0.1 < values[1] < values[2] - 0.02


def test_it_repeats_and_leaves_policy_and_generator_alone(signals):
    policy = policy_of(0.4, 0.6)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    state = torch.get_rng_state()
    assert leak_auroc(policy, signals, seed=3) == leak_auroc(policy, signals, seed=3)
    assert torch.get_rng_state().equal(state)
    assert all(p.grad is None for p in policy.parameters())
    for name, value in policy.state_dict().items():
        assert value.equal(before[name])


def test_flat_leads_do_not_upset_it(signals):
    flat = signals.clone()
    flat[:, 1] = 0
    assert leak_auroc(policy_of(0.02, 0.9, ["time_mask"]), flat) > 0.97


def test_errors(signals):
    with pytest.raises(ValueError, match="5 or more records, got 4"):
        leak_auroc(policy_of(0.5, 0.5), signals[:4])
    with pytest.raises(ValueError, match="without stages changes nothing"):
        leak_auroc(TaskAugPolicy(0), signals)
