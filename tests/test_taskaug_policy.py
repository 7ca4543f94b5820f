"""The policy: what a draw does, and that its gradient is the derivative by value."""

import copy
import math
import pickle

import pytest
import torch
from torch.func import functional_call

from pyhealth.models.ecg_augmentations import AUGMENTATIONS
from pyhealth.models.taskaug_policy import TaskAugPolicy

RATE = 100
ONE_EACH = torch.tensor([0.0, 1.0])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def signals(records=16, leads=3, length=60, dtype=torch.float64, seed=0):
    size = (records, leads, length)
    return torch.randn(size, dtype=torch.float64, generator=seeded(seed)).to(dtype)


def alternate(records=16):
    return (torch.arange(records) % 2).double()


def policy_of(stages=1, operations=None, seed=0, **settings):
    """Return a float64 policy with random logits and magnitudes."""
    policy = TaskAugPolicy(
        stages, sampling_rate=RATE, operations=operations, **settings
    )
    policy.randomize_(seeded(seed)).double()
    with torch.no_grad():
        policy.logits.mul_(0.3)  # no operation so rare that it is never drawn
    return policy


def always(policy, name):
    """Make a policy choose one operation."""
    with torch.no_grad():
        policy.logits.fill_(-1e4)
        policy.logits[:, policy.op_names.index(name)] = 1e4
    return policy


def by_hand(policy, x, labels, draw):
    """Apply a draw one record at a time, in the plainest way."""
    magnitudes = policy.magnitudes()
    for stage, part in enumerate(draw.stages):
        rows = x.clone()
        for column, op in enumerate(policy.operations):
            for place, record in enumerate(part.rows[column].tolist()):
                side = "pos" if labels[record] else "neg"
                m = magnitudes[side][stage, column].reshape(1)
                at = record if part.complete else place
                noise = part.noise[op.name][at : at + 1]
                one = x[record : record + 1]
                rows[record] = op.apply(one, m, noise, policy.sampling_rate)[0]
        x = rows
    return x


class TestDrawThenApply:
    @pytest.mark.parametrize("complete", [True, False])
    def test_a_draw_replays_to_the_byte(self, complete):
        policy, x, y = policy_of(2), signals(), alternate()
        draw = policy.sample(x.shape, y, seeded(1), complete=complete)
        first = policy.apply(x, y, draw)
        assert torch.equal(policy.apply(x, y, draw), first)
        again = policy.sample(x.shape, y, seeded(1), complete=complete)
        assert torch.equal(policy.apply(x, y, again), first)
        other = policy.sample(x.shape, y, seeded(2), complete=complete)
        assert not torch.equal(policy.apply(x, y, other), first)

    def test_forward_is_sample_and_apply(self):
        policy, x, y = policy_of(2), signals(), alternate()
        draw = policy.sample(x.shape, y, seeded(1))
        assert torch.equal(policy(x, y, seeded(1)), policy.apply(x, y, draw))
        assert policy(x, y, seeded(1)).requires_grad
        with torch.no_grad():
            lean = policy.sample(x.shape, y, seeded(1), complete=False)
            assert torch.equal(policy(x, y, seeded(1)), policy.apply(x, y, lean))

    def test_a_generator_is_the_only_source_of_randomness(self):
        policy, x, y = policy_of(2), signals(), alternate()
        state, rng = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
        policy.sample(x.shape, y, seeded(0))
        policy(x, y, seeded(0))
        policy.randomize_(seeded(0))
        policy.load_state_dict(state)
        assert torch.equal(torch.get_rng_state(), rng)

    def test_without_a_generator_the_global_seed_repeats(self):
        policy, x, y = policy_of(2), signals(), alternate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = policy(x, y)
            second = policy(x, y)
            torch.manual_seed(5)
            assert torch.equal(policy(x, y), first)
        assert not torch.equal(first, second)

    def test_a_draw_carries_no_graph_and_changes_nothing(self):
        policy, x, y = policy_of(2), signals(), alternate()
        before = copy.deepcopy(policy.state_dict())
        kept = x.clone()
        draw = policy.sample(x.shape, y, seeded(0))
        policy.apply(x, y, draw)
        for part in draw.stages:
            for tensor in (part.soft, *part.rows, *part.noise.values()):
                assert not tensor.requires_grad
        assert torch.equal(x, kept)
        assert all(p.grad is None for p in policy.parameters())
        after = policy.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("complete", [True, False])
    def test_exactly_one_operation_is_applied_to_a_record(self, complete):
        policy, x, y = policy_of(2), signals(40), alternate(40)
        draw = policy.sample(x.shape, y, seeded(3), complete=complete)
        for part in draw.stages:
            assert torch.cat(part.rows).sort().values.tolist() == list(range(40))
            assert sum(len(rows) > 0 for rows in part.rows) == 8  # all are drawn
        augmented = policy.apply(x, y, draw)
        torch.testing.assert_close(
            augmented, by_hand(policy, x, y, draw), rtol=1e-13, atol=1e-13
        )

    def test_stages_follow_one_another(self):
        """Stage 2 works on the result of stage 1: a gain, then a delay."""
        policy = policy_of(2, ("magnitude_scale", "temporal_displacement"))
        with torch.no_grad():
            policy.logits.copy_(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]))
        x, y = signals(2, 1, 50), ONE_EACH
        draw = policy.sample(x.shape, y, seeded(0))
        gain, delay = (op.apply for op in policy.operations)
        for record, side in enumerate(("neg", "pos")):
            m = policy.magnitudes()[side]
            at = slice(record, record + 1)
            noise = [
                part.noise[op.name][at]
                for op, part in zip(policy.operations, draw.stages, strict=True)
            ]
            want = delay(
                gain(x[at], m[0, :1], noise[0], RATE), m[1, 1:], noise[1], RATE
            )
            torch.testing.assert_close(policy.apply(x, y, draw)[at], want)


class TestSelection:
    def test_probabilities_are_the_softmax_whatever_the_temperature(self):
        shares = torch.tensor([0.5, 0.2, 0.2, 0.1])
        names = ("time_mask", "no_op", "lead_dropout", "baseline_wander")
        for temperature in (0.3, 1.0, 3.0):
            policy = policy_of(1, names, temperature=temperature)
            with torch.no_grad():
                policy.logits.copy_(shares.log())
            torch.testing.assert_close(policy.probabilities()[0], shares.double())
            for complete in (True, False):
                draw = policy.sample(
                    torch.Size([4000, 1, 2]), None, seeded(0), complete=complete
                )
                seen = torch.tensor([len(rows) for rows in draw.stages[0].rows]) / 4000
                torch.testing.assert_close(seen, shares, atol=0.025, rtol=0)

    def test_records_are_drawn_independently(self):
        policy = policy_of(1, ("time_mask", "no_op"))
        torch.nn.init.zeros_(policy.logits)
        chosen = torch.stack(
            [
                torch.isin(
                    torch.arange(50),
                    policy.sample(torch.Size([50, 1, 2]), None, seeded(i))
                    .stages[0]
                    .rows[0],
                )
                for i in range(200)
            ]
        ).double()
        neighbours = torch.corrcoef(
            torch.stack([chosen[:, 1:].flatten(), chosen[:, :-1].flatten()])
        )[0, 1]
        assert abs(neighbours) < 0.04
        assert (chosen.mean(dim=0) - 0.5).abs().max() < 0.15

    @pytest.mark.parametrize("complete", [True, False])
    def test_batch_selects_one_operation_for_all(self, complete):
        policy = policy_of(1, selection="batch")
        torch.nn.init.zeros_(policy.logits)
        x, y = signals(), alternate()
        used = set()
        for seed in range(60):
            draw = policy.sample(x.shape, y, seeded(seed), complete=complete)
            sizes = [len(rows) for rows in draw.stages[0].rows]
            assert sorted(sizes) == [0] * 7 + [16]
            used.add(sizes.index(16))
        assert used == set(range(8))
        draw = policy.sample(x.shape, y, seeded(1), complete=complete)
        torch.testing.assert_close(
            policy.apply(x, y, draw), by_hand(policy, x, y, draw)
        )

    def test_batch_gives_every_record_its_own_noise(self):
        policy = always(policy_of(1, selection="batch"), "magnitude_scale")
        x = torch.ones(16, 1, 2, dtype=torch.float64)
        gains = policy(x, torch.zeros(16), seeded(0))[:, 0, 0]
        assert len(gains.unique()) == 16

    def test_incomplete_draws_hold_the_chosen_operations_only(self):
        policy = always(policy_of(1), "time_mask")
        draw = policy.sample(torch.Size([6, 3, 9]), None, seeded(0), complete=False)
        assert set(draw.stages[0].noise) == {"time_mask"}
        full = policy.sample(torch.Size([6, 3, 9]), None, seeded(0))
        assert set(full.stages[0].noise) == set(AUGMENTATIONS)
        assert {len(noise) for noise in full.stages[0].noise.values()} == {6}

    @pytest.mark.parametrize("name", [*AUGMENTATIONS])
    def test_complete_and_incomplete_apply_the_same(self, name):
        # The chosen operation is first, so both draws take the same random numbers.
        others = [other for other in AUGMENTATIONS if other != name]
        policy = always(policy_of(1, [name, *others]), name)
        x, y = signals(), alternate()
        both = [
            policy.apply(x, y, policy.sample(x.shape, y, seeded(4), complete=complete))
            for complete in (True, False)
        ]
        assert torch.equal(*both)

    def test_complete_and_incomplete_agree_in_distribution(self):
        """Mean and deviation of the result over many draws, K = 2."""
        policy = policy_of(2, ("magnitude_scale", "no_op", "gaussian_noise"))
        x = signals(1, 1, 2).expand(6000, -1, -1)
        y = torch.ones(6000)
        a, b = (
            policy.apply(x, y, policy.sample(x.shape, y, seeded(7), complete=complete))
            for complete in (True, False)
        )
        error = (a.std(dim=0) + b.std(dim=0)) / math.sqrt(6000)
        assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * error).all()
        torch.testing.assert_close(a.std(dim=0), b.std(dim=0), rtol=0.06, atol=0)

    def test_incomplete_draws_carry_the_gradient_to_magnitudes(self):
        policy, x, y = policy_of(1), signals(), alternate()
        draw = policy.sample(x.shape, y, seeded(0))
        lean = copy.copy(draw.stages[0])
        # The same draw with the chosen records' noise only.
        object.__setattr__(lean, "complete", False)
        object.__setattr__(
            lean,
            "noise",
            {
                op.name: lean.noise[op.name][rows]
                for op, rows in zip(policy.operations, lean.rows, strict=True)
            },
        )
        gradients = [
            torch.autograd.grad(
                policy.apply(x, y, type(draw)((stage,))).square().sum(),
                [policy.mag_neg, policy.mag_pos],
            )
            for stage in (draw.stages[0], lean)
        ]
        for whole, part in zip(*gradients, strict=True):
            torch.testing.assert_close(whole, part)


def slopes(policy, x, labels, draw, probe, h=1e-6):
    """Central differences of sum(probe * apply) in every parameter."""
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    result = {}
    for name, value in start.items():
        difference = torch.zeros_like(value)
        for i in range(value.numel()):
            step = torch.zeros_like(value)
            step.view(-1)[i] = h
            up, down = (
                (
                    functional_call(Applied(policy), moved, (x, labels, draw)) * probe
                ).sum()
                for moved in (
                    {f"policy.{n}": v for n, v in {**start, name: value + s}.items()}
                    for s in (step, -step)
                )
            )
            difference.view(-1)[i] = (up - down) / (2 * h)
        result[name] = difference
    return result


class Applied(torch.nn.Module):
    """``apply`` as a forward, which is what functional_call calls."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x, labels, draw):
        return self.policy.apply(x, labels, draw)


def gradients(policy, x, labels, draw, probe):
    leaves = dict(policy.named_parameters())
    values = torch.autograd.grad(
        (policy.apply(x, labels, draw) * probe).sum(), list(leaves.values())
    )
    return dict(zip(leaves, values, strict=True))


class TestGradient:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"temperature": 0.5},
            {"selection": "batch"},
            {"shared_magnitudes": True},
        ],
        ids=str,
    )
    def test_autograd_is_the_derivative_of_apply(self, settings):
        """K = 2 and all eight operations, all of them drawn in both stages."""
        policy = policy_of(2, **settings)
        x, y = signals(40, 2, 24), alternate(40)
        probe = torch.randn(x.shape, dtype=x.dtype, generator=seeded(8))
        draw = policy.sample(x.shape, y, seeded(0))
        if "selection" not in settings:
            assert all(len(rows) for part in draw.stages for rows in part.rows)
        want = slopes(policy, x, y, draw, probe)
        got = gradients(policy, x, y, draw, probe)
        assert want.keys() == got.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
        assert want["logits"].abs().min() > 1e-3
        for side, name in enumerate(("mag_neg", "mag_pos")):
            if name not in want:
                continue
            taught = torch.tensor(
                [
                    [
                        op.name != "no_op" and bool((y[rows] == side).any())
                        for op, rows in zip(policy.operations, part.rows, strict=True)
                    ]
                    for part in draw.stages
                ]
            )
            assert want[name][taught].abs().min() > 1e-4
            if not policy.shared_magnitudes:
                assert not want[name][~taught].any()

    def test_logits_weigh_what_every_operation_would_have_done(self):
        """The straight-through gradient by hand: softmax' times <probe, op_i(x)>."""
        policy, x, y = policy_of(1), signals(), alternate()
        probe = torch.randn(x.shape, dtype=x.dtype, generator=seeded(8))
        draw = policy.sample(x.shape, y, seeded(0))
        effects = []
        for column, op in enumerate(policy.operations):
            m = policy.magnitudes()
            each = torch.where(y > 0, m["pos"][0, column], m["neg"][0, column])
            value = op.apply(x, each, draw.stages[0].noise[op.name], RATE)
            effects.append((value * probe).sum())
        effects, p = torch.stack(effects), policy.probabilities()[0]
        want = p * (effects - (p * effects).sum())
        got = gradients(policy, x, y, draw, probe)["logits"][0]
        torch.testing.assert_close(got, want)

    def test_the_softmax_has_the_temperature(self):
        x, y = signals(), alternate()
        sharp = policy_of(1, temperature=0.5)
        plain = policy_of(1)
        with torch.no_grad():
            plain.logits.mul_(2)
        draw = plain.sample(x.shape, y, seeded(0))  # the same for both: soft is equal
        got = [gradients(p, x, y, draw, x)["logits"] for p in (sharp, plain)]
        torch.testing.assert_close(got[0], 2 * got[1])

    def test_an_operation_that_was_not_drawn_has_no_magnitude_gradient(self):
        policy, x, y = always(policy_of(1), "baseline_wander"), signals(), alternate()
        draw = policy.sample(x.shape, y, seeded(0))
        got = gradients(policy, x, y, draw, x)
        column = policy.op_names.index("baseline_wander")
        for name in ("mag_neg", "mag_pos"):
            assert got[name][0, column].abs() > 1e-3
            others = torch.arange(8) != column
            assert not got[name][0, others].any()

    def test_a_label_teaches_its_own_magnitude_only(self):
        policy, x = policy_of(2), signals()
        for label, own, other in (
            (0.0, "mag_neg", "mag_pos"),
            (1.0, "mag_pos", "mag_neg"),
        ):
            y = torch.full((16,), label)
            draw = policy.sample(x.shape, y, seeded(0))
            got = gradients(policy, x, y, draw, x)
            assert got[own].abs().max() > 1e-2
            assert not got[other].any()
            before = policy.apply(x, y, draw)
            with torch.no_grad():
                getattr(policy, other).add_(1)
            assert torch.equal(policy.apply(x, y, draw), before)

    def test_no_graph_leads_through_operations_that_were_not_drawn(self):
        """Their values are needed, their derivative in the signal is not."""
        policy, y = always(policy_of(1), "no_op"), alternate()
        x = signals().requires_grad_()
        draw = policy.sample(x.shape, y, seeded(0))
        policy.apply(x, y, draw).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))


class TestMagnitudes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_no_raw_value_leaves_the_interval(self, dtype):
        policy = TaskAugPolicy(2).to(dtype)
        low, high = (  # a policy keeps its intervals in float32
            torch.tensor([getattr(op, end) for op in policy.operations]).to(dtype)
            for end in ("low", "high")
        )
        for raw in (-1e3, -30.0, -1.0, 0.0, 1.0, 30.0, 1e3):
            torch.nn.init.constant_(policy.mag_neg, raw)
            torch.nn.init.constant_(policy.mag_pos, -raw)
            for value in policy.magnitudes().values():
                assert value.dtype == dtype
                assert (low <= value).all()
                assert (value <= high).all()
                assert not value.requires_grad
        torch.testing.assert_close(policy.magnitudes()["pos"][0], low)
        torch.testing.assert_close(policy.magnitudes()["neg"][0], high)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
    def test_start_is_a_share_of_the_interval(self, share):
        policy = TaskAugPolicy(1, initial_magnitude=share)
        for value in policy.magnitudes().values():
            for op, m in zip(policy.operations, value[0].tolist(), strict=True):
                assert m == pytest.approx(op.low + share * (op.high - op.low), rel=1e-5)

    @pytest.mark.parametrize("raw", [-20.0, 20.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_gradient_is_finite_at_both_ends(self, dtype, raw):
        policy, x, y = policy_of(2).to(dtype), signals(40, dtype=dtype), alternate(40)
        torch.nn.init.constant_(policy.mag_neg, raw)
        torch.nn.init.constant_(policy.mag_pos, raw)
        draw = policy.sample(x.shape, y, seeded(0))
        got = gradients(policy, x, y, draw, x)
        assert all(value.isfinite().all() for value in got.values())
        if dtype == torch.float64:  # small, but not cut off as by a clamp
            column = policy.op_names.index("baseline_wander")
            assert got["mag_neg"][0, column] != 0

    def test_shared_magnitudes_are_one_parameter(self, tmp_path):
        policy = policy_of(2, shared_magnitudes=True)
        assert policy.mag_pos is policy.mag_neg
        assert [n for n, _ in policy.named_parameters()] == ["logits", "mag_neg"]
        assert torch.equal(*policy.magnitudes().values())
        x = signals()
        draw = policy.sample(x.shape, None, seeded(0))
        assert torch.equal(  # the class does not matter, nor does its absence
            policy.apply(x, None, draw), policy.apply(x, alternate(), draw)
        )
        twin = TaskAugPolicy(2, shared_magnitudes=True, sampling_rate=RATE).double()
        twin.load_state_dict(policy.state_dict())
        assert torch.equal(twin.apply(x, None, draw), policy.apply(x, None, draw))
        assert twin.mag_pos is twin.mag_neg
        policy.float().save(tmp_path / "shared.json")
        for other in (
            TaskAugPolicy.load(tmp_path / "shared.json"),
            copy.deepcopy(policy),
        ):
            assert other.mag_pos is other.mag_neg
            assert torch.equal(other.mag_neg, policy.mag_neg)

    def test_a_step_moves_shared_magnitudes_once(self):
        policy = policy_of(1, shared_magnitudes=True)
        before = policy.mag_neg.detach().clone()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        policy.mag_pos.grad = torch.ones_like(before)
        optimizer.step()
        torch.testing.assert_close(policy.mag_neg.detach(), before - 0.1)

    @pytest.mark.parametrize("column", [False, True])
    def test_soft_labels_mix_the_magnitudes(self, column):
        policy = always(policy_of(1), "magnitude_scale")
        x = torch.ones(3, 1, 2, dtype=torch.float64)
        labels = torch.tensor([0.0, 0.25, 1.0])
        draw = policy.sample(x.shape, labels, seeded(0))
        share = draw.stages[0].noise["magnitude_scale"]
        shown = policy.apply(x, labels[:, None] if column else labels, draw)[:, 0, 0]
        at = policy.op_names.index("magnitude_scale")
        negative, positive = (policy.magnitudes()[s][0, at] for s in ("neg", "pos"))
        assert negative != positive
        want = negative + labels.double() * (positive - negative)
        torch.testing.assert_close((shown - 1) / share, want)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
    def test_labels_of_any_dtype(self, dtype):
        policy, x, y = policy_of(1), signals(), alternate()
        draw = policy.sample(x.shape, y, seeded(0))
        assert torch.equal(policy.apply(x, y.to(dtype), draw), policy.apply(x, y, draw))


class TestShapesAndDtypes:
    def test_no_stages_change_nothing(self):
        policy, x, y = TaskAugPolicy(0), signals(), alternate()
        assert torch.equal(policy(x, y), x)
        assert torch.equal(policy(x), x)
        assert policy.sample(x.shape).stages == ()
        assert policy.probabilities().shape == (0, 8)
        assert len(policy.to_frame()) == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_signals_and_a_float32_policy(self, dtype):
        policy = TaskAugPolicy(2, sampling_rate=RATE).randomize_(seeded(0))
        x, y = signals(40), alternate(40)
        draw = policy.sample(x.shape, y, seeded(0))
        half = policy.apply(x.to(dtype), y, draw)
        assert half.dtype == dtype
        assert half.isfinite().all()
        wide = policy.apply(x.float(), y, draw)
        # Two stages of rounding, of values of a few units.
        torch.testing.assert_close(
            half.float(), wide, atol=20 * torch.finfo(dtype).eps, rtol=0.02
        )
        probe = torch.randn(x.shape, generator=seeded(8))
        got = gradients(policy, x.to(dtype), y, draw, probe.to(dtype))
        want = gradients(policy, x.float(), y, draw, probe)
        for name, value in got.items():
            assert value.dtype == torch.float32
            error = (value - want[name]).norm() / want[name].norm()
            assert error < 30 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_half_policy(self, dtype):
        policy = TaskAugPolicy(2, sampling_rate=RATE).randomize_(seeded(0)).to(dtype)
        x, y = signals(dtype=dtype), alternate()
        augmented = policy(x, y, seeded(0))
        assert augmented.dtype == dtype
        assert augmented.isfinite().all()

    @pytest.mark.parametrize("leads, length", [(8, 100), (8, 5000), (1, 1), (12, 37)])
    def test_any_leads_and_length(self, leads, length):
        policy = TaskAugPolicy(
            2, sampling_rate=500, operations=("lead_dropout", "time_mask", "no_op")
        )
        assert policy.logits.shape == (2, 3)
        x = signals(4, leads, length, torch.float32)
        augmented = policy(x, torch.tensor([0.0, 1.0, 1.0, 0.0]), seeded(0))
        assert augmented.shape == x.shape
        assert augmented.isfinite().all()

    @pytest.mark.parametrize("length", [100, 5000])
    def test_all_operations_at_any_length(self, length):
        policy = TaskAugPolicy(2, sampling_rate=500)
        x = signals(12, 8, length, torch.float32)
        augmented = policy(x, alternate(12), seeded(0))
        assert augmented.shape == x.shape
        assert augmented.isfinite().all()

    def test_sampling_rate_is_that_of_the_signals(self):
        """A delay of 0.25 s is 25 samples at 100 Hz and 125 at 500 Hz."""
        for rate, samples in ((100, 25), (500, 125)):
            policy = always(
                TaskAugPolicy(1, sampling_rate=rate), "temporal_displacement"
            )
            x = torch.zeros(1, 1, 600)
            x[..., 300] = 1
            draw = policy.sample(x.shape, None, seeded(0))
            draw.stages[0].noise["temporal_displacement"].fill_(1.0)
            assert policy.apply(x, torch.zeros(1), draw).argmax() == 300 + samples

    def test_dropout_by_electrode(self):
        policy = always(policy_of(1, dropout_by="electrode"), "lead_dropout")
        x = torch.ones(60, 12, 2, dtype=torch.float64)
        gates = policy(x, torch.ones(60), seeded(0))[..., 0]
        assert gates.min() < 0.5
        assert torch.equal(gates[:, 3], gates[:, 4])  # aVR and aVL share electrodes
        with pytest.raises(ValueError, match="12 standard leads"):
            policy(x[:, :8], torch.ones(60), seeded(0))
        free = always(policy_of(1), "lead_dropout")(x, torch.ones(60), seeded(0))[
            ..., 0
        ]
        assert not torch.equal(free[:, 3], free[:, 4])


class TestFiles:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {
                "num_stages": 3,
                "temperature": 0.5,
                "shared_magnitudes": True,
                "selection": "batch",
                "sampling_rate": 100,
                "operations": ("time_mask", "no_op"),
                "initial_magnitude": 0.2,
                "dropout_by": "electrode",
            },
        ],
        ids=["defaults", "all changed"],
    )
    def test_round_trip(self, settings, tmp_path):
        policy = TaskAugPolicy(**settings).randomize_(seeded(0))
        policy.save(tmp_path / "policy.json")
        again = TaskAugPolicy.load(str(tmp_path / "policy.json"))
        assert repr(again) == repr(policy)
        for name in (
            "num_stages",
            "temperature",
            "shared_magnitudes",
            "selection",
            "sampling_rate",
            "op_names",
            "initial_magnitude",
            "dropout_by",
        ):
            assert getattr(again, name) == getattr(policy, name)
            if name in settings:
                key = "operations" if name == "op_names" else name
                assert getattr(again, name) == settings[key]
        x, y = signals(dtype=torch.float32), alternate()
        assert torch.equal(again(x, y, seeded(1)), policy(x, y, seeded(1)))
        assert again.to_frame().equals(policy.to_frame())

    def test_a_policy_can_be_copied_and_pickled(self):
        policy = policy_of(2)
        x, y = signals(), alternate()
        for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert torch.equal(twin(x, y, seeded(0)), policy(x, y, seeded(0)))


class TestErrors:
    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"num_stages": -1}, "num_stages must be 0 or more, got -1"),
            ({"temperature": 0}, "temperature must be positive, got 0"),
            ({"temperature": math.nan}, "temperature must be positive, got nan"),
            ({"selection": "record"}, "'sample' or 'batch', got 'record'"),
            ({"sampling_rate": 0}, "sampling_rate must be positive, got 0"),
            ({"initial_magnitude": 0}, "between 0 and 1, got 0"),
            ({"initial_magnitude": 1.0}, "between 0 and 1, got 1.0"),
            ({"dropout_by": "arm"}, "'lead' or 'electrode', got 'arm'"),
            ({"operations": ()}, r"one or more different names .* got \[\]"),
            ({"operations": ("no_op", "no_op")}, "different names"),
            ({"operations": ("flip",)}, r"time_mask.*got \['flip'\]"),
        ],
        ids=str,
    )
    def test_arguments(self, settings, words):
        with pytest.raises(ValueError, match=words):
            TaskAugPolicy(**settings)

    def test_labels_are_needed_by_class_specific_magnitudes(self):
        policy, x = policy_of(1), signals()
        with pytest.raises(ValueError, match=r"needs labels.*shared_magnitudes=True"):
            policy(x)

    @pytest.mark.parametrize("shape", [(15,), (16, 2), (1,)])
    def test_one_label_a_record(self, shape):
        policy, x = policy_of(1), signals()
        labels = torch.zeros(shape)
        words = r"16 records need 16 labels, got shape \(" + str(shape[0])
        with pytest.raises(ValueError, match=words):
            policy.sample(x.shape, labels)
        draw = policy.sample(x.shape)
        with pytest.raises(ValueError, match=words):
            policy.apply(x, labels, draw)


class TestDescription:
    def test_table(self):
        policy = policy_of(2, ("time_mask", "no_op", "lead_dropout"))
        frame = policy.to_frame()
        assert list(frame.columns) == [
            "stage",
            "operation",
            "probability",
            "magnitude_neg",
            "magnitude_pos",
            "unit",
        ]
        assert frame["stage"].tolist() == [0, 0, 0, 1, 1, 1]
        assert frame["operation"].tolist() == 2 * list(policy.op_names)
        assert frame["unit"].tolist() == 2 * ["s", "", "probability"]
        shown = torch.tensor(frame["probability"].tolist(), dtype=torch.float64)
        torch.testing.assert_close(shown.reshape(2, 3), policy.probabilities())
        assert shown.reshape(2, 3).sum(dim=1).tolist() == pytest.approx([1, 1])
        for side in ("neg", "pos"):
            column = torch.tensor(frame[f"magnitude_{side}"].tolist()).double()
            want = policy.magnitudes()[side]
            torch.testing.assert_close(column.reshape(2, 3), want)

    def test_names_follow_the_registry_or_the_caller(self):
        assert TaskAugPolicy().op_names == tuple(AUGMENTATIONS)
        names = ("no_op", "gaussian_noise")
        policy = TaskAugPolicy(operations=names)
        assert policy.op_names == names
        assert policy.operations == tuple(AUGMENTATIONS[n] for n in names)
        assert "operations=['no_op', 'gaussian_noise']" in repr(policy)

    def test_randomize(self):
        policy = TaskAugPolicy(4)
        assert policy.randomize_(seeded(0)) is policy
        twin = TaskAugPolicy(4).randomize_(seeded(0))
        assert torch.equal(policy.logits, twin.logits)
        assert torch.equal(policy.mag_pos, twin.mag_pos)
        other = TaskAugPolicy(4).randomize_(seeded(1))
        assert not torch.equal(policy.logits, other.logits)
        assert not torch.equal(policy.mag_neg, policy.mag_pos)
        assert policy.logits.std().item() == pytest.approx(1, abs=0.4)
        share = torch.cat([policy.mag_neg, policy.mag_pos]).sigmoid()
        assert share.min() < 0.15 < 0.85 < share.max()
        assert all(p.requires_grad for p in policy.parameters())
        shared = TaskAugPolicy(4, shared_magnitudes=True).randomize_(seeded(0))
        assert shared.mag_neg is shared.mag_pos
