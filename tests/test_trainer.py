"""The bi-level trainer: what a run does, keeps, repeats, restores and refuses."""

from __future__ import annotations

import itertools
import logging
import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from pyhealth.models.base_model import BaseModel
from pyhealth.trainer import Trainer
from torch import nn
from torch.utils.data import DataLoader

from pyhealth.bilevel import BiLevelTrainer
from pyhealth.bilevel import trainer as trainer_module
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models.taskaug_policy import TaskAugPolicy
from pyhealth.models.taskaug_resnet import TaskAugResNet

LEADS, LENGTH, RATE = 3, 100, 50
METHODS = ("one_step", "neumann", "darts", "alignment", None)


@pytest.fixture(autouse=True)
def messages(caplog):
    """What PyHealth logs. Its logger does not propagate, so the handler goes to it."""
    pyhealth_logger = logging.getLogger("pyhealth")
    pyhealth_logger.addHandler(caplog.handler)
    yield caplog
    pyhealth_logger.removeHandler(caplog.handler)


def samples_of(name, seed, records=24, label=None):
    """White noise; class 1 also has a sine wave."""
    generator = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.arange(LENGTH) / 3)
    samples = []
    for index in range(records):
        y = index % 2
        ecg = torch.randn(LEADS, LENGTH, generator=generator) / 2 + y * wave
        samples.append(
            {"patient_id": f"{name}{index}", "ecg": ecg.tolist(), "label": y}
        )
    dataset = create_sample_dataset(samples, {"ecg": "tensor"}, {"label": "binary"})
    if label is None:
        return dataset
    return dataset.subset([i for i in range(records) if i % 2 == label])


@pytest.fixture(scope="module")
def train_set():
    return samples_of("train", seed=0)


@pytest.fixture(scope="module")
def val_set():
    return samples_of("val", seed=1)


@pytest.fixture(scope="module")
def test_set():
    return samples_of("test", seed=2)


class TinyNet(BaseModel):
    """A PyHealth model that knows no policy and remembers what it was called with.

    Attributes:
        calls: (what for, patient ids, policy bytes) of every forward pass.
        spied: the policies to look at; in a list, else they would be part of the model.
    """

    def __init__(self, dataset, dropout=0.0):
        super().__init__(dataset)
        self.conv = nn.Conv1d(LEADS, 4, 9, stride=4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 1)
        self.calls, self.spied = [], []

    def forward(self, **kwargs):
        ids = tuple(kwargs["patient_id"])
        self.calls.append((self.purpose(), ids, bytes_of(*self.spied)))
        hidden = self.norm(self.conv(kwargs["ecg"])).tanh()
        logit = self.head(self.dropout(hidden).square().mean(dim=-1))
        return {
            "logit": logit,
            "y_prob": self.prepare_y_prob(logit),
            "loss": self.get_loss_function()(logit, kwargs["label"]),
            "y_true": kwargs["label"],
        }

    def purpose(self):
        if not torch.is_grad_enabled():
            return "enumerate" if self.training else "evaluate"
        return "train" if self.training else "outer"

    def ids(self, purpose):
        return [call[1] for call in self.calls if call[0] == purpose]


class Watched:
    """A loader that calls back when an iteration over it starts."""

    def __init__(self, loader, callback):
        self.loader, self.callback = loader, callback
        self.dataset, self.batch_size = loader.dataset, loader.batch_size

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.callback()
        return iter(self.loader)


class Scripted(BiLevelTrainer):
    """Its scores are given; it keeps the state that each of them was given to."""

    def play(self, train_set, val_set, scores, **settings):
        self.scores, self.states = iter(scores), []
        self.train(
            get_dataloader(train_set, 12, shuffle=True, seed=0),
            get_dataloader(val_set, 12),
            epochs=len(scores),
            warmup_epochs=0,
            **settings,
        )

    def evaluate(self, loader):
        self.states.append(bytes_of(self.model, self.policy))
        return {"roc_auc": next(self.scores)}


def bytes_of(*modules):
    return [
        value.numpy(force=True).tobytes()
        for module in modules
        for value in module.state_dict().values()
    ]


def resnet(dataset, **settings):
    torch.manual_seed(0)
    settings = {"policy_stages": 1, "base_width": 4, "sampling_rate": RATE} | settings
    return TaskAugResNet(dataset, LEADS, **settings)


def tiny(dataset, **settings):
    torch.manual_seed(0)
    return TinyNet(dataset, **settings)


def external_policy(num_stages=1, **settings):
    return TaskAugPolicy(num_stages, sampling_rate=RATE, **settings)


def trainer_of(model, policy=None, kind=BiLevelTrainer, **settings):
    settings = {"metrics": ["roc_auc"], "enable_logging": False, "seed": 0} | settings
    if isinstance(model, TinyNet) and policy is None:
        policy = external_policy()
    trainer = kind(model, device="cpu", policy=policy, **settings)
    if isinstance(model, TinyNet):
        model.spied.append(trainer.policy)
    return trainer


@pytest.fixture
def loaders(train_set, val_set):
    """Fresh loaders: 3 batches to train on, 2 to validate on."""
    return (
        get_dataloader(train_set, 8, shuffle=True, seed=0),
        get_dataloader(val_set, 12),
    )


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def same_rows(one, other):
    """Equal to the bit; nan equals nan."""
    return repr(without_seconds(one)) == repr(without_seconds(other))


# A run and its history


@pytest.mark.parametrize("method", METHODS)
def test_history_has_a_row_an_epoch_and_the_policy_moves_after_the_warmup(
    train_set, loaders, method
):
    model = resnet(train_set) if method == "one_step" else tiny(train_set)
    trainer = trainer_of(model)
    policy, seen = trainer.policy, []
    start = bytes_of(policy)
    loaders = loaders[0], Watched(loaders[1], lambda: seen.append(bytes_of(policy)))

    trainer.train(
        *loaders,
        epochs=3,
        warmup_epochs=2,
        hypergradient=method,
        load_best_model_at_last=False,
    )

    scores = {"epoch", "train_loss", "roc_auc", "loss", "seconds"}
    scores |= {"hypergradient_norm", "hypergradient_snr", "bad_steps"}
    of_policy = {
        f"{column}/0/{name}"
        for column in ("probability", "magnitude_neg", "magnitude_pos")
        for name in policy.op_names
    }
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]
    assert all(row.keys() == scores | of_policy for row in trainer.history)
    assert all(math.isfinite(row["train_loss"]) for row in trainer.history)
    assert all(row["seconds"] > 0 for row in trainer.history)
    assert all(row["bad_steps"] == 0 for row in trainer.history)
    assert seen[:2] == [start, start]
    assert (seen[2] != start) == (method is not None)
    for key in ("hypergradient_norm", "hypergradient_snr"):
        is_nan = [math.isnan(row[key]) for row in trainer.history]
        assert is_nan == [True, True, method is None]
    assert_row_shows(trainer.history[2], policy)


def assert_row_shows(row, policy):
    table = policy.to_frame()
    for column in ("probability", "magnitude_neg", "magnitude_pos"):
        shown = [
            row[f"{column}/{stage}/{operation}"]
            for stage, operation in zip(table["stage"], table["operation"], strict=True)
        ]
        assert shown == table[column].tolist()


def test_hypergradient_norm_and_ratio_are_those_of_the_batches(
    train_set, loaders, monkeypatch
):
    gradients = recorded_gradients(monkeypatch)
    trainer = trainer_of(tiny(train_set))
    trainer.train(*loaders, epochs=2, warmup_epochs=0)
    for row, of_epoch in zip(
        trainer.history, (gradients[:3], gradients[3:]), strict=True
    ):
        logits = np.stack([g["logits"].flatten().numpy() for g in of_epoch])
        norm = np.linalg.norm(logits, axis=1).mean()
        error = np.sqrt(logits.var(axis=0, ddof=1).sum() / len(logits))
        ratio = np.linalg.norm(logits.mean(axis=0)) / error
        assert row["hypergradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["hypergradient_snr"] == pytest.approx(ratio, rel=1e-4)


def recorded_gradients(monkeypatch):
    """Record the hypergradient of every outer step."""
    gradients, original = [], trainer_module.BiLevelStep.inner_and_outer

    def spy(self, *batches):
        loss, gradient = original(self, *batches)
        gradients.append(deepcopy(gradient))
        return loss, gradient

    monkeypatch.setattr(trainer_module.BiLevelStep, "inner_and_outer", spy)
    return gradients


def test_train_loss_is_the_mean_over_the_batches(train_set, loaders):
    model = tiny(train_set)
    losses, forward = [], model.forward

    def spy(**kwargs):
        output = forward(**kwargs)
        if model.training:
            losses.append(output["loss"].item())
        return output

    model.forward = spy
    trainer = trainer_of(model)
    trainer.train(*loaders, epochs=2, hypergradient=None)
    means = [np.mean(losses[:3]), np.mean(losses[3:])]
    shown = [row["train_loss"] for row in trainer.history]
    assert shown == pytest.approx(means, rel=1e-6)


def test_without_hypergradient_the_policy_augments_but_keeps_its_bytes(
    train_set, val_set
):
    results = []
    for start in (0.01, 0.9):
        policy = external_policy(initial_magnitude=start)
        before = bytes_of(policy)
        trainer = trainer_of(tiny(train_set), policy)
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            get_dataloader(val_set, 12),
            epochs=2,
            hypergradient=None,
            warmup_epochs=0,
        )
        assert bytes_of(policy) == before
        results.append(trainer.history[-1]["train_loss"])
    assert results[0] != results[1]


@pytest.mark.parametrize("jointly", [False, True])
def test_joint_training_moves_the_policy_on_the_training_loss(
    train_set, loaders, jointly
):
    trainer = trainer_of(resnet(train_set, train_policy_jointly=jointly))
    before = bytes_of(trainer.policy)
    trainer.train(*loaders, epochs=1, hypergradient=None, load_best_model_at_last=False)
    assert (bytes_of(trainer.policy) != before) == jointly


def test_weight_decay_is_not_for_the_policy(train_set, loaders):
    trainer = trainer_of(resnet(train_set, train_policy_jointly=True))
    trainer.policy.randomize_(torch.Generator().manual_seed(0))
    before = trainer.policy.logits.detach().clone()
    trainer.train(*loaders, epochs=1, hypergradient=None, weight_decay=100.0)
    # Decayed by far more than their gradient, all of them would shrink.
    assert not (trainer.policy.logits.abs() < before.abs()).all()


def test_policy_without_stages_trains_as_pyhealths_own_trainer(train_set, val_set):
    plain, bilevel = (resnet(train_set, policy_stages=0) for _ in range(2))
    for trainer in (
        Trainer(plain, device="cpu", enable_logging=False),
        trainer_of(bilevel),
    ):
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            get_dataloader(val_set, 12),
            epochs=2,
            load_best_model_at_last=False,
        )
    assert bytes_of(plain.backbone) == bytes_of(bilevel.backbone)
    assert [row["epoch"] for row in trainer.history] == [0, 1]
    assert all(math.isnan(row["hypergradient_norm"]) for row in trainer.history)


def test_initial_weights_do_not_depend_on_the_policy(train_set):
    without, with_policy = (resnet(train_set, policy_stages=k) for k in (0, 2))
    weights = without.backbone.state_dict()
    assert weights.keys() == with_policy.backbone.state_dict().keys()
    for name, value in with_policy.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_on_epoch_is_called_with_the_history_so_far(train_set, loaders):
    rows = []
    trainer = trainer_of(tiny(train_set))
    trainer.train(*loaders, epochs=2, on_epoch=lambda t: rows.append(len(t.history)))
    assert rows == [1, 2]
    assert trainer.history[0]["roc_auc"] is not None


# One seed, one run


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_a_run_to_the_bit(train_set, val_set, method):
    def run(seed, global_seed):
        model = tiny(train_set, dropout=0.5)
        trainer = trainer_of(model, seed=seed)
        torch.manual_seed(global_seed)  # is not what decides
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            get_dataloader(val_set, 12, shuffle=True, seed=1),
            epochs=2,
            hypergradient=method,
        )
        return trainer.history, bytes_of(model, trainer.policy)

    (history, state), (again, state_again) = run(3, 0), run(3, 1)
    assert same_rows(history, again)
    assert state == state_again
    other_history, other_state = run(4, 0)
    assert not same_rows(history, other_history)
    assert state != other_state


def test_without_a_seed_torchs_own_decides(train_set):
    seeds = []
    for global_seed in (0, 0, 1):
        model = tiny(train_set)
        torch.manual_seed(global_seed)
        seeds.append(trainer_of(model, seed=None).seed)
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_global_random_states(train_set, loaders, method):
    trainer = trainer_of(tiny(train_set, dropout=0.5))
    before = global_states()
    trainer.train(*loaders, loaders[1], epochs=2, hypergradient=method)
    assert global_states() == before


def global_states():
    name, keys, *rest = np.random.get_state()
    return (
        torch.random.get_rng_state().tolist(),
        (name, keys.tolist(), *rest),
        random.getstate(),
    )


# The best epoch


@pytest.mark.parametrize(
    ("criterion", "best"), [("max", 1), ("min", 2)], ids=["max", "min"]
)
def test_best_weights_and_policy_are_restored(train_set, val_set, criterion, best):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    trainer.play(train_set, val_set, [0.5, 0.9, 0.1, 0.6], monitor_criterion=criterion)
    assert len(set(map(tuple, trainer.states))) == 4
    assert bytes_of(trainer.model, trainer.policy) == trainer.states[best]
    assert [row["roc_auc"] for row in trainer.history] == [0.5, 0.9, 0.1, 0.6]


def test_the_first_of_equal_epochs_is_best(train_set, val_set):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    trainer.play(train_set, val_set, [0.5, 0.9, 0.9])
    assert bytes_of(trainer.model, trainer.policy) == trainer.states[1]


def test_last_weights_stay_where_the_best_are_not_wanted(train_set, val_set):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    trainer.play(train_set, val_set, [0.5, 0.9, 0.1], load_best_model_at_last=False)
    assert bytes_of(trainer.model, trainer.policy) == trainer.states[2]


@pytest.mark.parametrize(
    ("monitor", "criterion"), [("roc_auc", "max"), ("loss", "min")]
)
def test_evaluation_after_training_gives_the_best_row(
    train_set, loaders, monitor, criterion
):
    trainer = trainer_of(tiny(train_set))
    trainer.train(
        *loaders,
        epochs=3,
        inner_lr=0.03,
        monitor=monitor,
        monitor_criterion=criterion,
    )
    choose = {"max": max, "min": min}[criterion]
    best = choose(trainer.history, key=lambda row: row[monitor])
    scores = trainer.evaluate(loaders[1])
    assert scores == {name: best[name] for name in ("roc_auc", "loss")}


@pytest.mark.parametrize(("patience", "epochs"), [(None, 7), (1, 3), (2, 6), (3, 7)])
def test_patience_stops_early(train_set, val_set, patience, epochs):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    scores = [0.5, 0.6, 0.5, 0.7, 0.6, 0.6, 0.6]
    trainer.play(train_set, val_set, scores, patience=patience, hypergradient=None)
    assert len(trainer.history) == epochs
    best = 1 if epochs == 3 else 3
    assert bytes_of(trainer.model, trainer.policy) == trainer.states[best]


@pytest.mark.slow
def test_seconds_end_a_training_and_more_go_on(loaders, train_set, tmp_path):
    def two_seconds_an_epoch(trainer):
        trainer.history[-1]["seconds"] = 2.0

    def trained(seconds, **kwargs):
        trainer = trainer_of(tiny(train_set), seed=0)
        trainer.exp_path = str(tmp_path)
        trainer.train(
            *loaders,
            epochs=9,
            max_seconds=seconds,
            on_epoch=two_seconds_an_epoch,
            **kwargs,
        )
        return len(trainer.history)

    assert trained(4.1) == 3
    assert trained(4.1, resume=True) == 3
    assert trained(8.0, resume=True) == 4
    assert trained(1e9, resume=True) == 9


def test_test_data_are_read_once_after_the_last_epoch(train_set, loaders, test_set):
    events = []
    test_loader = Watched(get_dataloader(test_set, 12), lambda: events.append("test"))
    val_loader = Watched(loaders[1], lambda: events.append("val"))
    trainer = trainer_of(tiny(train_set))
    trainer.train(loaders[0], val_loader, test_loader, epochs=3)
    assert events == ["val", "val", "val", "test"]


def test_test_data_meet_the_best_weights(train_set, val_set, test_set):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    test_loader = get_dataloader(test_set, 12)
    trainer.play(
        train_set,
        val_set,
        [0.5, 0.9, 0.1, 0.6, 0.7],  # the last one is the test's
        test_dataloader=test_loader,
        patience=2,
    )
    assert len(trainer.history) == 4
    assert trainer.states[4] == trainer.states[1] != trainer.states[3]


# Which data go where


@pytest.mark.slow
def test_validation_and_policy_share_a_disk_backed_dataset_in_peace(parts):
    train, val, _ = parts
    leads = next(iter(val))["ecg"].shape[0]
    torch.manual_seed(0)
    model = TinyNet(train)
    model.conv = nn.Conv1d(leads, 4, 9, stride=4)
    policy = TaskAugPolicy(1, sampling_rate=100)
    trainer = trainer_of(model, policy)
    before = global_states()

    trainer.train(
        get_dataloader(train, 32, shuffle=True, seed=0),
        get_dataloader(val, 7),
        epochs=3,
        warmup_epochs=1,
        monitor="loss",
        monitor_criterion="min",
    )

    assert global_states() == before
    val_ids = ids_of(val)
    per_epoch = math.ceil(len(val) / 7)
    evaluated = model.ids("evaluate")
    assert len(evaluated) == 3 * per_epoch
    for epoch in range(3):
        of_epoch = evaluated[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(sum(of_epoch, ())) == val_ids  # each exactly once
    trained = model.ids("train")
    assert set(val_ids).isdisjoint(sum(trained, ()))
    outer = model.ids("outer")
    batches = math.ceil(len(train) / 32)
    assert len(outer) == 2 * batches  # one an inner step, none in the warm-up
    assert batches % per_epoch  # so that an evaluation falls into a pass
    for start in range(0, len(outer) - per_epoch + 1, per_epoch):
        assert sorted(sum(outer[start : start + per_epoch], ())) == val_ids


def ids_of(samples):
    loader = get_dataloader(samples, 64)
    return sorted(patient for batch in loader for patient in batch["patient_id"])


def test_policy_goes_through_all_validation_data_in_an_order_of_its_own(
    train_set, loaders, val_set
):
    model = tiny(train_set)
    trainer_of(model).train(*loaders, epochs=4, warmup_epochs=0)
    outer = model.ids("outer")
    assert [len(batch) for batch in outer] == [12] * 12
    passes = [
        first + second for first, second in zip(outer[::2], outer[1::2], strict=True)
    ]
    assert all(sorted(one) == ids_of(val_set) for one in passes)
    assert len(set(passes)) == len(passes)  # shuffled anew
    evaluated = model.ids("evaluate")
    assert set(zip(evaluated[::2], evaluated[1::2], strict=True)) == {
        tuple(evaluated[:2])  # never shuffled
    }


def test_policy_data_are_for_the_policy_only(train_set, loaders, val_set, test_set):
    model = tiny(train_set)
    trainer_of(model).train(
        *loaders, epochs=2, policy_dataloader=get_dataloader(test_set, 6)
    )
    assert {name[:4] for name in sum(model.ids("outer"), ())} == {"test"}
    assert {len(batch) for batch in model.ids("outer")} == {6}
    assert sorted(sum(model.ids("evaluate"), ())) == sorted(2 * ids_of(val_set))
    assert {name[:5] for name in sum(model.ids("train"), ())} == {"train"}


def test_policy_data_may_come_from_an_ordinary_dataset(train_set, loaders):
    """What is no PyHealth dataset is its own business: its loader is used as it is."""
    model = tiny(train_set)
    batch = next(iter(get_dataloader(train_set, 4)))
    trainer = trainer_of(model)
    trainer.train(
        *loaders,
        epochs=1,
        warmup_epochs=0,
        policy_dataloader=torch.utils.data.DataLoader([batch], batch_size=None),
    )
    assert model.ids("outer") == [tuple(batch["patient_id"])] * 3


@pytest.mark.parametrize(
    ("outer_every", "accumulate", "steps"),
    [(1, 1, 12), (2, 1, 6), (4, 1, 4), (1, 5, 2), (2, 3, 2), (6, 1, 2), (9, 1, 2)],
)
def test_outer_every_and_accumulate_set_the_number_of_policy_steps(
    train_set, val_set, outer_every, accumulate, steps
):
    """Two epochs of six inner steps; every change of the policy's bytes is a step."""
    model = tiny(train_set)
    trainer = trainer_of(model)
    trainer.train(
        get_dataloader(train_set, 4, shuffle=True, seed=0),
        get_dataloader(val_set, 12),
        epochs=2,
        warmup_epochs=0,
        inner_lr=0.01,
        outer_every=outer_every,
        accumulate=accumulate,
        load_best_model_at_last=False,
    )
    changes = sum(a[2] != b[2] for a, b in itertools.pairwise(model.calls))
    assert changes == steps


def test_policy_steps_are_adam_on_the_mean_hypergradient(
    train_set, loaders, monkeypatch
):
    gradients = recorded_gradients(monkeypatch)
    trainer = trainer_of(tiny(train_set))
    twin = deepcopy(trainer.policy)
    trainer.train(
        *loaders,
        epochs=2,
        warmup_epochs=0,
        outer_lr=0.05,
        accumulate=3,
        load_best_model_at_last=False,
    )
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05, betas=(0.9, 0.99))
    for start in (0, 3):
        for name, parameter in twin.named_parameters():
            waiting = [gradient[name] for gradient in gradients[start : start + 3]]
            parameter.grad = sum(waiting) / 3
        optimizer.step()
    for name, parameter in trainer.policy.named_parameters():
        torch.testing.assert_close(
            parameter, twin.get_parameter(name), rtol=1e-5, atol=1e-6
        )


def test_batch_statistics_give_another_hypergradient(train_set, val_set):
    histories = []
    for val_statistics in ("running", "batch"):
        trainer = trainer_of(resnet(train_set))
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            get_dataloader(val_set, 12),
            epochs=2,
            val_statistics=val_statistics,
        )
        histories.append(trainer.history)
    running, batch = histories
    assert running[0]["loss"] == batch[0]["loss"]  # the warm-up is the same
    norms = [history[1]["hypergradient_norm"] for history in histories]
    assert all(norm > 0 for norm in norms)
    assert norms[0] != norms[1]


def test_neumann_settings_reach_the_series(train_set, val_set):
    norms = []
    for settings in ({"neumann_lr": 0.01}, {"neumann_lr": 0.02}, {"neumann_terms": 3}):
        trainer = trainer_of(tiny(train_set))
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            get_dataloader(val_set, 12),
            epochs=1,
            warmup_epochs=0,
            outer_lr=0,
            inner_lr=0.01,
            hypergradient="neumann",
            **{"neumann_terms": 0} | settings,
        )
        norms.append(trainer.history[0]["hypergradient_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)
    assert norms[2] != norms[0]
    assert norms[2] == pytest.approx(4 * norms[0], rel=0.2)  # four summands


def test_any_pyhealth_model_under_another_input_key(val_set):
    samples = [
        {
            "patient_id": str(i),
            "trace": torch.randn(LEADS, LENGTH).tolist(),
            "ill": i % 2,
        }
        for i in range(16)
    ]
    dataset = create_sample_dataset(samples, {"trace": "tensor"}, {"ill": "binary"})

    class Renamed(TinyNet):
        def forward(self, trace, ill, **kwargs):
            return super().forward(ecg=trace, label=ill, **kwargs)

    trainer = trainer_of(Renamed(dataset), input_key="trace")
    before = bytes_of(trainer.policy)
    loader = get_dataloader(dataset, 8)
    trainer.train(loader, loader, epochs=2, load_best_model_at_last=False)
    assert bytes_of(trainer.policy) != before


def test_a_policy_beside_the_models_own_replaces_it(train_set, loaders):
    model, policy = resnet(train_set), external_policy()
    own, start = bytes_of(model.policy), bytes_of(policy)
    trainer = trainer_of(model, policy)
    trainer.train(*loaders, epochs=2, load_best_model_at_last=False)
    assert trainer.policy is policy
    assert bytes_of(policy) != start
    assert bytes_of(model.policy) == own


# PyHealth's own methods


@pytest.mark.parametrize("external", [False, True])
def test_checkpoint_holds_model_and_policy(train_set, loaders, tmp_path, external):
    def make(seed):
        torch.manual_seed(seed)
        settings = {"base_width": 4, "sampling_rate": RATE}
        if external:
            return TinyNet(train_set), external_policy(2)
        return TaskAugResNet(train_set, LEADS, **settings), None

    trainer = trainer_of(*make(0))
    trainer.train(*loaders, epochs=2, load_best_model_at_last=False)
    path = tmp_path / "run.ckpt"
    trainer.save_ckpt(str(path))
    assert (tmp_path / "run.ckpt.policy.json").exists() == external

    loaded, given = (
        trainer_of(*make(1)),
        trainer_of(*make(2), checkpoint_path=str(path)),
    )
    loaded.load_ckpt(str(path))
    expected = bytes_of(trainer.model, trainer.policy)
    for other in (loaded, given):
        assert bytes_of(other.model, other.policy) == expected
        assert other.evaluate(loaders[1]) == trainer.evaluate(loaders[1])


@pytest.mark.parametrize("external", [False, True])
def test_logging_writes_best_and_last_checkpoint(
    train_set, val_set, tmp_path, external
):
    model = tiny(train_set) if external else resnet(train_set)
    trainer = trainer_of(
        model,
        kind=Scripted,
        enable_logging=True,
        output_path=str(tmp_path),
        exp_name="run",
    )
    trainer.play(train_set, val_set, [0.5, 0.9, 0.1])

    folder = tmp_path / "run"
    for name, epoch in (("best", 1), ("last", 2)):
        trainer.load_ckpt(str(folder / f"{name}.ckpt"))
        assert bytes_of(trainer.model, trainer.policy) == trainer.states[epoch]
    assert "roc_auc" in (folder / "log.txt").read_text()  # the metrics' names


def test_log_file_has_every_epoch(train_set, val_set, tmp_path):
    trainer = trainer_of(
        tiny(train_set),
        kind=Scripted,
        enable_logging=True,
        output_path=str(tmp_path),
        exp_name="run",
    )
    trainer.play(train_set, val_set, [0.5125, 0.9125, 0.1125])
    text = (tmp_path / "run" / "log.txt").read_text()
    assert all(score in text for score in ("0.5125", "0.9125", "0.1125"))


def test_no_file_without_logging(train_set, val_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer_of(tiny(train_set), kind=Scripted).play(train_set, val_set, [0.5, 0.6])
    assert list(tmp_path.iterdir()) == []


def test_every_epoch_is_logged(train_set, val_set, messages):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    trainer.play(train_set, val_set, [0.5125, 0.9125])
    lines = [line for line in messages.messages if "train_loss" in line]
    assert len(lines) == 2
    assert "0.5125" in lines[0] and "0.9125" in lines[1]


def test_evaluation_and_inference_are_pyhealths(train_set, loaders, test_set):
    trainer = trainer_of(resnet(train_set))
    trainer.train(*loaders, epochs=2)
    plain = Trainer(
        trainer.model, device="cpu", metrics=["roc_auc"], enable_logging=False
    )
    loader = get_dataloader(test_set, 7)
    assert trainer.evaluate(loader) == plain.evaluate(loader)
    ours = trainer.inference(loader, ["logit"], return_patient_ids=True)
    theirs = plain.inference(loader, ["logit"], return_patient_ids=True)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert np.array_equal(one, other)
    assert ours[2] == theirs[2]
    assert np.array_equal(ours[3]["logit"], theirs[3]["logit"])
    assert ours[4] == theirs[4] == [f"test{i}" for i in range(24)]


# What is refused


def test_a_model_without_a_policy_is_refused(train_set):
    with pytest.raises(ValueError, match=r"TinyNet has no policy.*policy="):
        BiLevelTrainer(tiny(train_set), enable_logging=False, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hypergradient": "two_step"}, "one_step.*neumann.*darts.*None.*'two_step'"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"outer_every": 0}, "outer_every must be 1 or more, got 0"),
        ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
        ({"max_bad_steps": 0}, "max_bad_steps must be 1 or more, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be 1 or more, got 0"),
        ({"checkpoint_every": 9}, "checkpoint_every need a folder.*enable_logging"),
        ({"resume": True}, "resume.*need a folder.*enable_logging=True"),
        ({"val_statistics": "none"}, "running.*batch.*'none'"),
        ({"monitor": "pr_auc"}, r"'pr_auc' is none of .*'roc_auc'.*metrics="),
        ({"monitor_criterion": "most"}, "'max' or 'min', got 'most'"),
        ({"warmup_epochs": 1}, r"warmup_epochs=1 of epochs=1: .*never move"),
        ({"warmup_epochs": -1}, r"from 0 to epochs - 1"),
        ({"patience": 0}, "patience must be 1 or more epochs.* got 0"),
        ({"max_seconds": 0}, "max_seconds must be positive, got 0"),
        ({"max_seconds": float("nan")}, "max_seconds must be positive, got nan"),
        ({"neumann_terms": 3}, r"'alignment' ignores neumann_terms=3; .*'neumann'"),
        ({"alignment_records": 0}, "alignment_records must be 1 or more, got 0"),
        (
            {"hypergradient": "darts", "neumann_lr": 0.1},
            "'darts' ignores neumann_lr=0.1",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_unusable_settings_are_refused(train_set, loaders, settings, message):
    trainer = trainer_of(resnet(train_set))
    before = bytes_of(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train(*loaders, **{"epochs": 1, "warmup_epochs": 0} | settings)
    assert trainer.model.augment is True
    assert bytes_of(trainer.model) == before  # said before the first step


def test_a_frozen_policy_needs_no_epochs_to_move(train_set, loaders):
    trainer_of(resnet(train_set)).train(*loaders, epochs=1, hypergradient=None)
    trainer_of(resnet(train_set, policy_stages=0)).train(*loaders, epochs=1)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_loader_is_refused(train_set, loaders, position):
    given = [*loaders, None]
    given[position] = DataLoader([], batch_size=8)
    name = ("training", "validation", "policy")[position]
    with pytest.raises(ValueError, match=f"The {name} loader has no batch"):
        trainer_of(tiny(train_set)).train(
            *given[:2], policy_dataloader=given[2], epochs=2
        )


def test_a_score_of_a_subclass_can_be_monitored(train_set, loaders):
    class Own(BiLevelTrainer):
        def evaluate(self, loader):
            return {**super().evaluate(loader), "mine": 1.0}

    trainer = trainer_of(tiny(train_set), kind=Own)
    trainer.train(*loaders, epochs=2, monitor="mine")
    assert [row["mine"] for row in trainer.history] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_stages": 1}, r"has num_stages 1, this trainer's has 2\. Pass policy="),
        ({"operations": ["no_op", "time_mask"]}, r"has op_names \('no_op', "),
        ({"shared_magnitudes": True}, "has shared_magnitudes True, .* has False"),
    ],
)
def test_a_checkpoint_with_another_policy_is_refused(
    train_set, tmp_path, settings, message
):
    saved = external_policy(**{"num_stages": 2} | settings).randomize_()
    path = str(tmp_path / "run.ckpt")
    trainer_of(tiny(train_set), saved).save_ckpt(path)
    trainer = trainer_of(tiny(train_set), external_policy(2))
    with torch.no_grad():
        trainer.model.conv.weight.add_(1)
    before = bytes_of(trainer.model, trainer.policy)
    with pytest.raises(ValueError, match=message):
        trainer.load_ckpt(path)
    assert bytes_of(trainer.model, trainer.policy) == before


@pytest.mark.filterwarnings("ignore:Only one class")
def test_validation_data_of_one_class_are_refused(train_set, loaders):
    one_class = get_dataloader(samples_of("val", seed=1, label=1), 12)
    with pytest.raises(
        ValueError, match=r"'roc_auc' is nan.*one class.*monitor='loss'"
    ):
        trainer_of(tiny(train_set)).train(loaders[0], one_class, epochs=2)
    trainer = trainer_of(tiny(train_set))
    trainer.train(
        loaders[0], one_class, epochs=2, monitor="loss", monitor_criterion="min"
    )
    assert math.isnan(trainer.history[0]["roc_auc"])


def with_nan(name):
    dataset = samples_of(name, seed=5)
    dataset[5]["ecg"][1, 3] = math.nan
    return get_dataloader(dataset, 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    train_set, loaders, messages, method
):
    """One record of 24 is nan: one batch of three in each epoch."""
    model = tiny(train_set)
    trainer = trainer_of(model)
    trainer.train(
        with_nan("train"),
        loaders[1],
        epochs=2,
        hypergradient=method,
        warmup_epochs=0,
        load_best_model_at_last=False,
    )
    assert [row["bad_steps"] for row in trainer.history] == [1, 1]
    assert all(math.isfinite(row["train_loss"]) for row in trainer.history)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.isfinite().all(), name
    assert int(model.norm.num_batches_tracked) == 4
    assert all(p.isfinite().all() for p in trainer.policy.parameters())
    told = [line for line in messages.messages if "not finite" in line]
    assert len(told) == 2 and "epoch 0: 1 step" in told[0]


def test_a_hypergradient_that_is_not_finite_leaves_the_whole_step_out(
    train_set, loaders
):
    """Validation batches are 8 of 24 records, one of them with nan: 2 of 6 are bad."""
    model = tiny(train_set)
    trainer = trainer_of(model)
    trainer.train(
        *loaders,
        epochs=2,
        warmup_epochs=0,
        policy_dataloader=with_nan("val"),
        load_best_model_at_last=False,
    )
    assert [row["bad_steps"] for row in trainer.history] == [1, 1]
    assert int(model.norm.num_batches_tracked) == 4
    assert all(p.isfinite().all() for p in trainer.policy.parameters())
    assert all(math.isfinite(row["hypergradient_norm"]) for row in trainer.history)


def all_nan(name):
    dataset = samples_of(name, seed=5)
    for sample in dataset:
        sample["ecg"][1, 3] = math.nan
    return get_dataloader(dataset, 8)


@pytest.mark.parametrize("method", METHODS)
def test_too_many_steps_that_are_not_finite_end_the_run(train_set, loaders, method):
    trainer = trainer_of(resnet(train_set))
    before = bytes_of(trainer.model)
    with pytest.raises(
        ArithmeticError,
        match=r"^4 steps in a row.*loss is nan.*epoch 1.*inner_lr.*records",
    ):
        trainer.train(
            all_nan("train"),
            loaders[1],
            epochs=5,
            hypergradient=method,
            warmup_epochs=0,
            max_bad_steps=4,
        )
    assert bytes_of(trainer.model) == before
    assert trainer.history[0]["bad_steps"] == 3  # the row of bad steps outlives it
    assert math.isnan(trainer.history[0]["train_loss"])
    assert trainer.model.augment is True


def test_a_hopeless_run_ends_with_the_best_epoch(train_set, val_set):
    trainer = trainer_of(tiny(train_set), kind=Scripted)
    trainer.scores, trainer.states = itertools.count(9, -1), []
    loader = get_dataloader(train_set, 12, shuffle=True, seed=0)

    def spoil(trainer):
        if len(trainer.history) == 2:
            trainer.model.head.weight.data.fill_(math.inf)

    with pytest.raises(ArithmeticError, match="those of the best epoch"):
        trainer.train(loader, get_dataloader(val_set, 12), epochs=9, on_epoch=spoil)
    assert bytes_of(trainer.model, trainer.policy) == trainer.states[0]


def test_diverging_series_is_an_error(train_set, loaders):
    trainer = trainer_of(tiny(train_set))
    with pytest.raises(ArithmeticError, match=r"Neumann series diverges.*neumann_lr"):
        trainer.train(
            *loaders,
            warmup_epochs=0,
            hypergradient="neumann",
            neumann_terms=20,
            neumann_lr=1e3,
        )


def test_models_own_augmentation_is_off_in_training_and_back_after_an_error(
    train_set, loaders
):
    model = resnet(train_set)
    during = []

    def fail():
        during.append(model.augment)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(model).train(loaders[0], Watched(loaders[1], fail), epochs=2)
    assert during == [False]
    assert model.augment is True


@pytest.mark.parametrize(
    ("method", "shared", "warnings"),
    [("darts", False, 1), ("darts", True, 0), ("one_step", False, 0)],
)
def test_darts_with_magnitudes_a_class_warns_once(
    train_set, loaders, messages, method, shared, warnings
):
    trainer = trainer_of(tiny(train_set), external_policy(shared_magnitudes=shared))
    trainer.train(*loaders, epochs=2, hypergradient=method)
    text = [record.getMessage() for record in messages.records]
    assert sum("label into the signal" in line for line in text) == warnings


# It says whether the policy learned


def told(messages):
    text = [record.getMessage() for record in messages.records]
    return [line for line in text if "TOLD FROM ITS START" in line]


@pytest.mark.slow
def test_random_hypergradients_are_called_chance(train_set, loaders, messages):
    trainer = trainer_of(resnet(train_set))
    generator = torch.Generator().manual_seed(0)

    def noise(gradient):
        return {
            n: torch.randn(g.shape, generator=generator) for n, g in gradient.items()
        }

    trainer.train(*loaders, epochs=4, on_hypergradient=noise)
    assert trainer.policy_p_value > 0.05
    assert len(told(messages)) == 1


@pytest.mark.slow
def test_hypergradients_that_agree_are_not_called_chance(train_set, loaders, messages):
    trainer = trainer_of(resnet(train_set))
    generator = torch.Generator().manual_seed(0)

    def drift(gradient):
        return {
            n: 1 + torch.randn(g.shape, generator=generator)
            for n, g in gradient.items()
        }

    trainer.train(*loaders, epochs=4, on_hypergradient=drift)
    assert trainer.policy_p_value <= 0.01
    assert not told(messages)


def test_a_policy_that_rests_is_not_judged(train_set, loaders, messages):
    trainer = trainer_of(resnet(train_set))
    trainer.train(*loaders, epochs=1, hypergradient=None)
    assert math.isnan(trainer.policy_p_value)
    assert not told(messages)


def test_what_the_hook_returns_moves_the_policy(train_set, loaders):
    trainer = trainer_of(resnet(train_set))
    seen = []

    def only_first(gradient):
        seen.append(gradient)
        return {n: torch.zeros_like(g) for n, g in gradient.items()}

    trainer.train(*loaders, epochs=2, on_hypergradient=only_first)
    assert len(seen) == 3  # the batches of the epoch after the warm-up
    assert trainer.policy.probabilities().unique().numel() == 1


@pytest.mark.slow
@pytest.mark.parametrize("outer_loss", ["ranking", "calibrated"])
@pytest.mark.parametrize("method", ["alignment", "one_step"])
def test_other_outer_losses_give_another_hypergradient(
    train_set, val_set, method, outer_loss
):
    seen = {}
    for loss in ("model", outer_loss):
        trainer = trainer_of(resnet(train_set, policy_stages=2))
        found = seen.setdefault(loss, [])
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            get_dataloader(val_set, 12),
            epochs=1,
            warmup_epochs=0,
            hypergradient=method,
            outer_loss=loss,
            on_hypergradient=lambda g, found=found: found.append(g) or g,
        )
    first, other = (seen[loss][1]["logits"] for loss in seen)
    assert first.abs().max() > 0
    assert not torch.allclose(first, other, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["one_step", "alignment"])
def test_training_in_pieces_ends_where_whole_batches_do(train_set, loaders, method):
    histories = []
    for micro_batch in (None, 5):
        trainer = trainer_of(resnet(train_set))
        trainer.train(
            get_dataloader(train_set, 8, shuffle=True, seed=0),
            loaders[1],
            epochs=1,
            warmup_epochs=0,
            hypergradient=method,
            outer_loss="ranking",
            micro_batch=micro_batch,
        )
        histories.append(trainer.history[0])
    for name, value in histories[0].items():
        if name != "seconds":
            assert histories[1][name] == pytest.approx(value, 1e-3, nan_ok=True), name


# It learns


@pytest.mark.slow
@pytest.mark.parametrize("method", ["one_step", "alignment"])
def test_an_operation_that_hurts_loses_its_probability(method):
    """A mask of nearly the whole record takes the class away, so no_op should win.

    The mask starts at 95 % of its range, which is the record's length, and at one half
    of the draws.
    """
    train, val = (
        samples_of(name, seed, records=96) for name, seed in (("t", 0), ("v", 1))
    )
    probabilities = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = TinyNet(train)
        model.norm = nn.Identity()
        policy = external_policy(
            operations=("no_op", "time_mask"),
            shared_magnitudes=True,
            initial_magnitude=0.95,
        )
        trainer = trainer_of(model, policy, seed=seed)
        trainer.train(
            get_dataloader(train, 32, shuffle=True, seed=seed),
            get_dataloader(val, 32),
            epochs=5,
            inner_lr=3e-3,
            outer_lr=0.05,
            hypergradient=method,
            load_best_model_at_last=False,
        )
        shown = [row["probability/0/no_op"] for row in trainer.history]
        assert shown[0] == 0.5
        probabilities.append(shown[-1])
    assert min(probabilities) > 0.5
    assert np.mean(probabilities) > 0.65
