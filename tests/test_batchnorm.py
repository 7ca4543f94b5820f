"""Re-estimated BatchNorm statistics: what they are, and that nothing else changes."""

import pytest
import torch
from test_trainer import Watched, bytes_of, samples_of, trainer_of
from torch import nn

from pyhealth.bilevel.batchnorm import batchnorm_statistics_kept, reestimate_batchnorm
from pyhealth.datasets import get_dataloader
from pyhealth.models.taskaug_resnet import TaskAugResNet

RATE = 50


class Net(nn.Module):
    """Called as a PyHealth model is; its second norm sees the dropout's output."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.BatchNorm1d(3, momentum=0.3)
        self.frozen = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, ecg, label=None):
        return self.frozen(self.second(self.dropout(self.first(ecg))))


def batches(sizes=(4, 4, 4)):
    generator = torch.Generator().manual_seed(0)
    return [
        {"ecg": 3 * torch.randn(n, 3, 50, generator=generator) + 1, "label": None}
        for n in sizes
    ]


def statistics(layer, signals):
    """The plain averages over batches of mean and unbiased variance of each lead."""
    stacked = [x.transpose(0, 1).flatten(1) for x in signals]
    return (
        torch.stack([x.mean(dim=1) for x in stacked]).mean(dim=0),
        torch.stack([x.var(dim=1) for x in stacked]).mean(dim=0),
    )


def test_statistics_are_plain_averages_over_the_batches():
    torch.manual_seed(0)
    net = Net()
    net.train()
    net(**batches((8,))[0])  # what the running statistics were before leaves no trace
    reestimate_batchnorm(net, batches())
    mean, variance = statistics(net.first, [b["ecg"] for b in batches()])
    assert torch.allclose(net.first.running_mean, mean, atol=1e-5)
    assert torch.allclose(net.first.running_var, variance, rtol=1e-4)
    # Without dropout each batch reaches the second layer normalised by itself.
    assert torch.allclose(net.second.running_mean, torch.zeros(3), atol=1e-5)
    assert torch.allclose(net.second.running_var, torch.ones(3), atol=1e-2)


def test_everything_else_stays():
    torch.manual_seed(0)
    net = Net()
    net.train()
    net.dropout.eval()  # a mode that no call of train() would bring back
    modes = [module.training for module in net.modules()]
    weights = {name: p.clone() for name, p in net.named_parameters()}
    state = torch.get_rng_state()
    reestimate_batchnorm(net, batches())
    assert [module.training for module in net.modules()] == modes
    assert torch.get_rng_state().equal(state)
    assert (net.first.momentum, net.second.momentum) == (0.1, 0.3)
    for name, parameter in net.named_parameters():
        assert parameter.equal(weights[name]) and parameter.grad is None


def test_modes_come_back_after_an_error():
    net = Net().train()
    with pytest.raises(TypeError, match="unexpected keyword"):
        reestimate_batchnorm(net, [{"other": torch.ones(2, 3, 5)}])
    assert all(module.training for module in net.modules())
    assert (net.first.momentum, net.second.momentum) == (0.1, 0.3)


def test_a_network_without_batchnorm_is_left_alone():
    net = nn.Linear(2, 1)
    reestimate_batchnorm(net, iter([]))


def test_no_batches_are_an_error():
    with pytest.raises(ValueError, match="There are no batches"):
        reestimate_batchnorm(Net(), [])


def test_kept_statistics_come_back_after_an_error():
    net = Net()
    before = bytes_of(net)
    with pytest.raises(KeyError), batchnorm_statistics_kept(net):
        reestimate_batchnorm(net, batches())
        assert bytes_of(net) != before
        raise KeyError
    assert bytes_of(net) == before


def test_a_models_own_policy_is_off():
    dataset = samples_of("train", seed=0)
    torch.manual_seed(0)
    model = TaskAugResNet(dataset, 3, base_width=4, sampling_rate=RATE)
    loader = get_dataloader(dataset, 8)
    model.train()
    reestimate_batchnorm(model, loader)
    augmented = bytes_of(model)
    model.augment = False
    reestimate_batchnorm(model, loader)
    assert bytes_of(model) == augmented


# In the trainer


@pytest.fixture(scope="module")
def sets():
    return samples_of("train", seed=0), samples_of("val", seed=1)


def loaders(sets):
    return (
        get_dataloader(sets[0], 8, shuffle=True, seed=0),
        get_dataloader(sets[1], 12),
    )


def resnet(dataset):
    torch.manual_seed(0)
    return TaskAugResNet(dataset, 3, policy_stages=1, base_width=4, sampling_rate=RATE)


def train(sets, **settings):
    trainer = trainer_of(resnet(sets[0]))
    settings = {"epochs": 3, "warmup_epochs": 0} | settings
    trainer.train(*loaders(sets), **settings)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
def test_training_goes_on_as_without_and_scores_are_of_clean_statistics(sets, last):
    plain = train(sets, load_best_model_at_last=False)
    clean = train(sets, reestimate_statistics=True, load_best_model_at_last=last)
    for one, other in zip(plain.history, clean.history, strict=True):
        for key in one:
            if key not in ("seconds", "roc_auc", "loss", "hypergradient_snr"):
                assert one[key] == other[key], key
        assert one["loss"] != other["loss"]
    # The statistics it ends with are the clean ones of its weights.
    ended = bytes_of(clean.model)
    reestimate_batchnorm(clean.model, get_dataloader(sets[0], 8))
    assert bytes_of(clean.model) == ended
    if not last:
        for name, p in plain.model.named_parameters():
            assert p.equal(dict(clean.model.named_parameters())[name])


def test_scores_in_the_history_are_those_of_the_restored_model(sets):
    trainer = train(sets, reestimate_statistics=True)
    best = max(trainer.history, key=lambda row: row["roc_auc"])
    assert trainer.evaluate(loaders(sets)[1])["loss"] == best["loss"]


def test_checkpoints_hold_the_clean_statistics(sets, tmp_path):
    trainer = trainer_of(
        resnet(sets[0]), enable_logging=True, output_path=tmp_path, exp_name="run"
    )
    trainer.train(*loaders(sets), epochs=2, reestimate_statistics=True)
    other = trainer_of(resnet(sets[0]))
    other.load_ckpt(str(tmp_path / "run" / "last.ckpt"))
    scores = other.evaluate(loaders(sets)[1])
    assert scores["loss"] == trainer.history[-1]["loss"]


def test_a_loader_of_another_kind_of_dataset_is_used_itself(sets):
    samples = [{**sample} for sample in sets[0]]
    loader = torch.utils.data.DataLoader(
        samples, batch_size=8, collate_fn=get_dataloader(sets[0], 8).collate_fn
    )
    passes = []
    watched = Watched(loader, lambda: passes.append(1))
    trainer = trainer_of(resnet(sets[0]))
    trainer.train(
        watched, loaders(sets)[1], epochs=2, reestimate_statistics=True, patience=5
    )
    assert len(passes) == 4  # two to train, two to re-estimate


def test_policy_and_labels_play_no_part(sets):
    """The statistics are of the signals as they are, whatever the policy."""
    results = []
    for seed in (1, 2):
        trainer = trainer_of(resnet(sets[0]))
        trainer.policy.randomize_(torch.Generator().manual_seed(seed))
        reestimate_batchnorm(trainer.model, get_dataloader(sets[0], 8))
        results.append(bytes_of(trainer.model.backbone))
    assert results[0] == results[1]
