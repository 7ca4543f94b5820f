"""One bi-level step against brute force: replayed steps, dense derivatives, bytes.

The oracle replays the step on copies: the recorded draw, a real ``torch.optim`` step,
the validation loss in eval mode, central differences in every number of the policy. It
shares no code with ``hypergradient``. The running statistics of a replay are those of
the unperturbed step: that they too depend on the policy is not part of the definition.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import statistics
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pyhealth.models.base_model import BaseModel
from test_ptbxl import published
from torch import nn

from pyhealth.bilevel import alignment
from pyhealth.bilevel.alignment import MAGNITUDE_STEP
from pyhealth.bilevel.classifier import classifier_parameters
from pyhealth.bilevel.outer import PolicyOptimizer
from pyhealth.bilevel.outer_loss import OUTER_LOSSES, ranking_loss
from pyhealth.bilevel.step import BiLevelStep
from pyhealth.datasets import create_sample_dataset
from pyhealth.models.taskaug_policy import TaskAugPolicy
from pyhealth.models.taskaug_resnet import TaskAugResNet
from pyhealth.processors.ecg_processor import ECGProcessor

LEADS, LENGTH, RATE = 3, 100, 50
#: Half the interval of the central difference. The weights' gradient jumps where a ReLU
#: switches, so a switch inside the interval spoils it: at 1e-5 that happens, at 1e-7 it
#: is rare, and the rounding of a float64 loss, 1e-16 / 1e-7, is far below the slopes.
HALF_WITH_KINKS, HALF = 1e-7, 1e-6
METHODS = ("one_step", "neumann", "darts")


@pytest.fixture(scope="module")
def dataset():
    samples = [
        {"patient_id": str(i), "ecg": [[0.0] * LENGTH] * LEADS, "label": i}
        for i in range(2)
    ]
    return create_sample_dataset(samples, {"ecg": "tensor"}, {"label": "binary"})


class SmoothNet(BaseModel):
    """A tiny PyHealth model without kinks: convolution, BatchNorm, tanh, dropout."""

    def __init__(self, dataset, dropout=0.0):
        super().__init__(dataset)
        self.conv = nn.Conv1d(LEADS, 2, 7, stride=4, bias=False)
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2, 1)

    def forward(self, **kwargs):
        hidden = self.norm(self.conv(kwargs["ecg"])).tanh()
        logit = self.head(self.dropout(hidden).square().mean(dim=-1))
        label = kwargs["label"]
        return {
            "logit": logit,
            "y_prob": self.prepare_y_prob(logit),
            "loss": self.get_loss_function()(logit, label),
            "y_true": label,
        }


class Mask(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask if self.training else x


def batch_of(records, seed):
    generator = torch.Generator().manual_seed(seed)
    label = (torch.arange(records) % 2).double()[:, None]
    x = torch.randn(records, LEADS, LENGTH, generator=generator, dtype=torch.float64)
    wave = torch.sin(torch.arange(LENGTH) / 4).double()
    return {
        "ecg": x + label[:, :, None] * wave,
        "label": label,
        "patient_id": [str(i) for i in range(records)],
    }


def policy_of(num_stages=1, seed=0, **settings):
    policy = TaskAugPolicy(num_stages, sampling_rate=RATE, **settings).double()
    return policy.randomize_(torch.Generator().manual_seed(seed))


def step_of(model, policy, optimizer="adam", warmup=3, seed=0, **settings):
    """A step in float64, some steps into its training."""
    model = model.double()
    params = classifier_parameters(model, policy)
    optimizers = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.05),
        "fused adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
        "adam with weight decay": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    made = optimizers[optimizer](params.values())
    generator = torch.Generator().manual_seed(seed)
    step = BiLevelStep(
        model, policy, params, made, "ecg", "label", generator, **settings
    )
    for index in range(warmup):
        step.inner(batch_of(12, seed=10 + index))
    return step


@pytest.fixture
def resnet(dataset):
    """The real network without its max-pool, which has kinks of its own."""
    torch.manual_seed(0)
    model = TaskAugResNet(
        dataset,
        LEADS,
        policy_stages=1,
        base_width=4,
        stem_pool=False,
        sampling_rate=RATE,
    )
    model.augment = False
    model.policy.double().randomize_(torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def smooth(dataset):
    torch.manual_seed(1)
    return SmoothNet(dataset)


def recorded(policy):
    """Record every draw of a policy from now on."""
    draws, sample = [], policy.sample

    def spy(*args, **kwargs):
        draws.append(sample(*args, **kwargs))
        return draws[-1]

    policy.sample = spy
    return draws


class Replay:
    """The step once more, on copies made before it, with other policies."""

    def __init__(self, step, half=HALF):
        self.step, self.half = step, half
        copies = deepcopy((step.classifier.model, step.policy, step.optimizer))
        self.model, self.policy, self.optimizer = copies
        self.weights = deepcopy(self.model.state_dict())
        self.optimizer_state = deepcopy(self.optimizer.state_dict())
        self.buffers = None

    def validation_loss(self, batch, val_batch, draw):
        """Return L_val(w') under the present parameters of ``self.policy``."""
        phi = deepcopy(self.policy.state_dict())
        self.model.load_state_dict(self.weights)  # of a policy inside, too
        self.policy.load_state_dict(phi)
        self.optimizer.load_state_dict(deepcopy(self.optimizer_state))
        with torch.no_grad():
            x = self.policy.apply(batch["ecg"], batch["label"], draw)
        self.model.train()
        self.optimizer.zero_grad()
        self.model(**{**batch, "ecg": x})["loss"].backward()
        self.optimizer.step()
        buffers = dict(self.model.named_buffers())
        self.buffers = self.buffers or deepcopy(buffers)
        for name, buffer in buffers.items():
            buffer.copy_(self.buffers[name])
        self.model.train(self.step.classifier.val_statistics == "batch")
        with torch.no_grad():
            return self.model(**val_batch)["loss"].item()

    def differences(self, batch, val_batch, draw):
        """Return the central differences in every number of the policy, by name."""
        self.validation_loss(batch, val_batch, draw)  # keeps the running statistics
        result = {}
        for name, parameter in self.policy.named_parameters():
            flat, slopes = parameter.data.view(-1), torch.zeros_like(parameter)
            for index, value in enumerate(flat.tolist()):
                sides = []
                for shift in (self.half, -self.half):
                    flat[index] = value + shift
                    sides.append(self.validation_loss(batch, val_batch, draw))
                flat[index] = value
                slopes.view(-1)[index] = (sides[0] - sides[1]) / (2 * self.half)
            result[name] = slopes
        return result


def assert_close(actual, expected, tolerance=1e-4, smallest=1e-5):
    """Each parameter's derivative agrees, and there is something to agree on."""
    assert actual.keys() == expected.keys()
    for name, slope in expected.items():
        assert slope.norm() > smallest, f"{name} tests nothing: {slope.norm()}"
        error = ((actual[name] - slope).norm() / slope.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error}"


def dense(step, batch, val_batch, draw):
    """Return (g, H, M): dL_val/dw, d2L_train/dw2, d2L_train/dw dphi, by plain autograd.

    The columns of M are those of the policy's parameters, flat and in order.
    """
    model, policy = deepcopy((step.classifier.model, step.policy))
    params = list(classifier_parameters(model, policy).values())
    phi = list(policy.parameters())
    model.train()
    x = policy.apply(batch["ecg"], batch["label"], draw)
    train_loss = model(**{**batch, "ecg": x})["loss"]
    model.eval()
    val_loss = model(**val_batch)["loss"]

    def flat(value, of):
        gradients = torch.autograd.grad(
            value, of, create_graph=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten() for gradient in gradients])

    first = flat(train_loss, params)
    hessian = torch.stack([flat(value, params) for value in first]).detach()
    mixed = torch.stack([flat(value, phi) for value in first]).detach()
    return flat(val_loss, params).detach(), hessian, mixed


def flattened(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# The hypergradient's value


@pytest.mark.slow
def test_one_step_is_the_slope_of_a_replayed_adam_step(resnet):
    step = step_of(resnet, resnet.policy)
    replay, draws = Replay(step, HALF_WITH_KINKS), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    assert_close(gradient, replay.differences(batch, val_batch, draws[0]))


@pytest.mark.parametrize(
    ("optimizer", "val_statistics", "policy"),
    [
        ("adam with weight decay", "running", {"num_stages": 2}),
        ("sgd", "running", {"selection": "batch", "seed": 3}),
        ("adam", "batch", {"shared_magnitudes": True, "seed": 1}),
        (
            "adam",
            "running",
            {"num_stages": 3, "operations": ("time_mask", "no_op"), "seed": 1},
        ),
    ],
)
def test_one_step_is_the_slope_for_any_settings(
    smooth, optimizer, val_statistics, policy
):
    step = step_of(
        smooth, policy_of(**policy), optimizer, val_statistics=val_statistics
    )
    replay, draws = Replay(step), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    assert_close(gradient, replay.differences(batch, val_batch, draws[0]))


def test_one_step_is_the_slope_for_a_regression_loss(smooth):
    smooth.get_loss_function = lambda: nn.functional.mse_loss  # PyHealth's regression
    step = step_of(smooth, policy_of(shared_magnitudes=True))
    replay, draws = Replay(step), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    assert_close(gradient, replay.differences(batch, val_batch, draws[0]))


@pytest.mark.parametrize("keep_graph", [True, False])
def test_dropout_has_one_mask_in_both_steps(dataset, keep_graph):
    torch.manual_seed(0)
    model = SmoothNet(dataset, dropout=0.5)
    step = step_of(model, policy_of(), keep_graph=keep_graph)
    replay, draws, masks = Replay(step), recorded(step.policy), []

    def keep(module, inputs, output):
        if module.training:
            masks.append((output != 0) / (1 - module.p))

    model.dropout.register_forward_hook(keep)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    # One forward pass serves both derivatives, or each makes one of its own.
    assert len(masks) == 1 if keep_graph else len(masks) >= 2
    assert all(mask.equal(masks[0]) for mask in masks)
    assert masks[0].unique().tolist() == [0, 2]
    replay.model.dropout = Mask(masks[0])
    assert_close(gradient, replay.differences(batch, val_batch, draws[0]))
    step.inner_and_outer(batch, val_batch)
    assert not masks[-1].equal(masks[0])  # the next step has another


@pytest.mark.parametrize("terms", [0, 2])
def test_neumann_is_the_truncated_series_of_the_dense_hessian(smooth, terms):
    lr = 0.3
    step = step_of(
        smooth, policy_of(), method="neumann", neumann_terms=terms, neumann_lr=lr
    )
    before, draws = deepcopy(step), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    g, hessian, mixed = dense(before, batch, val_batch, draws[0])
    damped = torch.eye(len(g)) - lr * hessian
    power, series = torch.eye(len(g), dtype=g.dtype), torch.zeros_like(hessian)
    for _ in range(terms + 1):
        series, power = series + power, power @ damped
    expected = -mixed.T @ (lr * series @ g)
    assert expected.norm() > 1e-4
    torch.testing.assert_close(flattened(gradient), expected, rtol=1e-9, atol=1e-12)
    plain = -mixed.T @ (lr * g)  # the terms matter, or the test says nothing of them
    assert terms == 0 or (expected - plain).norm() > 1e-2 * plain.norm()


def test_darts_is_plain_autograd_through_the_augmented_validation_batch(smooth):
    step = step_of(smooth, policy_of(), method="darts")
    before, draws = deepcopy(step), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    model, policy = before.classifier.model, before.policy
    with torch.no_grad():  # the statistics that the inner step's forward leaves
        model.train()
        model(**{**batch, "ecg": policy.apply(batch["ecg"], batch["label"], draws[0])})
    model.eval()
    x = policy.apply(val_batch["ecg"], val_batch["label"], draws[1])
    loss = model(**{**val_batch, "ecg": x})["loss"]
    names, leaves = zip(*policy.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    assert_close(gradient, expected, tolerance=1e-10)


def test_joint_inner_step_gives_the_policy_the_training_gradient(smooth):
    policy = policy_of()
    step = step_of(smooth, policy)
    before, draws = deepcopy(step), recorded(policy)
    batch = batch_of(12, seed=0)

    loss = step.inner(batch, joint=True)

    x = before.policy.apply(batch["ecg"], batch["label"], draws[0])
    before.classifier.model.train()
    before.classifier.model(**{**batch, "ecg": x})["loss"].backward()
    expected = {name: p.grad for name, p in before.policy.named_parameters()}
    assert not loss.requires_grad
    assert_close(
        {name: p.grad for name, p in policy.named_parameters()}, expected, 1e-10
    )


# What the outer step leaves alone


def global_states():
    name, keys, *rest = np.random.get_state()
    return (
        torch.random.get_rng_state().tolist(),
        (name, keys.tolist(), *rest),
        random.getstate(),
    )


@pytest.mark.parametrize("val_statistics", ["running", "batch"])
@pytest.mark.parametrize("method", METHODS)
def test_outer_step_changes_nothing_beside_the_inner_one(
    dataset, method, val_statistics
):
    torch.manual_seed(0)
    model = SmoothNet(dataset, dropout=0.5)
    step = step_of(
        model,
        policy_of(),
        method=method,
        neumann_lr=0.01,
        val_statistics=val_statistics,
    )
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)
    draw = step.policy.sample(batch["ecg"].shape)
    plain = deepcopy(step)
    for one in (plain, step):
        draw_first(one.policy, draw)
    for parameter in step.policy.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    states, phi = global_states(), deepcopy(step.policy.state_dict())

    expected_loss = plain.inner(batch)
    loss, gradient = step.inner_and_outer(batch, val_batch)

    assert global_states() == states
    assert flattened(gradient).norm() > 0
    assert loss.equal(expected_loss)
    # weights, running statistics, optimiser and .grad: as after the inner step alone
    assert_same_bytes(
        step.classifier.model.state_dict(), plain.classifier.model.state_dict()
    )
    assert_same_bytes(gradients(step), gradients(plain))
    of_step, of_plain = (one.optimizer.state_dict()["state"] for one in (step, plain))
    for index, state in of_plain.items():
        assert_same_bytes(of_step[index], state)
    assert_same_bytes(step.policy.state_dict(), phi)
    assert all(p.grad.eq(7.0).all() for p in step.policy.parameters())
    assert all(module.training for module in step.classifier.model.modules())


def draw_first(policy, draw):
    """Let the next draw be this one, and later ones (darts has one) as they come."""
    queue, sample = [draw], policy.sample
    policy.sample = lambda *a, **k: queue.pop() if queue else sample(*a, **k)


def gradients(step):
    return {name: parameter.grad for name, parameter in step.params.items()}


def assert_same_bytes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_inner_step_leaves_the_global_random_state(dataset):
    step = step_of(SmoothNet(dataset, dropout=0.5), policy_of(), warmup=0)
    states = global_states()
    step.inner(batch_of(12, seed=0))
    assert global_states() == states


# No path but the mixed derivative


@pytest.mark.parametrize("method", ["one_step", "neumann"])
def test_policy_never_sees_the_validation_batch(resnet, method):
    step = step_of(resnet, resnet.policy, method=method, neumann_lr=0.01)
    shapes, signals = [], []
    sample, apply = step.policy.sample, step.policy.apply
    step.policy.sample = lambda s, *a, **k: shapes.append(s) or sample(s, *a, **k)
    step.policy.apply = lambda x, *a, **k: signals.append(x) or apply(x, *a, **k)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    step.inner_and_outer(batch, val_batch)

    assert shapes == [batch["ecg"].shape]
    assert signals
    assert all(x.equal(batch["ecg"]) for x in signals)


def test_darts_does_augment_the_validation_batch(smooth):
    step = step_of(smooth, policy_of(), method="darts")
    draws = recorded(step.policy)
    step.inner_and_outer(batch_of(12, seed=0), batch_of(8, seed=1))
    records = [sum(len(rows) for rows in draw.stages[0].rows) for draw in draws]
    assert records == [12, 8]


def other_labels(batch):
    return {**batch, "label": 1 - batch["label"]}


@pytest.mark.parametrize("flip", [False, True])
def test_validation_labels_act_through_the_mixed_derivative_only(smooth, flip):
    """H = -M' p with an M that no validation label enters; p is all that they move."""
    step = step_of(
        smooth, policy_of(), method="neumann", neumann_terms=0, neumann_lr=1.0
    )
    before, draws = deepcopy(step), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)
    shown = other_labels(val_batch) if flip else val_batch

    _, gradient = step.inner_and_outer(batch, shown)

    _, _, mixed = dense(before, batch, val_batch, draws[0])
    g, _, _ = dense(before, batch, shown, draws[0])
    torch.testing.assert_close(flattened(gradient), -mixed.T @ g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", ["one_step", "neumann"])
def test_no_hypergradient_where_the_training_batch_cannot_feel_the_policy(
    smooth, method, flip
):
    """Every operation leaves a silent record silent, whatever its magnitude."""
    step = step_of(smooth, policy_of(), method=method, neumann_lr=0.01)
    batch = batch_of(12, seed=0)
    batch["ecg"] = torch.zeros_like(batch["ecg"])
    val_batch = batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(
        batch, other_labels(val_batch) if flip else val_batch
    )

    assert flattened(gradient).eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_hypergradient_where_every_record_draws_no_op(smooth, method):
    policy = policy_of(2, operations=("no_op",))
    step = step_of(smooth, policy, method=method, neumann_lr=0.01)

    _, gradient = step.inner_and_outer(batch_of(12, seed=0), batch_of(8, seed=1))

    assert gradient.keys() == dict(policy.named_parameters()).keys()
    assert flattened(gradient).eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_drew_only_no_op_still_teaches_the_logits(smooth, method):
    policy = policy_of(operations=("no_op", "time_mask"), shared_magnitudes=True)
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([[30.0, 0.0]]))  # time_mask is never drawn
    policy.temperature = 30.0  # yet its slope is not rounded away
    step = step_of(smooth, policy, method=method, neumann_lr=0.01)

    _, gradient = step.inner_and_outer(batch_of(12, seed=0), batch_of(8, seed=1))

    assert gradient["mag_neg"].eq(0).all()
    assert gradient["logits"].norm() > 0


def test_batch_statistics_leave_the_dropout_of_the_validation_off(dataset):
    """What differs is the normalisation alone: without one there is no difference."""
    results = []
    for val_statistics in ("running", "batch"):
        torch.manual_seed(0)
        model = SmoothNet(dataset, dropout=0.5)
        model.norm = nn.Identity()
        step = step_of(model, policy_of(), val_statistics=val_statistics)
        _, gradient = step.inner_and_outer(batch_of(12, seed=0), batch_of(8, seed=1))
        results.append(flattened(gradient))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


# Which parameters are trained


def test_classifier_parameters_are_the_weights_alone(dataset):
    model = TaskAugResNet(dataset, LEADS, base_width=4, sampling_rate=RATE)
    model.inner_model = SmoothNet(dataset)  # a PyHealth model within another
    model.backbone.head.bias.requires_grad_(False)
    names = classifier_parameters(model, model.policy).keys()
    assert {name.split(".")[0] for name in names} == {"backbone", "inner_model"}
    assert not [name for name in names if "_dummy_param" in name]
    assert "backbone.head.bias" not in names
    assert {"backbone.head.weight", "inner_model.conv.weight"} <= names


@pytest.mark.parametrize("step_name", ["inner", "inner_and_outer"])
def test_unused_parameter_is_an_error_that_names_it(smooth, step_name):
    smooth.spare = nn.Linear(2, 1)
    step = step_of(smooth, policy_of(), warmup=0)
    batches = [batch_of(12, seed=0), batch_of(8, seed=1)]
    with pytest.raises(ValueError, match=r"spare\.weight, spare\.bias.*requires_grad_"):
        getattr(step, step_name)(*batches[: 1 if step_name == "inner" else 2])

    smooth.spare.requires_grad_(False)  # the remedy that the message names
    step = step_of(smooth, policy_of(), warmup=0)
    step.inner_and_outer(*batches)


def test_a_policy_beside_the_models_own_replaces_it(resnet):
    """The model's own is then neither used nor trained, and no weight."""
    own = deepcopy(resnet.policy.state_dict())
    step = step_of(resnet, policy_of(seed=2))
    _, gradient = step.inner_and_outer(batch_of(12, seed=0), batch_of(8, seed=1))
    assert flattened(gradient).norm() > 0
    assert_same_bytes(resnet.policy.state_dict(), own)


# Steps that are not finite


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "fused adam"])
@pytest.mark.parametrize(
    ("where", "method"),
    [("training", "inner")]
    + [(where, method) for where in ("training", "validation") for method in METHODS],
)
def test_a_step_that_is_not_finite_changes_nothing(smooth, where, method, optimizer):
    """Also where the optimiser leaves the step out by itself, as on a GPU."""
    settings = {} if method == "inner" else {"method": method}
    if method == "neumann":
        settings["neumann_lr"] = 0.1
    step = step_of(smooth, policy_of(), optimizer, **settings)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)
    spoiled = {"training": batch, "validation": val_batch}[where]
    spoiled["ecg"][3, 1, 2] = torch.nan
    before = everything(step)

    if method == "inner":
        step.inner(batch)
    else:
        _, gradient = step.inner_and_outer(batch, val_batch)
        assert all(not value.any() for value in gradient.values())

    assert not step.finite
    assert_same(everything(step), before)
    step.inner(batch_of(12, seed=2))  # the next one is taken
    assert step.finite
    changed = everything(step)
    assert not changed["weights"]["head.weight"].equal(before["weights"]["head.weight"])


def everything(step):
    return deepcopy(
        {
            "weights": step.classifier.model.state_dict(),
            "policy": step.policy.state_dict(),
            "optimizer": step.optimizer.state_dict()["state"],
        }
    )


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["one_step", "neumann"])
def test_keeping_the_graph_changes_nothing_but_the_cost(smooth, method):
    lr = {"neumann_lr": 0.1, "neumann_terms": 2} if method == "neumann" else {}
    results = []
    for keep_graph in (True, False):
        step = step_of(
            deepcopy(smooth), policy_of(2), method=method, keep_graph=keep_graph, **lr
        )
        loss, gradient = step.inner_and_outer(batch_of(12, 0), batch_of(8, 1))
        results.append((loss, gradient, step.params))

    (loss, gradient, weights), (other_loss, other, other_weights) = results
    assert loss.equal(other_loss)
    for name, value in gradient.items():
        torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-12)
        assert value.abs().max() > 1e-6
    for name, weight in weights.items():
        assert weight.equal(other_weights[name])


class OnceOnly(torch.autograd.Function):
    """tanh whose backward pass cannot be differentiated, while forward mode works."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.tanh()

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent / x.cosh().square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / x.cosh().square()


def test_a_model_that_cannot_be_differentiated_twice_backward_still_learns(
    smooth,
):
    """The kept graph fails once; the derivative is formed anew, then and after."""

    class Once(SmoothNet):
        def forward(self, **kwargs):
            hidden = OnceOnly.apply(self.norm(self.conv(kwargs["ecg"])))
            logit = self.head(hidden.square().mean(dim=-1))
            loss = self.get_loss_function()(logit, kwargs["label"])
            return {"logit": logit, "loss": loss}

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("pyhealth.trainer.bilevel").addHandler(handler)
    once = deepcopy(smooth)
    once.__class__ = Once
    expected = step_of(deepcopy(smooth), policy_of(2))
    step = step_of(once, policy_of(2))
    for seed in (0, 2):
        _, gradient = step.inner_and_outer(batch_of(12, seed), batch_of(8, 1))
        _, wanted = expected.inner_and_outer(batch_of(12, seed), batch_of(8, 1))
        for name, value in gradient.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-12)

    logging.getLogger("pyhealth.trainer.bilevel").removeHandler(handler)
    assert len(told) == 1 and "only once in reverse mode" in told[0]


def a_step(model, optimizer, **settings):
    params = classifier_parameters(model, model.policy)
    generator = torch.Generator().manual_seed(0)
    return BiLevelStep(
        model, model.policy, params, optimizer, "ecg", "label", generator, **settings
    )


def begun(model, batch):
    """The model and its optimiser after ten inner steps in float32."""
    model.augment = False
    params = classifier_parameters(model, model.policy)
    optimizer = torch.optim.Adam(params.values(), lr=1e-3)
    step = a_step(model, optimizer)
    for _ in range(10):
        step.inner(batch)
    return model, optimizer


def bf16_and_float32(begun, batches, method, keep_graph=True):
    """The same hypergradient in both precisions."""
    found = []
    for precision in ("bf16", "fp32"):
        settings = {"method": method, "keep_graph": keep_graph, "neumann_lr": 1e-3}
        step = a_step(*deepcopy(begun), **settings, precision=precision)
        _, gradient = step.inner_and_outer(*batches)
        assert step.keep_graph == keep_graph  # autocast made nothing fall back
        result = step.classifier.model.eval()(**batches[1])
        assert result["y_prob"].dtype == result["loss"].dtype == torch.float32
        found.append(torch.cat([value.flatten() for value in gradient.values()]))
    rounded, exact = found
    assert rounded.dtype == torch.float32
    assert not rounded.equal(exact)  # it did compute in bf16
    return rounded, exact


@pytest.fixture(scope="module")
def pairs(dataset):
    """Fifteen begun networks, each with its batches."""
    made = []
    for pair in range(15):
        torch.manual_seed(pair)
        model = TaskAugResNet(dataset, LEADS, base_width=16, sampling_rate=RATE)
        batches = [batch_of(64, seed) for seed in (2 * pair, 2 * pair + 1)]
        for batch in batches:
            flipped = torch.arange(64) % 8 < 2  # so that the loss does not vanish
            label = torch.where(flipped[:, None], 1 - batch["label"], batch["label"])
            batch.update(ecg=batch["ecg"].float(), label=label.float())
        made.append((begun(model, batches[0]), batches))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keep_graph"),
    [
        ("alignment", True),  # it differentiates no graph a second time
        *itertools.product(("one_step", "neumann"), (True, False)),
    ],
)
def test_bf16_hypergradient_points_the_same_way(pairs, method, keep_graph):
    """On records that are not learned by heart, that is.

    With clean labels, where the loss and the hypergradient nearly vanish, the cosine of
    this same network was 0.86: rounding is then no longer small beside them.
    """
    cosines = []
    for pair in pairs:
        rounded, exact = bf16_and_float32(*pair, method, keep_graph)
        cosines.append(torch.cosine_similarity(exact, rounded, dim=0).item())
    # Processors round differently: one pair alone may lie lower, and a network of four
    # channels lies lower altogether where bf16 is not emulated (one_step: 0.91).
    assert statistics.median(cosines) > 0.95


@pytest.mark.slow
@published("PTBXL_ROOT")
@pytest.mark.parametrize(
    ("method", "cosine"), [("alignment", 0.98), ("one_step", 0.95), ("neumann", 0.95)]
)
def test_bf16_hypergradient_of_published_records(dataset, method, cosine):
    """benchmarks/precision.py asks more pairs: some of the last two lie lower."""
    root = Path(os.environ["PTBXL_ROOT"])
    table = pd.read_csv(root / "ptbxl_database.csv").head(128)
    processor = ECGProcessor(100, 1000, "lead")
    ecg = torch.stack([processor.process(root / path) for path in table["filename_lr"]])
    normal = torch.tensor(table["scp_codes"].str.contains("NORM").to_numpy())
    label = normal.float()[:, None]
    batches = [
        {"ecg": ecg[half], "label": label[half]} for half in (slice(64), slice(64, 128))
    ]
    torch.manual_seed(0)
    model = TaskAugResNet(dataset, base_width=8, sampling_rate=100)
    rounded, exact = bf16_and_float32(begun(model, batches[0]), batches, method)
    assert torch.cosine_similarity(exact, rounded, dim=0) > cosine


class TwoTerms(SmoothNet):
    """Its loss is more than that of its logits."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        return {**output, "loss": output["loss"] + self.conv.weight.square().sum()}


class WithoutLogit(SmoothNet):
    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        return {name: output[name] for name in ("loss", "y_prob")}


@pytest.mark.parametrize(
    ("kind", "message"),
    [(TwoTerms, "other terms or weights"), (WithoutLogit, r"needs \['logit', 'y_tr")],
)
def test_alignment_needs_a_loss_of_the_logits(dataset, kind, message):
    step = step_of(kind(dataset), policy_of(), method="alignment")
    with pytest.raises(ValueError, match=rf"{message}.* hypergradient='one_step'"):
        step.inner_and_outer(batch_of(12, 0), batch_of(8, 1))
    step_of(kind(dataset), policy_of()).inner_and_outer(batch_of(12, 0), batch_of(8, 1))


@pytest.mark.parametrize("method", ["alignment", "one_step"])
def test_outer_losses_are_formed_in_float32(smooth, method, monkeypatch):
    """PyHealth's models return their logits in the precision of autocast."""
    seen = []

    def spy(logit, label):
        seen.append(logit.dtype)
        return ranking_loss(logit, label)

    monkeypatch.setitem(OUTER_LOSSES, "ranking", spy)
    step = step_of(smooth, policy_of(), method=method, outer_loss="ranking")
    step.classifier.model.float()
    step.policy.float()
    step.optimizer.load_state_dict(step.optimizer.state_dict())
    step.classifier.precision = "bf16"
    batches = [batch_of(12, 0), batch_of(8, 1)]
    for batch in batches:
        batch |= {"ecg": batch["ecg"].float(), "label": batch["label"].float()}
    _, gradient = step.inner_and_outer(*batches)
    assert gradient["logits"].abs().max() > 0
    assert set(seen) == {torch.float32}


def test_unknown_precision_is_an_error(smooth):
    with pytest.raises(ValueError, match=r"must be one of .*'bf16'.*, got 'fp8'"):
        step_of(smooth, policy_of(), precision="fp8")


class Kinked(BaseModel):
    """Two layers with ReLUs and no BatchNorm: every record is on its own."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.hidden = nn.Linear(LEADS * LENGTH, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, **kwargs):
        logit = self.head(self.hidden(kwargs["ecg"].flatten(1)).relu())
        label = kwargs["label"]
        loss = self.get_loss_function()(logit, label)
        return {"logit": logit, "loss": loss, "y_true": label}


def test_alignment_is_the_expected_effect_of_real_optimiser_steps(dataset, monkeypatch):
    """A real step for each operation of each record, on a network with kinks.

    To first order in the step a record's operation moves the validation loss whatever
    the others drew, so the expectation over all draws is the sum of one record's
    effects. The step is so small that the second order is below the tolerance.
    """
    torch.manual_seed(0)
    model, policy = Kinked(dataset).double(), policy_of(1, shared_magnitudes=True)
    params = classifier_parameters(model, policy)
    optimizer = torch.optim.SGD(params.values(), lr=1e-5)
    step = BiLevelStep(
        model,
        policy,
        params,
        optimizer,
        "ecg",
        "label",
        torch.Generator().manual_seed(0),
        method="alignment",
        alignment_records=4,
    )
    batch, val_batch = batch_of(4, seed=1), batch_of(9, seed=2)
    draws, weights = recorded(policy), deepcopy(model.state_dict())
    signs = torch.ones(len(policy.operations), 4)
    signs[:, ::2] = -1
    monkeypatch.setattr(alignment, "magnitude_signs", lambda *_: signs)
    _, gradient = step.inner_and_outer(batch, val_batch)
    noise = draws[-1].stages[0].noise

    def effect(record, op, unbounded):
        x = op.apply(
            batch["ecg"],
            (op.low + (op.high - op.low) * unbounded.sigmoid()).expand(4),
            noise[op.name],
            RATE,
        )
        chosen = {k: v[record : record + 1] for k, v in batch.items()}
        chosen["ecg"] = x[record : record + 1].detach()
        model.load_state_dict(weights)
        optimizer.zero_grad()
        (model(**chosen)["loss"] / 4).backward()
        optimizer.step()
        with torch.no_grad():
            return model(**val_batch)["loss"].item()

    effects = torch.tensor(
        [
            [
                effect(record, op, magnitude + sign * MAGNITUDE_STEP)
                for record, sign in enumerate(signs[column].tolist())
            ]
            for column, (op, magnitude) in enumerate(
                zip(policy.operations, policy.mag_neg[0], strict=True)
            )
        ],
        dtype=torch.float64,
    )
    probability = policy.probabilities()[0]
    total = effects.sum(dim=1)
    of_logits = probability * (total - probability @ total)
    others = (effects.sum(dim=0) - effects) / (len(effects) - 1)
    moved = (signs * (effects - others)).sum(dim=1) / MAGNITUDE_STEP
    movable = torch.tensor([op.high > op.low for op in policy.operations])
    of_magnitudes = torch.where(movable, probability * moved, 0)
    for name, expected in (("logits", of_logits), ("mag_neg", of_magnitudes)):
        assert expected.norm() > 1e-8
        torch.testing.assert_close(gradient[name][0], expected, rtol=1e-3, atol=1e-10)


# Work in pieces


@pytest.mark.parametrize("outer_loss", ["model", "ranking", "calibrated"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [SmoothNet, Kinked])
def test_pieces_give_the_numbers_of_the_whole_batch(dataset, kind, method, outer_loss):
    """With BatchNorm only the validation part is cut, without it both parts are."""
    torch.manual_seed(0)
    model, policy = kind(dataset), policy_of()
    batch, val_batch = batch_of(12, seed=0), batch_of(9, seed=1)
    settings = {"method": method, "outer_loss": outer_loss, "neumann_lr": 0.01}
    seen = {}
    for micro_batch in (None, 4):
        step = step_of(
            deepcopy(model), deepcopy(policy), micro_batch=micro_batch, **settings
        )
        sizes = []
        step.classifier.model.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["ecg"])),
            with_kwargs=True,
        )
        loss, gradient = step.inner_and_outer(batch, val_batch)
        seen[micro_batch] = {
            "loss": loss,
            **gradient,
            **{name: p.detach() for name, p in step.params.items()},
        }
        largest = 12 if micro_batch is None or kind is SmoothNet else 4
        assert max(sizes) == largest
        assert (9 in sizes) == (micro_batch is None)
    assert seen[None]["logits"].norm() > 1e-6
    for name, value in seen[None].items():
        torch.testing.assert_close(seen[4][name], value, rtol=1e-9, atol=1e-12)


def test_active_dropout_keeps_a_training_batch_whole(dataset):
    model, sizes = SmoothNet(dataset, dropout=0.5), []
    model.norm = nn.Identity()
    step = step_of(model, policy_of(), micro_batch=4)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["ecg"])), with_kwargs=True
    )
    step.inner(batch_of(12, seed=0))
    assert sizes[-1] == 12


def test_pieces_without_a_record_are_refused(dataset):
    with pytest.raises(ValueError, match="micro_batch must be 1 or more, got 0"):
        step_of(SmoothNet(dataset), policy_of(), warmup=0, micro_batch=0)


# Other devices


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("outer_loss", ["model", "ranking", "calibrated"])
@pytest.mark.parametrize("method", [*METHODS, "alignment"])
def test_no_tensor_is_made_without_a_device(dataset, method, outer_loss, micro_batch):
    """Where the default device has no data, a tensor made there ends the step.

    On a GPU it would be one made on the CPU: an error, or a copy in every step.
    """
    torch.manual_seed(0)
    model = TaskAugResNet(dataset, LEADS, base_width=4, sampling_rate=RATE)
    model.augment = False
    settings = {"outer_loss": outer_loss, "micro_batch": micro_batch}
    step = step_of(
        model, model.policy.double(), method=method, neumann_lr=0.01, **settings
    )
    outer = PolicyOptimizer(step.policy, lr=0.1, accumulate=1)
    before = step.policy.logits.detach().clone()
    batch, val_batch = batch_of(8, seed=0), batch_of(8, seed=1)
    with torch.device("meta"):
        step.inner(batch)
        _, gradient = step.inner_and_outer(batch, val_batch)
        outer.add(gradient, step.finite)
    assert not step.policy.logits.equal(before)


def test_a_hypergradient_of_zeros_is_not_used():
    """A ranking loss of one class says nothing; momentum alone must not move on."""
    policy = TaskAugPolicy(1, sampling_rate=RATE)
    outer = PolicyOptimizer(policy, lr=0.1, accumulate=1)
    ones = {name: torch.ones_like(p) for name, p in policy.named_parameters()}
    outer.add(ones, torch.tensor(True))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    outer.add({n: torch.zeros_like(g) for n, g in ones.items()}, torch.tensor(True))
    assert all(p.equal(before[name]) for name, p in policy.named_parameters())
    norm, _ = outer.statistics()
    assert norm == pytest.approx(len(policy.operations) ** 0.5)
