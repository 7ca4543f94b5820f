"""A learned policy as a transform in loops that know nothing of bi-level training."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyhealth.models.learned_augmentation import LearnedAugmentation
from pyhealth.models.taskaug_policy import TaskAugPolicy

B, C, T = 16, 12, 200


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def signals(dtype=torch.float32):
    return torch.randn(B, C, T, generator=seeded(0)).to(dtype)


def alternate():
    return torch.arange(B) % 2


@pytest.fixture
def policy():
    return TaskAugPolicy(2, sampling_rate=100).randomize_(seeded(1))


@pytest.fixture
def path(policy, tmp_path):
    policy.save(tmp_path / "mi.json", provenance={"task": "MI"})
    return tmp_path / "mi.json"


def single(operation, neg=0.5, pos=0.5, **settings):
    """A policy of one operation with magnitudes as a share of its interval."""
    policy = TaskAugPolicy(1, operations=[operation], sampling_rate=100, **settings)
    with torch.no_grad():
        policy.mag_neg.fill_(torch.tensor(neg).logit())
        if not policy.shared_magnitudes:
            policy.mag_pos.fill_(torch.tensor(pos).logit())
    return policy


def test_it_does_what_the_saved_policy_did_to_the_bit(policy, path):
    x, y = signals(), alternate()
    augment = LearnedAugmentation.load(path)
    with torch.no_grad():
        expected = policy(x, y, seeded(2))
    assert augment(x, y, generator=seeded(2)).equal(expected)
    assert not expected.equal(x)
    assert augment.to_frame().equals(policy.to_frame())
    assert augment.provenance == {"task": "MI"}


def test_an_old_draw_replays_bytes_in_any_order_and_in_both_modes(path):
    augment, x, y = LearnedAugmentation.load(path), signals(), alternate()
    draws = [augment.sample(x.shape, seeded(i)) for i in range(3)]
    first = [augment.apply(x, y, draw) for draw in draws]
    augment.eval()
    for index in (2, 0, 1):
        draw = pickle.loads(pickle.dumps(draws[index]))
        assert augment.apply(x, y, draw).equal(first[index])
    assert not first[0].equal(first[1])


def test_eval_mode_changes_nothing_and_draws_nothing(path):
    augment, x = LearnedAugmentation.load(path).eval(), signals()
    generator = seeded(0)
    state = generator.get_state()
    assert augment(x, generator=generator) is x
    assert generator.get_state().equal(state)


def test_the_global_generator_is_the_default(path):
    augment, x, y = LearnedAugmentation.load(path), signals(), alternate()
    torch.manual_seed(5)
    one = augment(x, y)
    torch.manual_seed(5)
    assert augment(x, y).equal(one)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
def test_any_float_dtype(path, dtype):
    augment, y = LearnedAugmentation.load(path), alternate()
    out = augment(signals(dtype), y, seeded(0))
    assert out.dtype == dtype and out.isfinite().all()
    exact = augment(signals(torch.float64), y, seeded(0))
    tolerance = 40 * torch.finfo(dtype).eps + 1e-5
    assert (out.double() - exact).abs().mean() < tolerance


def test_one_record_is_a_batch_of_one(path):
    augment, x = LearnedAugmentation.load(path), signals()[3]
    batch = augment(x[None], torch.tensor([1]), seeded(4))
    for label in (1, 1.0, torch.tensor(1), torch.tensor([True])):
        alone = augment(x, label, seeded(4))
        assert alone.shape == (C, T) and alone.equal(batch[0])
    draw = augment.sample(x.shape, seeded(4))
    assert augment.apply(x, 1, draw).equal(batch[0])


def test_no_optimiser_can_take_it_and_a_model_carries_it(path):
    model = nn.Sequential(LearnedAugmentation.load(path, magnitudes="mean"))
    assert list(model.parameters()) == []
    twin = nn.Sequential(
        LearnedAugmentation(TaskAugPolicy(2, sampling_rate=100), magnitudes="mean")
    )
    twin.load_state_dict(model.state_dict())
    assert twin[0].to_frame().equals(model[0].to_frame())
    model.apply(lambda module: None)  # nn.Module's own still works


def test_the_policy_given_is_left_as_it_is(policy):
    augment = LearnedAugmentation(policy, sampling_rate=250)
    assert policy.sampling_rate == 100 and len(list(policy.parameters())) == 3
    with torch.no_grad():
        policy.logits.fill_(0)
    assert not augment.to_frame().equals(policy.to_frame())


# Magnitudes and their units


@pytest.mark.parametrize("rate", [100, 250, 500])
def test_a_mask_lasts_its_seconds_at_every_rate(rate):
    policy = single("time_mask", shared_magnitudes=True)  # 0.5 of 2 seconds
    augment = LearnedAugmentation(policy, sampling_rate=rate)
    out = augment(torch.ones(64, 2, 10 * rate), generator=seeded(0))
    seconds = (1 - out[:, 0]).sum(dim=1) / rate
    assert torch.allclose(seconds, torch.ones(64), atol=0.05)
    assert augment.sampling_rate == rate


@pytest.mark.parametrize("rate", [100, 250])
def test_a_delay_is_its_seconds_at_every_rate(rate):
    policy = single("temporal_displacement", shared_magnitudes=True)  # 0.25 seconds
    augment = LearnedAugmentation(policy, sampling_rate=rate)
    ramp = torch.arange(10.0 * rate).expand(8, 1, -1) / rate  # shows its own time
    draw = augment.sample(ramp.shape, seeded(0))
    delay = (ramp - augment.apply(ramp, None, draw))[:, 0, 5 * rate]
    share = draw.stages[0].noise["temporal_displacement"]
    assert torch.allclose(delay, 0.25 * share, atol=1e-4)


def test_each_class_gets_its_own_magnitude():
    policy = single("magnitude_scale", neg=0.2, pos=0.8)
    augment = LearnedAugmentation(policy)
    x = torch.ones(B, 1, 4)
    draw = augment.sample(x.shape, seeded(0))
    share = draw.stages[0].noise["magnitude_scale"]
    for labels in (alternate(), alternate()[:, None].double(), alternate().bool()):
        change = augment.apply(x, labels, draw)[:, 0, 0] - 1
        expected = torch.where(alternate() == 1, 0.8, 0.2) * 0.5 * share
        assert torch.allclose(change, expected, atol=1e-6)


def test_the_mean_magnitude_needs_no_label_and_ignores_one():
    policy = single("magnitude_scale", neg=0.2, pos=0.8)
    augment = LearnedAugmentation(policy, magnitudes="mean")
    x = torch.ones(B, 1, 4)
    draw = augment.sample(x.shape, seeded(0))
    out = augment.apply(x, None, draw)
    share = draw.stages[0].noise["magnitude_scale"]
    assert torch.allclose(out[:, 0, 0] - 1, 0.5 * 0.5 * share, atol=1e-6)
    assert augment.apply(x, alternate() * 7, draw).equal(out)


# Ordinary loops


class Records(Dataset):
    """Records that a transform augments as they are read."""

    def __init__(self, augment=None):
        self.augment, self.x, self.y = augment, signals(), alternate()

    def __len__(self):
        return B

    def __getitem__(self, index):
        x, y = self.x[index], self.y[index]
        return (x if self.augment is None else self.augment(x, y)), y


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_it_works_in_workers(path):
    # Pickled as for a spawned worker, which would import PyHealth for half a minute.
    augment = pickle.loads(pickle.dumps(LearnedAugmentation.load(path)))
    loader = DataLoader(
        Records(augment),
        batch_size=4,
        num_workers=2,
        multiprocessing_context="fork",
        generator=seeded(0),
    )
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert first.shape == (B, C, T)
    assert not first.equal(second)  # every pass draws anew
    assert not first.equal(signals())


def test_an_ordinary_training_loop(path):
    """As README says it is used: a loop without a line of bi-level code."""
    torch.manual_seed(0)
    augment = LearnedAugmentation.load(path)
    model = nn.Sequential(nn.Conv1d(C, 4, 9), nn.ReLU(), nn.AdaptiveAvgPool1d(1))
    model.append(nn.Flatten()).append(nn.Linear(4, 1))
    before = {name: value.clone() for name, value in augment.state_dict().items()}
    optimizer = torch.optim.Adam(
        [*model.parameters(), *augment.parameters()], lr=1e-2, weight_decay=0.1
    )
    generator, losses = seeded(0), []
    for _ in range(15):
        for x, y in DataLoader(Records(), batch_size=8):
            x = x + y[:, None, None]  # the class can be seen
            logit = model(augment(x, y, generator=generator))[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logit, y.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    for name, value in augment.state_dict().items():
        assert value.equal(before[name])


# Errors


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a: a(signals()), "needs labels: pass them, or .*magnitudes='mean'"),
        (lambda a: a(signals(), alternate() + 1), r"in \[0, 1\].* got 1 to 2"),
        (lambda a: a(signals(), torch.ones(3)), "16 records need 16 labels"),
        (lambda a: a(torch.ones(5), 1), r"\(B, C, T\) or \(C, T\), got .*\(5,\)"),
        (lambda a: a(torch.ones(2, 9, dtype=torch.int16), 1), "floats of shape"),
        (lambda a: a(signals().to("meta"), alternate()), r"call augment.to\('meta'\)"),
    ],
)
def test_errors_name_the_remedy(path, call, words):
    with pytest.raises(ValueError, match=words):
        call(LearnedAugmentation.load(path))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sampling_rate": 0}, "sampling_rate must be positive, got 0"),
        ({"magnitudes": "max"}, "magnitudes must be 'class' or 'mean', got 'max'"),
    ],
)
def test_settings_are_checked(path, settings, words):
    with pytest.raises(ValueError, match=words):
        LearnedAugmentation.load(path, **settings)
