"""Policies learned for PyHealth's own models, which know nothing of augmentation."""

import math
from copy import deepcopy

import pytest
import torch
from test_step import (
    HALF_WITH_KINKS,
    Replay,
    assert_close,
    batch_of,
    policy_of,
    recorded,
    step_of,
)
from torch import nn

from pyhealth.bilevel import BiLevelTrainer
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models import TCN, ContraWR, SparcNet
from pyhealth.models.taskaug_policy import TaskAugPolicy

LEADS, LENGTH, RATE = 3, 100, 50
MODELS = {
    "SparcNet": lambda data: SparcNet(data, block_layers=1, growth_rate=4, bn_size=2),
    "ContraWR": lambda data: ContraWR(data, n_fft=16),
    # Holds each of its convolutions under two names.
    "TCN": lambda data: TCN(data, embedding_dim=4, num_channels=4, max_seq_length=4),
}
LABELS = {
    "binary": lambda i: i % 2,
    "multiclass": lambda i: i % 3,
    "multilabel": lambda i: [["a"], ["b"], ["a", "b"]][i % 3],
    "regression": lambda i: (i % 3) / 2,
}
SCORES = {
    "binary": ("roc_auc", "max"),
    "multiclass": ("accuracy", "max"),
    "multilabel": ("pr_auc_samples", "max"),
    "regression": ("mse", "min"),
}


def samples_of(mode, seed=0, key="signal", flat=False):
    generator = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.arange(LENGTH) / 3)
    samples = []
    for index in range(18):
        x = torch.randn(LEADS, LENGTH, generator=generator) / 2 + index % 3 * wave
        if flat:
            x[1] = 0
        samples.append(
            {"patient_id": str(index), key: x.tolist(), "label": LABELS[mode](index)}
        )
    return create_sample_dataset(samples, {key: "tensor"}, {"label": mode})


def model_of(name, dataset):
    torch.manual_seed(0)
    return MODELS[name](dataset)


def train(model, dataset, policy, mode="binary", **settings):
    trainer = BiLevelTrainer(
        model,
        policy=policy,
        input_key="signal",
        device="cpu",
        enable_logging=False,
        seed=0,
    )
    monitor, criterion = SCORES[mode]
    trainer.train(
        get_dataloader(dataset, 9, shuffle=True, seed=0),
        get_dataloader(samples_of(mode, seed=1), 9),
        epochs=2,
        warmup_epochs=0,
        monitor=monitor,
        monitor_criterion=criterion,
        load_best_model_at_last=False,
        **settings,
    )
    return trainer


@pytest.mark.parametrize("method", ["alignment", "one_step", "neumann", "darts"])
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_is_learned(name, method):
    dataset = samples_of("binary")
    model = model_of(name, dataset)
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = deepcopy(model.state_dict())
    policy = TaskAugPolicy(1, sampling_rate=RATE)

    trainer = train(model, dataset, policy, hypergradient=method)

    assert policy.logits.abs().max() > 1e-3
    assert all(math.isfinite(row["hypergradient_norm"]) for row in trainer.history)
    # The model has its own parameters still, and they were trained.
    assert own == {name: id(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert name.endswith("_dummy_param") or not parameter.equal(before[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half", "tolerance"),
    # The rounding of SparcNet's many normalisations needs the wider interval.
    [("SparcNet", 1e-5, 1e-4), ("TCN", HALF_WITH_KINKS, 1e-3)],
)
def test_the_hypergradient_is_the_slope_of_a_replayed_step(name, half, tolerance):
    model = model_of(name, samples_of("binary", key="ecg"))
    if name == "SparcNet":
        # Its max-pool meets ties where a record is silenced, and has no slope there.
        model.encoder.pool0 = nn.AvgPool1d(3, stride=2, padding=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    step = step_of(model, policy_of(seed=2))
    replay, draws = Replay(step, half), recorded(step.policy)
    batch, val_batch = batch_of(12, seed=0), batch_of(8, seed=1)

    _, gradient = step.inner_and_outer(batch, val_batch)

    assert_close(gradient, replay.differences(batch, val_batch, draws[0]), tolerance)


@pytest.mark.parametrize("method", ["alignment", "one_step", "neumann"])
def test_a_spectrum_of_silence_is_no_obstacle(method):
    """ContraWR's modulus has no derivative where a lead is flat: torch says nan."""
    dataset = samples_of("binary", flat=True)
    policy = TaskAugPolicy(1, sampling_rate=RATE)
    trainer = train(
        model_of("ContraWR", dataset), dataset, policy, hypergradient=method
    )
    assert policy.logits.abs().max() > 1e-3
    assert all(value.isfinite().all() for value in policy.state_dict().values())
    assert all(row["hypergradient_norm"] > 0 for row in trainer.history)


@pytest.mark.parametrize("mode", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("method", ["alignment", "one_step", "darts"])
def test_shared_magnitudes_serve_any_label(mode, method):
    dataset = samples_of(mode)
    policy = TaskAugPolicy(1, sampling_rate=RATE, shared_magnitudes=True)
    trainer = train(
        model_of("SparcNet", dataset), dataset, policy, mode, hypergradient=method
    )
    assert policy.logits.abs().max() > 1e-3
    assert SCORES[mode][0] in trainer.history[0]


@pytest.mark.parametrize("mode", ["multiclass", "multilabel", "regression"])
def test_ranking_needs_a_binary_label(mode):
    dataset = samples_of(mode)
    policy = TaskAugPolicy(1, sampling_rate=RATE, shared_magnitudes=True)
    with pytest.raises(ValueError, match=f"binary label, but SparcNet is {mode}"):
        train(
            model_of("SparcNet", dataset), dataset, policy, mode, outer_loss="ranking"
        )


@pytest.mark.parametrize("mode", ["multiclass", "multilabel", "regression"])
def test_magnitudes_of_two_classes_need_a_binary_label(mode):
    model = model_of("SparcNet", samples_of(mode))
    with pytest.raises(
        ValueError, match=rf"SparcNet is {mode}, but .*shared_magnitudes=True"
    ):
        BiLevelTrainer(model, policy=TaskAugPolicy(1), input_key="signal")
    BiLevelTrainer(
        model, policy=TaskAugPolicy(0), input_key="signal", enable_logging=False
    )


@pytest.mark.parametrize("name", ["SparcNet", "ContraWR"])
def test_a_policy_of_another_backbone_is_used_as_it_is(name, tmp_path):
    dataset = samples_of("binary")
    learned = TaskAugPolicy(1, sampling_rate=RATE).randomize_()
    learned.save(tmp_path / "mi.json")
    trainer = train(
        model_of(name, dataset),
        dataset,
        TaskAugPolicy.load(tmp_path / "mi.json"),
        hypergradient=None,
    )
    assert trainer.policy.to_frame().equals(learned.to_frame())


@pytest.mark.parametrize(
    ("mode", "usual"), [("binary", "ranking"), ("multiclass", "model")]
)
def test_the_usual_outer_loss_follows_the_label(mode, usual):
    seen = {}
    for outer_loss in (None, "ranking", "model") if mode == "binary" else (None, usual):
        found = seen.setdefault(outer_loss, [])
        train(
            model_of("ContraWR", samples_of(mode)),
            samples_of(mode),
            TaskAugPolicy(1, sampling_rate=RATE, shared_magnitudes=mode != "binary"),
            mode,
            outer_loss=outer_loss,
            on_hypergradient=lambda g, found=found: found.append(g["logits"]) or g,
        )
    assert torch.stack(seen[None]).equal(torch.stack(seen[usual]))
    if mode == "binary":
        assert not torch.stack(seen[None]).equal(torch.stack(seen["model"]))
