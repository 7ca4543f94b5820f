"""Each augmentation: what it does to a signal, in physical units, and its slope.

Signals are chosen so that the answer can be seen (spikes, ramps, constant leads, sine
waves). Gradients are compared by value, in float64, with central differences.
"""

import dataclasses
import inspect
import math
import pickle
import typing

import pytest
import torch

from pyhealth.models import ecg_augmentations, ecg_draws
from pyhealth.models.ecg_augmentations import AUGMENTATIONS
from pyhealth.models.ecg_draws import electrode_noise, lead_noise
from pyhealth.models.ecg_interpolation import interpolate

NAMES = (
    "gaussian_noise",
    "magnitude_scale",
    "time_mask",
    "baseline_wander",
    "temporal_warp",
    "temporal_displacement",
    "no_op",
    "lead_dropout",
)
LEARNED = tuple(name for name in NAMES if name != "no_op")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DRAWS = (
    "normal_noise",
    "wander_noise",
    "uniform_noise",
    "signed_noise",
    "warp_noise",
    "empty_noise",
    "lead_noise",
    "electrode_noise",
)
#: Leads, samples and hertz; every number of leads meets every length.
SIZES = [
    (leads, length, (100.0, 250.0, 500.0)[(row + column) % 3])
    for row, leads in enumerate((1, 8, 12))
    for column, length in enumerate((1, 2, 37, 500))
]
LIMB = {"I": 0, "II": 1, "III": 2, "aVR": 3, "aVL": 4, "aVF": 5}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ecg(records=3, leads=12, length=500, rate=250.0, dtype=torch.float64, seed=0):
    """Beats of another height in every lead, on noise; no lead is constant."""
    time = torch.arange(length, dtype=torch.float64) / rate
    beats = torch.exp(-((((time + 0.3) % 0.8 - 0.4) / 0.03) ** 2))
    noise = torch.randn(
        records, leads, length, dtype=torch.float64, generator=seeded(9)
    )
    height = 0.5 + torch.rand(
        records, leads, 1, dtype=torch.float64, generator=seeded(seed)
    )
    return (height * beats + 0.2 * noise).to(dtype)


def magnitude_at(op, share, records, dtype=torch.float64):
    return torch.full((records,), op.low + share * (op.high - op.low), dtype=dtype)


def apply(name, x, magnitude, draw, rate=250.0):
    """Apply an operation with one number, or one a record, for magnitude and draw."""
    magnitude, draw = (
        torch.as_tensor(v, dtype=torch.float64).expand(len(x))
        for v in (magnitude, draw)
    )
    return AUGMENTATIONS[name].apply(x, magnitude, draw, rate)


class TestRegistry:
    def test_order_and_names_are_public(self):
        assert tuple(AUGMENTATIONS) == NAMES
        assert all(op.name == name for name, op in AUGMENTATIONS.items())
        assert all(op.apply.__name__ == name for name, op in AUGMENTATIONS.items())
        assert set(NAMES) < set(ecg_augmentations.__all__)

    def test_intervals_and_units(self):
        spread = "standard deviations of the lead"
        assert {n: (op.low, op.high, op.unit) for n, op in AUGMENTATIONS.items()} == {
            "gaussian_noise": (0.0, 0.5, spread),
            "magnitude_scale": (0.0, 0.5, "of the amplitude"),
            "time_mask": (0.0, 2.0, "s"),
            "baseline_wander": (0.0, 1.0, spread),
            "temporal_warp": (0.0, 0.3, "of the speed"),
            "temporal_displacement": (0.0, 0.5, "s"),
            "no_op": (0.0, 0.0, ""),
            "lead_dropout": (0.0, 0.5, "probability"),
        }
        assert all(op.low < op.high for n, op in AUGMENTATIONS.items() if n != "no_op")

    def test_nothing_can_be_added_or_changed(self):
        with pytest.raises(TypeError):
            AUGMENTATIONS["time_mask"] = AUGMENTATIONS["no_op"]
        with pytest.raises(TypeError):
            del AUGMENTATIONS["no_op"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            AUGMENTATIONS["time_mask"].high = 3.0

    @pytest.mark.parametrize("name", NAMES)
    def test_an_entry_survives_pickle(self, name):
        op = AUGMENTATIONS[name]
        again = pickle.loads(pickle.dumps(op))
        assert again == op
        assert again.apply is op.apply
        assert again.draw is op.draw

    @pytest.mark.parametrize("name", NAMES)
    def test_all_operations_are_called_alike(self, name):
        parameters = inspect.signature(AUGMENTATIONS[name].apply).parameters.values()
        assert [p.name for p in parameters] == ["x", "magnitude", "draw", "rate"]
        assert all(p.default is p.empty for p in parameters)

    @pytest.mark.parametrize("name", DRAWS)
    def test_all_draws_are_called_alike(self, name):
        signature = inspect.signature(getattr(ecg_draws, name))
        template = inspect.signature(ecg_draws.normal_noise)
        assert signature == template
        assert list(signature.parameters) == ["shape", "options"]
        options = typing.get_type_hints(ecg_draws.DrawOptions)
        assert list(options) == ["dtype", "device", "generator"]

    def test_every_entry_names_a_draw_of_the_list_above(self):
        assert {op.draw.__name__ for op in AUGMENTATIONS.values()} < set(DRAWS)


class TestDraws:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", DRAWS)
    def test_dtype_records_and_generator(self, name, dtype):
        draw, shape = getattr(ecg_draws, name), torch.Size([5, 12, 40])
        before = torch.get_rng_state()
        first = draw(shape, dtype=dtype, generator=seeded(1))
        again = draw(shape, dtype=dtype, generator=seeded(1))
        other = draw(shape, dtype=dtype, generator=seeded(2))
        assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
        assert first.dtype == dtype
        assert len(first) == 5
        assert not first.isnan().any()
        assert torch.equal(first, again)
        assert name == "empty_noise" or not torch.equal(first, other)

    @pytest.mark.parametrize("name", DRAWS)
    def test_without_a_generator_the_global_one_decides(self, name):
        draw, shape = getattr(ecg_draws, name), torch.Size([5, 12, 40])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            first = draw(shape)
            torch.manual_seed(3)
            assert torch.equal(draw(shape), first)
            assert name == "empty_noise" or not torch.equal(draw(shape), first)

    @pytest.mark.parametrize(
        "name, low, mean, deviation",
        [
            ("normal_noise", -math.inf, 0.0, 1.0),
            ("wander_noise", -math.inf, 0.0, 1.0),
            ("uniform_noise", 0.0, 0.5, 1 / math.sqrt(12)),
            ("signed_noise", -1.0, 0.0, 2 / math.sqrt(12)),
            ("warp_noise", -1.0, 0.0, 2 / math.sqrt(12)),
        ],
    )
    def test_distribution(self, name, low, mean, deviation):
        size = torch.Size([20_000, 1, 1])
        draw = getattr(ecg_draws, name)(size, dtype=torch.float64, generator=seeded(4))
        assert low <= draw.min()
        assert math.isinf(low) or draw.max() < 1
        assert draw.mean().item() == pytest.approx(mean, abs=0.02)
        assert draw.std().item() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
class TestEveryOperation:
    def test_keeps_shape_and_dtype_and_is_finite_and_repeatable(self, name, dtype):
        op = AUGMENTATIONS[name]
        for leads, length, rate in SIZES:
            x = ecg(3, leads, length, rate, dtype)
            draw = op.draw(x.shape, dtype=dtype, generator=seeded(1))
            for share in (0.5, 1.0):
                m = magnitude_at(op, share, 3, dtype)
                kept = x.clone()
                y = op.apply(x, m, draw, rate)
                assert (y.shape, y.dtype) == (x.shape, x.dtype)
                assert y.isfinite().all(), (leads, length, rate, share)
                assert torch.equal(op.apply(x, m, draw, rate), y)
                assert torch.equal(x, kept), "the input was written to"

    def test_zero_magnitude_is_the_identity(self, name, dtype):
        op, zero = AUGMENTATIONS[name], torch.zeros(4, dtype=dtype)
        for leads, length in ((1, 1), (8, 2), (12, 37), (12, 500)):
            x = ecg(4, leads, length, dtype=dtype)
            draw = op.draw(x.shape, dtype=dtype, generator=seeded(2))
            assert torch.equal(op.apply(x, zero, draw, 250.0), x)

    def test_a_batch_equals_each_record_alone(self, name, dtype):
        op, x = AUGMENTATIONS[name], ecg(4, 12, 200, dtype=dtype)
        draw = op.draw(x.shape, dtype=dtype, generator=seeded(3))
        shares = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
        m = (op.low + shares * (op.high - op.low)).to(dtype)
        together = op.apply(x, m, draw, 250.0)
        alone = [
            op.apply(x[i : i + 1], m[i : i + 1], draw[i : i + 1], 250.0)
            for i in range(4)
        ]
        torch.testing.assert_close(together, torch.cat(alone))
        if name != "no_op":
            assert all(
                not torch.equal(y[0], own) for y, own in zip(alone, x, strict=True)
            )

    def test_a_constant_lead_survives(self, name, dtype):
        op, x = AUGMENTATIONS[name], ecg(2, 3, 60, dtype=dtype)
        x[:, 1] = 0
        x[:, 2] = 0.5
        draw = op.draw(x.shape, dtype=dtype, generator=seeded(4))
        m = magnitude_at(op, 0.5, 2, dtype).requires_grad_()
        x.requires_grad_()
        y = op.apply(x, m, draw, 250.0)
        assert y.isfinite().all()
        y.float().square().sum().backward()
        assert x.grad.isfinite().all()
        assert name == "no_op" or m.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_rounds_values_and_not_time(name, dtype):
    """Half floats cannot count to 3000: they must not hold times and positions."""
    op, x = AUGMENTATIONS[name], ecg(2, 2, 3000, rate=500.0, dtype=dtype)
    draw = op.draw(x.shape, generator=seeded(1))
    m = magnitude_at(op, 0.8, 2, torch.float32)
    half = op.apply(x, m, draw, 500.0).double()
    wide = op.apply(x.double(), m, draw, 500.0)
    assert (half - wide).abs().max() < 4 * torch.finfo(dtype).eps * wide.abs().max()


@pytest.mark.parametrize("where", [0.03, 0.37, 0.91])
@pytest.mark.parametrize("name", LEARNED)
def test_magnitude_gradient_is_the_slope(name, where):
    op, x, h = AUGMENTATIONS[name], ecg(), 1e-6
    # Random weights, so that a shift or a gain does not cancel in the sum.
    probe = torch.randn(x.shape, dtype=torch.float64, generator=seeded(5))
    draw = op.draw(x.shape, dtype=torch.float64, generator=seeded(0))

    def each(m):  # one sum a record: records do not see one another (tested above)
        return (op.apply(x, m, draw, 250.0) * probe).sum(dim=(1, 2))

    m = magnitude_at(op, where, len(x))
    slope = torch.func.grad(lambda m: each(m).sum())(m)
    difference = (each(m + h) - each(m - h)) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)
    assert difference.abs().min() > 1e-3  # a zero slope is a failure


@pytest.mark.parametrize("name", LEARNED)
def test_signal_gradient_is_the_slope(name):
    """Stage 2 hands the gradient of its input to stage 1."""
    op, x = AUGMENTATIONS[name], ecg(2, 1, 12)
    draw = op.draw(x.shape, dtype=torch.float64, generator=seeded(1))
    m = magnitude_at(op, 0.6, 2)
    assert torch.autograd.gradcheck(
        lambda x: op.apply(x, m, draw, 250.0), x.requires_grad_()
    )


class TestGaussianNoise:
    def test_level_is_in_standard_deviations_of_the_lead(self):
        x = ecg(2, 3, 20_000) * torch.tensor([[0.1], [1.0], [7.0]])
        draw = ecg_draws.normal_noise(x.shape, dtype=x.dtype, generator=seeded(0))
        m = torch.tensor([0.1, 0.4], dtype=x.dtype)
        added = AUGMENTATIONS["gaussian_noise"].apply(x, m, draw, 250.0) - x
        level = added.std(dim=-1) / x.std(dim=-1)
        torch.testing.assert_close(level, m[:, None].expand(2, 3), rtol=0.02, atol=0)

    def test_noise_is_white(self):
        x = ecg(1, 1, 20_000)
        draw = ecg_draws.normal_noise(x.shape, dtype=x.dtype, generator=seeded(0))
        m = torch.tensor([0.5], dtype=x.dtype)
        added = (AUGMENTATIONS["gaussian_noise"].apply(x, m, draw, 250.0) - x)[0, 0]
        neighbours = torch.corrcoef(torch.stack([added[1:], added[:-1]]))[0, 1]
        assert abs(neighbours) < 0.03


class TestMagnitudeScale:
    def test_one_gain_for_all_leads_keeps_their_ratios(self):
        x = ecg(2, 12, 100)
        y = apply("magnitude_scale", x, 0.4, torch.tensor([0.5, -1.0]))
        gain = torch.tensor([1.2, 0.6], dtype=x.dtype)[:, None, None]
        torch.testing.assert_close(y / x, gain.expand_as(x))


class TestTimeMask:
    @pytest.mark.parametrize("rate", [100.0, 250.0, 500.0])
    @pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
    def test_silences_the_stated_seconds(self, rate, place):
        length = int(4 * rate) + 1  # four seconds
        y = apply("time_mask", torch.ones(1, 2, length), 0.8, place, rate)[0]
        time = torch.arange(length) / rate
        start = place * (4 - 0.8)
        edge = 0.15  # seconds, seven times the edge's scale
        inside = (time > start + edge) & (time < start + 0.8 - edge)
        outside = (time < start - edge) | (time > start + 0.8 + edge)
        assert y[:, inside].max() < 2e-3
        assert y[:, outside].min() > 0.998
        half = y[:, ((time - start).abs() < 1e-4)]  # the edge lies where it should
        torch.testing.assert_close(half, torch.full_like(half, 0.5), atol=1e-3, rtol=0)

    def test_length_is_the_silence_summed_over_time(self):
        y = apply("time_mask", torch.ones(1, 1, 1001), 0.7, 0.5, rate=250.0)
        assert (1 - y).sum().item() / 250 == pytest.approx(0.7, rel=1e-4)

    def test_all_leads_are_silent_together(self):
        y = apply("time_mask", torch.ones(1, 12, 300), 0.5, 0.4)
        assert torch.equal(y, y[:, :1].expand_as(y))

    def test_a_mask_longer_than_the_record_silences_it(self):
        y = apply("time_mask", torch.ones(1, 1, 100), 2.0, 0.5, rate=250.0)
        assert y.max() < 1e-6


class TestBaselineWander:
    def drift(self, records, leads, length, rate):
        """Return the drift at magnitude 1, divided by the lead's deviation."""
        op = AUGMENTATIONS["baseline_wander"]
        x = ecg(records, leads, length, rate) * torch.tensor([1.0, 5.0])[:, None]
        draw = op.draw(x.shape, dtype=x.dtype, generator=seeded(0))
        y = op.apply(x, torch.ones(records, dtype=x.dtype), draw, rate)
        half = op.apply(x, torch.full((records,), 0.5, dtype=x.dtype), draw, rate)
        torch.testing.assert_close(half - x, (y - x) / 2)
        return (y - x) / x.std(dim=-1, correction=0, keepdim=True)

    def test_root_mean_square_is_the_magnitude_on_average(self):
        drift = self.drift(400, 2, 2000, rate=100.0)  # 20 s: whole periods of all
        power = drift.square().mean(dim=(0, 2))
        torch.testing.assert_close(
            power.sqrt(), torch.ones(2, dtype=power.dtype), rtol=0.03, atol=0
        )

    @pytest.mark.parametrize("rate", [100.0, 500.0])
    def test_band(self, rate):
        drift = self.drift(100, 2, int(20 * rate), rate)
        power = torch.fft.rfft(drift).abs().square().mean(dim=(0, 1))
        hertz = torch.fft.rfftfreq(drift.shape[-1], 1 / rate)
        band = (hertz > 0.04) & (hertz < 0.55)
        assert power[~band].sum() < 1e-20 * power.sum()
        assert band.sum() == 10
        assert power[band].max() < 2 * power[band].min()  # a flat spectrum

    def test_leads_drift_apart(self):
        drift = self.drift(1, 2, 2000, rate=100.0)[0]
        assert abs(torch.corrcoef(drift)[0, 1]) < 0.9


class TestTemporalWarp:
    def warped_clock(self, draw, magnitude=0.3, length=400):
        """Show a ramp: the result is the time that each output sample shows."""
        ramp = torch.arange(length, dtype=torch.float64)[None, None]
        m = torch.full((len(draw),), magnitude, dtype=torch.float64)
        x = ramp.expand(len(draw), -1, -1)
        return AUGMENTATIONS["temporal_warp"].apply(x, m, draw, 100.0)[:, 0]

    def test_keeps_order_and_end_points(self):
        size = torch.Size([200, 1, 400])
        draw = ecg_draws.warp_noise(size, dtype=torch.float64, generator=seeded(0))
        clock = self.warped_clock(draw)
        assert clock.diff().min() > 0
        torch.testing.assert_close(clock[:, 0], torch.zeros(200, dtype=clock.dtype))
        torch.testing.assert_close(clock[:, -1], torch.full_like(clock[:, 0], 399))
        assert (clock - torch.arange(400)).abs().amax(dim=1).median() > 3

    @pytest.mark.parametrize("sign", [1, -1])
    def test_speed_changes_by_the_magnitude_at_most(self, sign):
        draw = torch.full((1, 5), float(sign), dtype=torch.float64)
        speed = self.warped_clock(draw)[0].diff()[3:-3]  # off the repeated edges
        assert (speed - 1).abs().max() < 0.3
        assert speed[0].item() == pytest.approx(1 + sign * 0.3, abs=0.01)

    def test_is_relative_to_the_record(self):
        draw = ecg_draws.warp_noise(torch.Size([3, 1, 1]), generator=seeded(1))
        short = self.warped_clock(draw, length=201)[:, 10:-10] / 200
        long = self.warped_clock(draw, length=401)[:, 20:-20:2] / 400
        torch.testing.assert_close(short, long, atol=1e-3, rtol=0)


class TestTemporalDisplacement:
    @pytest.mark.parametrize("rate, samples", [(100.0, 10), (250.0, 25), (500.0, 50)])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_tenth_of_a_second(self, rate, samples, sign):
        x = torch.zeros(1, 2, 301, dtype=torch.float64)
        x[..., 150] = 1
        y = apply("temporal_displacement", x, 0.1, sign, rate)
        want = torch.zeros_like(x)
        want[..., 150 + sign * samples] = 1  # positive moves the trace right
        torch.testing.assert_close(y, want, atol=1e-9, rtol=0)

    def test_draw_is_the_share_of_the_delay(self):
        x = ecg(1, 1, 100)
        y = apply("temporal_displacement", x, 0.4, 0.5, rate=20.0)
        torch.testing.assert_close(y[..., 4:], x[..., :-4])

    def test_edges_are_repeated_not_wrapped(self):
        x = torch.arange(1.0, 9.0, dtype=torch.float64)[None, None]
        right = apply("temporal_displacement", x, 3.0, 1, rate=1.0)
        assert right[0, 0].tolist() == [1, 1, 1, 1, 2, 3, 4, 5]
        left = apply("temporal_displacement", x, 3.0, -1, rate=1.0)
        assert left[0, 0].tolist() == [4, 5, 6, 7, 8, 8, 8, 8]

    def test_a_delay_longer_than_the_record_shows_its_edge(self):
        y = apply("temporal_displacement", ecg(1, 2, 20), 0.5, 1, rate=250.0)
        torch.testing.assert_close(y, ecg(1, 2, 20)[..., :1].expand_as(y))


class TestInterpolation:
    @pytest.mark.parametrize("hertz, low", [(10, 0.9999), (40, 0.98)])
    @pytest.mark.parametrize("shift", [0.5, -0.5, 3.5])
    def test_gain_between_two_samples(self, hertz, low, shift):
        step = 2 * math.pi * hertz / 250
        time = torch.arange(2000, dtype=torch.float64)
        y = interpolate(
            torch.sin(step * time)[None, None], torch.full_like(time, shift)[None]
        )[0, 0, 25:-25]  # 78 times 25 samples: whole periods of both waves
        moved = step * (time + shift)[25:-25]
        # In-phase and quadrature parts of the result at the shifted phase.
        gain, error = (2 * (y * f(moved)).mean().item() for f in (torch.sin, torch.cos))
        assert low <= gain <= 1.01
        assert abs(error) < 1e-3  # the delay itself is exact: no phase error

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shift", [0, 1, -1, 6, -9, 50, -50])
    def test_whole_shifts_are_exact(self, dtype, shift):
        x = ecg(2, 3, 30, dtype=dtype)
        at = (torch.arange(30) + shift).clamp(0, 29)
        y = interpolate(x, torch.full((2, 30), float(shift), dtype=dtype))
        assert torch.equal(y, x[..., at])

    def test_each_record_and_sample_has_a_shift_of_its_own(self):
        x = torch.arange(12.0, dtype=torch.float64).expand(2, 1, 12) ** 2
        shift = torch.zeros(2, 12, dtype=torch.float64)
        shift[0, 5], shift[1, 6] = 0.5, -1.5
        want = x.clone()
        want[0, 0, 5], want[1, 0, 6] = 5.5**2, 4.5**2  # a parabola is met exactly
        torch.testing.assert_close(interpolate(x, shift), want)

    def test_slope_is_continuous_over_whole_shifts(self):
        x = ecg(1, 1, 40)

        def slope(shift):
            shift = torch.full((1, 40), shift, dtype=torch.float64).requires_grad_()
            return torch.autograd.grad(interpolate(x, shift).sum(), shift)[0]

        torch.testing.assert_close(slope(2 - 1e-9), slope(2 + 1e-9), atol=1e-7, rtol=0)
        torch.testing.assert_close(slope(2.0), slope(2 - 1e-9), atol=1e-7, rtol=0)
        assert slope(2.0).abs().max() > 0.1

    def test_gradients(self):
        x = ecg(2, 2, 12).requires_grad_()
        shift = torch.rand(2, 12, dtype=torch.float64, generator=seeded(0)) * 6 - 3
        assert torch.autograd.gradcheck(interpolate, (x, shift.requires_grad_()))


class TestLeadDropout:
    def gates(self, noise, probability):
        x = torch.ones(*noise.shape, 1, dtype=noise.dtype)
        m = torch.full((len(noise),), probability, dtype=noise.dtype)
        return AUGMENTATIONS["lead_dropout"].apply(x, m, noise, 100.0)[..., 0]

    def noise(self, leads, draw=lead_noise, records=4000):
        size = torch.Size([records, leads, 1])
        return draw(size, dtype=torch.float64, generator=seeded(0))

    @pytest.mark.parametrize("probability", [0.05, 0.2, 0.5])
    def test_a_lead_drops_with_the_stated_probability(self, probability):
        dropped = (self.gates(self.noise(12), probability) < 0.5).double()
        torch.testing.assert_close(
            dropped.mean(dim=0),
            torch.full((12,), probability, dtype=dropped.dtype),
            atol=0.025,  # three standard deviations at a half
            rtol=0,
        )

    def test_leads_drop_independently(self):
        dropped = (self.gates(self.noise(12), 0.2) < 0.5).double()
        correlation = torch.corrcoef(dropped.T) - torch.eye(12)
        assert correlation.abs().max() < 0.06

    @pytest.mark.parametrize("leads", [1, 2, 12])
    def test_one_lead_always_stays_whole(self, leads):
        gates = self.gates(self.noise(leads), 0.5)
        assert torch.equal(gates.amax(dim=1), torch.ones(4000, dtype=gates.dtype))
        if leads > 1:
            assert gates.amin() < 0.01

    def test_electrode_draw_keeps_one_lead_whole(self):
        gates = self.gates(self.noise(12, electrode_noise), 0.5)
        assert torch.equal(gates.amax(dim=1), torch.ones(4000, dtype=gates.dtype))

    def test_gates_silence_and_keep_in_proportion(self):
        gates = self.gates(self.noise(12), 0.2)
        assert gates.min() >= 0
        assert gates.max() <= 1
        x = ecg(4000, 12, 2)
        m = torch.full((4000,), 0.2, dtype=x.dtype)
        y = AUGMENTATIONS["lead_dropout"].apply(x, m, self.noise(12), 100.0)
        torch.testing.assert_close(y, gates[..., None] * x)

    def test_a_good_share_of_draws_carries_gradient(self):
        """A gate with a steep slope is differentiable by name only."""
        noise = self.noise(12)
        p = torch.full((len(noise),), 0.2, dtype=torch.float64, requires_grad=True)
        # An expanded p gives each lead a slope of its own.
        each = p[:, None].expand(-1, 12).reshape(-1).detach().requires_grad_()
        x = torch.ones(each.numel(), 1, 1, dtype=torch.float64)
        gates = AUGMENTATIONS["lead_dropout"].apply(
            x, each, noise.reshape(-1, 1), rate=100.0
        )
        (slope,) = torch.autograd.grad(gates.sum(), each)
        assert (slope.abs() > 0.1).double().mean() > 0.2
        # Its mean over draws is the slope of the mean gate: about one, little noise.
        assert -1.3 < slope.mean() < -0.7
        assert slope.std() < 3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_slope_is_finite_at_probability_zero(self, dtype):
        noise = torch.tensor([[-math.inf, -40.0, 0.0, 40.0]], dtype=dtype)
        p = torch.zeros(1, dtype=dtype, requires_grad=True)
        x = torch.ones(1, 4, 2, dtype=dtype)
        y = AUGMENTATIONS["lead_dropout"].apply(x, p, noise, 100.0)
        assert torch.equal(y, x)
        assert torch.autograd.grad(y.sum(), p)[0].isfinite().all()


class TestElectrodes:
    ARM_RIGHT = frozenset({"I", "II", "aVR", "aVL", "aVF"})
    ARM_LEFT = frozenset({"I", "III", "aVR", "aVL", "aVF"})
    LEG_LEFT = frozenset({"II", "III", "aVR", "aVL", "aVF"})

    def dropped(self, probability=0.3, records=4000):
        size = torch.Size([records, 12, 1])
        noise = electrode_noise(size, dtype=torch.float64, generator=seeded(0))
        m = torch.full((records,), probability, dtype=torch.float64)
        x = torch.ones(size, dtype=torch.float64)
        return AUGMENTATIONS["lead_dropout"].apply(x, m, noise, 100.0)[..., 0] < 0.5

    def test_limb_leads_go_by_electrode(self):
        rows = self.dropped()[:, :6]
        seen = [
            frozenset(n for n, i in LIMB.items() if row[i]) for row in rows.tolist()
        ]
        patterns = {
            frozenset(): 0.7**3,
            self.ARM_RIGHT: 0.3 * 0.7**2,  # only III is left
            self.ARM_LEFT: 0.3 * 0.7**2,  # only II
            self.LEG_LEFT: 0.3 * 0.7**2,  # only I
            frozenset(LIMB): 3 * 0.3**2 * 0.7 + 0.3**3,
        }
        assert set(seen) == set(patterns)
        for pattern, share in patterns.items():
            assert seen.count(pattern) / len(seen) == pytest.approx(share, abs=0.025)

    def test_chest_leads_go_one_by_one(self):
        rows = self.dropped().double()
        assert (rows[:, 6:].mean(dim=0) - 0.3).abs().max() < 0.025
        correlation = torch.corrcoef(rows.T)[6:] - torch.eye(12)[6:]
        assert correlation.abs().max() < 0.06  # with the limb leads neither

    @pytest.mark.parametrize("leads", [1, 8, 13])
    def test_needs_the_standard_leads(self, leads):
        with pytest.raises(ValueError, match=f"12 standard leads, got {leads}"):
            electrode_noise(torch.Size([2, leads, 10]))
