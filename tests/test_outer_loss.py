"""The outer objectives: values by hand, what they ignore, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from pyhealth.bilevel.outer_loss import OUTER_LOSSES, calibrated_loss, ranking_loss


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    label = (torch.arange(40) % 4 == 0).double()[:, None]
    logit = torch.randn(40, 1, generator=generator, dtype=torch.float64) + label
    return logit, label


def test_ranking_loss_is_the_mean_over_the_pairs():
    logit = torch.tensor([[1.0], [0.5], [-2.0]])
    label = torch.tensor([[1.0], [0.0], [0.0]])
    by_hand = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-3.0))) / 2
    assert ranking_loss(logit, label).item() == pytest.approx(by_hand)


def test_ranking_loss_ignores_a_constant_and_takes_one_class(scores):
    logit, label = scores
    torch.testing.assert_close(
        ranking_loss(logit, label), ranking_loss(logit + 7, label)
    )
    moved = logit.clone().requires_grad_()
    loss = ranking_loss(moved, torch.zeros_like(label))
    loss.backward()
    assert loss == 0
    assert moved.grad.abs().max() == 0


def test_calibrated_loss_is_that_of_a_logistic_regression(scores):
    logit, label = scores
    fitted = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000)
    fitted.fit(logit.numpy(), label[:, 0].numpy())
    best = log_loss(label[:, 0].numpy(), fitted.predict_proba(logit.numpy())[:, 1])
    found = calibrated_loss(logit, label).item()
    assert best <= found < best + 2e-3  # the priors keep it a little off


@pytest.mark.parametrize(("slope", "bias"), [(5.0, -3.0), (0.01, 0.0)])
def test_calibrated_loss_ignores_temperature_and_bias(scores, slope, bias):
    logit, label = scores
    torch.testing.assert_close(
        calibrated_loss(slope * logit + bias, label),
        calibrated_loss(logit, label),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("case", ["separated", "one class", "constant"])
def test_calibrated_loss_is_finite_where_no_fit_is(scores, case):
    logit, label = scores
    if case == "separated":
        logit = logit + 100 * label
    elif case == "one class":
        label = torch.ones_like(label)
    else:
        logit = torch.zeros_like(logit)
    logit = logit.requires_grad_()
    loss = calibrated_loss(logit, label)
    loss.backward()
    assert loss.isfinite()
    assert logit.grad.isfinite().all()


@pytest.mark.parametrize("name", OUTER_LOSSES)
def test_gradient_is_that_of_finite_differences(scores, name):
    logit, label = scores
    loss = OUTER_LOSSES[name]
    moved = logit.clone().requires_grad_()
    loss(moved, label).backward()
    for index in (0, 1, 7):
        step = torch.zeros_like(logit)
        step[index] = 1e-5
        slope = (loss(logit + step, label) - loss(logit - step, label)).item() / 2e-5
        assert moved.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_labels_of_another_type_follow_the_logits(scores):
    logit, label = scores
    for loss in OUTER_LOSSES.values():
        found = loss(logit.float(), label.long())
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(loss(logit, label).item(), rel=1e-5)
