"""Outer objectives: what the policy lowers on the clean validation batch.

The classifier is trained on its model's own loss. That loss need not be what the policy
is judged by: a network that has seen its training records many times is sure of itself,
and then whatever makes it less sure lowers the cross-entropy on validation records,
whether or not it ranks them better. The other two objectives do not reward that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

__all__ = ["OUTER_LOSSES", "OuterLoss", "calibrated_loss", "ranking_loss"]

#: ``outer_loss(logit, label)`` -> scalar, both (B, 1).
type OuterLoss = Callable[[Tensor, Tensor], Tensor]

#: Weights of the normal priors on slope and bias: without them a batch that the logits
#: separate, or one of a single class, has no finite best fit.
CALIBRATION_PRIORS = (1e-3, 1e-5)
CALIBRATION_STEPS = 10


def ranking_loss(logit: Tensor, label: Tensor) -> Tensor:
    """Return the pairwise logistic loss, a smooth stand-in for 1 - AUROC.

    The mean of ``log(1 + exp(-(z+ - z-)))`` over all pairs of a positive and a negative
    record. It does not change when a constant is added to all logits.

    Args:
        logit: scores (B, 1), any real number.
        label: classes (B, 1), 0 or 1.

    Returns:
        Scalar, 0 or more; 0, with no gradient to speak of, where one class is missing.

    Source:
        Gao, Zhou, On the consistency of AUC pairwise optimization, IJCAI 2015.

    Examples:
        >>> logit, label = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]])
        >>> round(ranking_loss(logit, label).item(), 4)
        0.0486
    """
    positive = label.to(logit).reshape(-1, 1)
    pairs = positive * (1 - positive.T)
    score = logit.reshape(-1, 1)
    losses = softplus(score.T - score)
    return (pairs * losses).sum() / pairs.sum().clamp_min(1)


def calibrated_loss(logit: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy after the best temperature and bias for this batch.

    What is left is what a recalibration could not mend. Temperature and bias, of the
    standardised scores and with weak normal priors, are fitted by Newton's method and
    then held fixed: at the optimum their own derivative is zero.

    Args:
        logit: scores (B, 1).
        label: classes (B, 1), 0 or 1.

    Returns:
        Scalar, 0 or more.

    Source:
        Guo et al., On calibration of modern neural networks, ICML 2017 (temperature);
        Platt 1999 (with a bias).

    Examples:
        >>> label = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
        >>> sure = torch.tensor([[9.0], [-9.0], [-9.0], [9.0]])
        >>> round(calibrated_loss(sure, label).item(), 2)  # the base rate's: log 2
        0.69
    """
    score, target = logit.flatten(), label.to(logit).flatten()
    # The smallest spread is for scores that are all alike: no slope for rounding noise.
    spread = score.var(correction=0).clamp_min(1e-12).sqrt()
    score = (score - score.mean()) / spread
    design = torch.stack([score, torch.ones_like(score)], dim=1)
    prior = design.new_tensor(CALIBRATION_PRIORS)
    beta = _fitted(design.detach(), target, prior)
    fit = binary_cross_entropy_with_logits(design @ beta, target)
    return fit + (prior * beta.square()).sum() / 2


#: By name; "model" stands for the model's own loss and is not in here.
OUTER_LOSSES: Mapping[str, OuterLoss] = {
    "ranking": ranking_loss,
    "calibrated": calibrated_loss,
}


def _fitted(design: Tensor, target: Tensor, prior: Tensor) -> Tensor:
    """Return the coefficients of a logistic regression with normal priors."""
    wide, goal = design.double(), target.double()
    prior = prior.double()
    beta = torch.zeros_like(prior)
    for _ in range(CALIBRATION_STEPS):
        probability = (wide @ beta).sigmoid()
        gradient = wide.T @ (probability - goal) / len(goal) + prior * beta
        weight = probability * (1 - probability) / len(goal)
        hessian = wide.T @ (weight[:, None] * wide) + prior.diag()
        beta = beta - torch.linalg.solve(hessian, gradient)
    return beta.to(design)
