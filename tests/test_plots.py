"""Pictures: what is drawn is read back from the figure and from the file's pixels."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from pyhealth.bilevel import ecg_paper, plots
from pyhealth.bilevel.ecg_paper import PRINTED_LEADS, plot_ecg
from pyhealth.bilevel.plots import plot_learning_curves, plot_policy, plot_roc_pr
from pyhealth.processors.ecg_record_processor import STANDARD_LEADS

NAN = float("nan")
OPS = ("gaussian_noise", "time_mask", "temporal_displacement", "no_op")
RANGES = {
    "gaussian_noise": (0.0, 0.5, "standard deviations"),
    "time_mask": (0.0, 2.0, "s"),
    "temporal_displacement": (-1.0, 1.0, "s"),
    "no_op": (0.0, 0.0, ""),
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures written during a test, in order."""
    figures, write = [], plots.write_png

    def keep(figure, path):
        figures.append(figure)
        return write(figure, path)

    for module in (plots, ecg_paper):
        monkeypatch.setattr(module, "write_png", keep)
    return figures


def learning_rows():
    scores = [0.6, NAN, 0.81, 0.9, 0.9, 0.85]
    rows = [{"epoch": e, "roc_auc": s, "pr_auc": 0.5} for e, s in enumerate(scores)]
    for row in rows[3:]:
        row |= {"hypergradient_norm": 0.1, "hypergradient_snr": 0.5 + row["epoch"]}
    rows[0] |= {"train_loss": 1.0, "loss": None, "hypergradient_norm": NAN}
    rows[5] |= {"train_loss": 0.4, "loss": 0.7}
    return rows


def policy_rows(probabilities, magnitudes=(0.12, 0.3), stages=2):
    """One epoch a row of ``probabilities``, the same in every stage."""
    rows = []
    for epoch, values in enumerate(probabilities):
        row = {"epoch": epoch}
        for stage in range(stages):
            for op, value in zip(OPS, values, strict=True):
                row[f"probability/{stage}/{op}"] = value
                row[f"magnitude_neg/{stage}/{op}"] = magnitudes[0]
                row[f"magnitude_pos/{stage}/{op}"] = magnitudes[1]
        rows.append(row)
    return rows


def labels_and_scores(n=300, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.3).astype(int)
    return y, rng.random(n) + 0.5 * y


def ecg(seconds=10.0, rate=100, leads=12, high=1.0, seed=0):
    rng = np.random.default_rng(seed)
    signal = 0.1 * rng.standard_normal((leads, round(seconds * rate)))
    signal[:, 40::80] += high * rng.uniform(-1, 2, (leads, 1))  # beats
    return signal


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def traces(ax, leads_on_page):
    """The lines of the first signal, in the order of the page."""
    return [line.get_xydata() for line in ax.lines[:leads_on_page]]


CALLS = {
    "curves": lambda path: plot_learning_curves(learning_rows(), path),
    "policy": lambda path: plot_policy(policy_rows([[0.25] * 4]), OPS, RANGES, path),
    "roc": lambda path: plot_roc_pr({"MI": labels_and_scores()}, path),
    "ecg": lambda path: plot_ecg([ecg(), ecg(seed=1)], path, sampling_rate=100),
}


@pytest.mark.parametrize("name", CALLS)
def test_writes_a_png_and_returns_its_path(name, tmp_path):
    target = tmp_path / "new folder" / f"{name}.png"
    assert CALLS[name](str(target)) == target
    with Image.open(target) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((152.4, 152.4), abs=0.1)
        assert 800 <= image.width <= 2200
        assert 300 <= image.height <= 2200
        pixels = np.asarray(image.convert("RGB"))
    # A white frame: nothing is cut off at the border of the page.
    border = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((side == 255).all() for side in border)
    assert 0.002 < (pixels < 128).any(axis=-1).mean() < 0.5  # something is drawn


def test_a_path_that_is_no_png_is_refused_and_not_written(tmp_path):
    for call in CALLS.values():
        with pytest.raises(ValueError, match=r"end it in '\.png'"):
            call(tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pictures_from_threads_equal_those_drawn_one_by_one(tmp_path):
    names = ("ecg", "policy")
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(CALLS[n], tmp_path / f"{i}{n}.png") for i in "ab" for n in names
        ]
    for name, job in zip(names * 2, jobs, strict=True):
        alone = CALLS[name](tmp_path / f"{name}.png")
        assert job.result().read_bytes() == alone.read_bytes()


@pytest.mark.slow
def test_no_pyplot_is_imported(tmp_path):
    # Its folder as a package of its own: PyHealth itself imports pyplot.
    code = f"""
import importlib, sys, types
package = sys.modules["bilevel"] = types.ModuleType("bilevel")
package.__path__ = [{str(Path(plots.__file__).parent)!r}]
module = importlib.import_module("bilevel.plots")
module.plot_roc_pr({{"a": ([0, 1], [0.2, 0.8])}}, {str(tmp_path / "a.png")!r})
module = importlib.import_module("bilevel.ecg_paper")
module.plot_ecg([[[0.0] * 100]], {str(tmp_path / "b.png")!r}, sampling_rate=100,
                lead_names=["II"])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


class TestLearningCurves:
    def test_marks_the_first_of_the_best_epochs(self, drawn, tmp_path):
        plot_learning_curves(learning_rows(), tmp_path / "a.png")
        ax = next(a for a in drawn[0].axes if "score" in a.get_title("left"))
        (star,) = (line for line in ax.lines if line.get_marker() == "*")
        np.testing.assert_array_equal(star.get_xydata(), [[3, 0.9]])
        assert "best AUROC: 0.900 in epoch 3" in legend(ax)

    def test_draws_finite_values_only(self, drawn, tmp_path):
        plot_learning_curves(learning_rows(), tmp_path / "a.png")
        loss, score, norm, snr = drawn[0].axes
        lines = {line.get_label(): line for ax in drawn[0].axes for line in ax.lines}
        for label, x, y in (
            ("training", [0, 5], [1.0, 0.4]),
            ("validation", [5], [0.7]),
            ("AUROC", [0, 2, 3, 4, 5], [0.6, 0.81, 0.9, 0.9, 0.85]),
            ("norm", [3, 4, 5], [0.1] * 3),
            ("signal-to-noise", [3, 4, 5], [3.5, 4.5, 5.5]),
        ):
            np.testing.assert_allclose(lines[label].get_xydata(), np.array([x, y]).T)
        for ax in (norm, snr):  # epochs 0 to 2 are shaded as warm-up
            (band,) = ax.patches
            assert (band.get_x(), band.get_width()) == (-0.5, 3.0)
        assert not loss.patches and not score.patches

    def test_absent_keys_leave_out_their_panel(self, drawn, tmp_path):
        plot_learning_curves([{"epoch": 7, "loss": 0.3}], tmp_path / "a.png")
        (ax,) = drawn[0].axes
        assert ax.get_title("left") == "Loss" and legend(ax) == ["validation"]
        assert [tick for tick in ax.get_xticks() if 6.5 <= tick <= 7.5] == [7]

    def test_frames_and_tensors_draw_the_same(self, tmp_path):
        rows = learning_rows()
        tensors = [
            {k: v and torch.tensor(v, dtype=torch.float64) for k, v in row.items()}
            for row in rows
        ]
        one, *others = [
            plot_learning_curves(history, tmp_path / f"{i}.png").read_bytes()
            for i, history in enumerate((rows, pd.DataFrame(rows), tensors))
        ]
        assert others == [one, one]

    @pytest.mark.parametrize(
        ("history", "message"),
        [
            ([], "empty"),
            ([{"loss": 1.0}], "'epoch'"),
            ([{"epoch": 1, "loss": 1.0}, {"epoch": 1, "loss": 1.0}], "increases"),
            ([{"epoch": 0, "loss": NAN}], "no finite value under any of"),
        ],
    )
    def test_errors_write_nothing(self, history, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            plot_learning_curves(history, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())


class TestPolicy:
    def draw(self, drawn, tmp_path, rows):
        plot_policy(rows, OPS, RANGES, tmp_path / "a.png")
        *panels, bar = drawn[-1].axes
        return panels[::2], panels[1::2], bar

    @pytest.mark.parametrize(
        ("last", "reach"), [([0.26, 0.24, 0.25, 0.25], 0.125), ([0.7, 0.1] * 2, 0.45)]
    )
    def test_colours_are_symmetric_about_uniform(self, drawn, tmp_path, last, reach):
        rows = policy_rows([[0.25] * 4, last])
        heat, _, bar = self.draw(drawn, tmp_path, rows)
        assert len(heat) == 2
        for ax in heat:
            (mesh,) = ax.collections
            assert mesh.norm.vmin == pytest.approx(0.25 - reach)
            assert mesh.norm.vmax == pytest.approx(0.25 + reach)
            np.testing.assert_array_equal(
                mesh.get_array(), np.array([[0.25] * 4, last]).T
            )
            white = mesh.cmap(mesh.norm(0.25))
            assert min(white[:3]) > 0.95
            assert texts(ax)[1:] == [f"{value:.3f}" for value in last]
        low, high = bar.get_ylim()  # the bar shows no probability that cannot be
        assert (low, high) == pytest.approx((max(0, 0.25 - reach), 0.25 + reach))
        assert f"uniform, 0.250; full colour: ± {reach:.3f}" in bar.get_ylabel()

    def test_magnitudes_stand_in_their_own_range(self, drawn, tmp_path):
        _, (ax, _), _ = self.draw(drawn, tmp_path, policy_rows([[0.25] * 4]))
        points = {}
        for line in ax.lines:
            (x,), (y,) = line.get_data()
            points.setdefault(line.get_marker(), {})[round(y)] = x
        assert set(points) == {"o", "D"}  # two shapes, not only two colours
        assert points["o"] == pytest.approx({0: 0.24, 1: 0.06, 2: 0.56})
        assert points["D"] == pytest.approx({0: 0.6, 1: 0.15, 2: 0.65})
        shown = texts(ax)
        assert "0.12 / 0.3 s" in shown
        assert "0.12 / 0.3 standard deviations" in shown
        assert shown.count("\N{EN DASH}") == 1  # no_op

    def test_heat_map_keeps_gaps_between_epochs(self, drawn, tmp_path):
        rows = policy_rows([[0.25] * 4] * 3)
        for row, epoch in zip(rows, (0, 5, 6), strict=True):
            row["epoch"] = epoch
        rows[1]["probability/0/no_op"] = NAN
        heat, _, _ = self.draw(drawn, tmp_path, rows)
        (mesh,) = heat[0].collections
        edges = mesh.get_coordinates()[0, :, 0]
        np.testing.assert_allclose(edges, [-0.5, 2.5, 5.5, 6.5])
        assert np.ma.getmaskarray(mesh.get_array()).sum() == 1

    @pytest.mark.parametrize(
        ("rows", "ops", "message"),
        [
            ([{"epoch": 0, "loss": 1.0}], OPS, "No 'probability"),
            (policy_rows([[0.25] * 4]), (), "No 'probability"),
            (policy_rows([[0.25] * 4]), (*OPS, "x"), r"magnitude_ranges lacks \['x'\]"),
            (policy_rows([[NAN, 0.5, 0.5, 0]]), OPS, "probability/0/gaussian_noise"),
        ],
    )
    def test_errors_write_nothing(self, rows, ops, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            plot_policy(rows, ops, RANGES, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())


class TestRocPr:
    def test_legends_and_areas_agree_with_scikit_learn(self, drawn, tmp_path):
        curves = {"MI": labels_and_scores(), "CD": labels_and_scores(90, seed=3)}
        plot_roc_pr(curves, tmp_path / "a.png")
        roc, pr = drawn[0].axes
        for i, (name, (y, score)) in enumerate(curves.items()):
            auroc, ap = roc_auc_score(y, score), average_precision_score(y, score)
            assert legend(roc)[i] == f"{name}: AUROC {auroc:.3f} (n = {len(y)})"
            assert legend(pr)[i] == f"{name}: AUPRC {ap:.3f} (n = {len(y)})"
            assert np.trapezoid(*roc.lines[i].get_data()[::-1]) == pytest.approx(auroc)
            recall, precision = pr.lines[i].get_data()
            assert (recall[0], recall[-1]) == (1, 0)
            # The area under the drawn steps is the average precision.
            assert -(np.diff(recall) @ precision[:-1]) == pytest.approx(ap)
            assert pr.lines[i].get_drawstyle() == "steps-post"
        assert roc.lines[0].get_linestyle() != roc.lines[1].get_linestyle()

    def test_chance_lines(self, drawn, tmp_path):
        y, score = labels_and_scores()
        plot_roc_pr({"a": (y, score), "b": (y, -score)}, tmp_path / "a.png")
        roc, pr = drawn[0].axes
        np.testing.assert_array_equal(roc.lines[2].get_xydata(), [[0, 0], [1, 1]])
        assert legend(roc)[2] == "chance: AUROC 0.500"
        assert list(pr.lines[2].get_ydata()) == [y.mean()] * 2
        assert len(legend(pr)) == 3  # one line for one share of positives
        assert f"{y.mean():.3f}" in legend(pr)[2]

    def test_tensors_draw_the_same(self, tmp_path):
        y, score = labels_and_scores()
        one = plot_roc_pr({"a": (y, score)}, tmp_path / "a.png")
        tensors = torch.from_numpy(y), torch.from_numpy(score)
        other = plot_roc_pr({"a": tensors}, tmp_path / "b.png")
        assert one.read_bytes() == other.read_bytes()

    @pytest.mark.parametrize(
        ("curves", "message"),
        [
            ({}, "curves is empty"),
            ({"MI": ([0, 0], [0.1, 0.2])}, r"MI: .* one class only \(0 positives in 2"),
            ({"MI": ([1, 1], [0.1, 0.2])}, r"MI: .* one class only \(2 positives in 2"),
            ({"MI": ([0, 1], [0.1])}, r"MI: .*\(2,\) and \(1,\)"),
            ({"MI": ([[0], [1]], [[0.1], [0.2]])}, r"must be \(n,\)"),
            ({"MI": ([0, 2], [0.1, 0.2])}, "0 or 1"),
            ({"MI": ([0, 1], [0.1, NAN])}, "finite"),
        ],
    )
    def test_errors_write_nothing(self, curves, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            plot_roc_pr(curves, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())


class TestEcg:
    def test_paper_is_true_to_scale(self, drawn, tmp_path):
        """25 mm a second and 10 mm a millivolt, in pixels of the written file."""
        step = np.zeros((12, 1000))
        step[:, ::2] = 1.0  # between 0 and 1 mV
        path = plot_ecg([step], tmp_path / "a.png", sampling_rate=100)
        (ax,) = drawn[0].axes
        mm = drawn[0].dpi / 25.4
        rhythm = ax.transData.transform(traces(ax, 13)[12])
        width, height = np.ptp(rhythm, axis=0)
        assert width == pytest.approx(25 * mm * 9.99)  # first to last of 1000 samples
        assert height == pytest.approx(10 * mm * 1.0)
        (pulse, *_) = (line for line in ax.lines if line.get_label() == "_pulse")
        top = pulse.get_xydata()[pulse.get_ydata() == pulse.get_ydata().max()]
        assert np.ptp(pulse.get_ydata()) == 10 and np.ptp(top[:, 0]) == 5  # 1 mV, 0.2 s
        with Image.open(path) as image:
            assert image.size == pytest.approx(drawn[0].bbox.size, abs=0.5)

    def test_grid_of_the_file_has_squares_of_five_millimetres(self, tmp_path):
        """Read from the pixels: thick lines every 5 mm along both axes."""
        flat = np.full((12, 1000), NAN)
        path = plot_ecg([flat], tmp_path / "a.png", sampling_rate=100)
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
            mm = image.info["dpi"][0] / 25.4
        assert mm == pytest.approx(6, abs=0.01)
        green = pixels[..., 1]  # the darker the line, the less green
        for axis in (0, 1):
            profile = np.median(green, axis=axis)
            middle = profile[100:-60]  # off the white frame and the pulses
            thick = np.flatnonzero(middle < middle.min() + 15)
            starts = thick[np.diff(thick, prepend=-9) > 1]
            assert len(starts) > 5
            assert set(np.diff(starts)) == {round(5 * mm)}

    def test_the_printed_leads_are_the_standard_ones(self):
        assert tuple(name.upper() for name in PRINTED_LEADS) == STANDARD_LEADS

    def test_clinical_page(self, drawn, tmp_path):
        """Three rows of four quarters, then lead II, whatever the order of leads."""
        signal = ecg()
        plot_ecg([signal], tmp_path / "a.png", sampling_rate=100)
        (ax,) = drawn[0].axes
        lines = traces(ax, 13)
        names = [text for text in texts(ax) if text in PRINTED_LEADS]
        assert names == [*PRINTED_LEADS, "II"]
        levels = []
        for i, line in enumerate(lines):
            start = 250 * (i // 3) if i < 12 else 0
            stop = start + 250 if i < 12 else 1000
            np.testing.assert_allclose(line[:, 0], 10 + 0.25 * np.arange(start, stop))
            offset = line[:, 1] - 10 * signal[i if i < 12 else 1, start:stop]
            levels.append(offset[0])
            np.testing.assert_allclose(offset, offset[0])
        rows = np.reshape(levels[:12], (4, 3))
        np.testing.assert_allclose(rows, rows[:1].repeat(4, axis=0))
        assert rows[0, 0] > rows[0, 1] > rows[0, 2] > levels[12]
        assert all(level % 5 == pytest.approx(0) for level in rows[0])

        order = np.random.default_rng(1).permutation(12)
        upper = [PRINTED_LEADS[i].upper() for i in order]
        other = plot_ecg(
            [torch.from_numpy(signal[order])], tmp_path / "b.png",
            sampling_rate=100, lead_names=upper,
        )  # fmt: skip
        assert other.read_bytes() == (tmp_path / "a.png").read_bytes()

    @pytest.mark.parametrize("high", [0.1, 1.0, 4.0])
    @pytest.mark.parametrize("leads", [PRINTED_LEADS, ("I", "II", "chest")])
    def test_nothing_is_clipped_and_rows_do_not_meet(
        self, drawn, tmp_path, high, leads
    ):
        signals = [ecg(leads=len(leads), high=high, seed=s) for s in (0, 1)]
        signals[1][0, 5] = NAN
        plot_ecg(signals, tmp_path / "a.png", sampling_rate=100, lead_names=leads)
        (ax,) = drawn[0].axes
        segments = ecg_paper._segments(leads, 1000)
        spans = {}
        for line, segment in zip(ax.lines, segments, strict=False):
            spans.setdefault(segment[0], []).append(line.get_ydata())
        second = ax.lines[len(segments) + 1 :]  # after one legend entry
        for line, segment in zip(second, segments, strict=False):
            spans[segment[0]].append(line.get_ydata())
        low = [np.nanmin(np.hstack(spans[row])) for row in sorted(spans)]
        top = [np.nanmax(np.hstack(spans[row])) for row in sorted(spans)]
        assert top[0] < ax.get_ylim()[1] and low[-1] > ax.get_ylim()[0]
        assert all(a > b + 1 for a, b in zip(low, top[1:], strict=False))
        renderer = FigureCanvasAgg(drawn[0]).get_renderer()
        for text in ax.texts:
            box, page = text.get_window_extent(renderer), drawn[0].bbox
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert page.y0 <= box.y0 and box.y1 <= page.y1

    def test_other_leads_become_strips(self, drawn, tmp_path):
        signal = ecg(seconds=4, leads=2)
        plot_ecg(
            [signal], tmp_path / "a.png", sampling_rate=100, lead_names=("MLII", "V5")
        )
        (ax,) = drawn[0].axes
        assert texts(ax)[:2] == ["MLII", "V5"]
        assert [len(line) for line in traces(ax, 2)] == [400, 400]

    def test_caption_tells_scale_and_unit(self, drawn, tmp_path):
        plot_ecg([ecg()], tmp_path / "a.png", sampling_rate=100, suptitle="Record 1")
        plot_ecg(
            [ecg(rate=250)], tmp_path / "b.png",
            sampling_rate=250, unit="standard deviation",
        )  # fmt: skip
        shown = [texts(figure.axes[0]) for figure in drawn]
        assert "25 mm/s, 10 mm/mV, 100 Hz" in shown[0] and "Record 1" in shown[0]
        assert "25 mm/s, 10 mm per standard deviation, 250 Hz" in shown[1]
        assert drawn[0].axes[0].get_legend() is None

    def test_versions_have_their_own_legend_entry_and_look(self, drawn, tmp_path):
        plot_ecg([ecg(), ecg(seed=1)], tmp_path / "a.png", sampling_rate=100)
        plot_ecg(
            [ecg(seed=s) for s in range(3)], tmp_path / "b.png",
            sampling_rate=100, titles=["raw", "noise", "mask"],
        )  # fmt: skip
        assert legend(drawn[0].axes[0]) == ["before", "after"]
        assert legend(drawn[1].axes[0]) == ["raw", "noise", "mask"]
        handles = drawn[1].axes[0].get_legend().get_lines()
        looks = {(h.get_linewidth(), h.get_linestyle()) for h in handles}
        assert len(looks) == 3  # told apart without colour
        assert handles[0].get_color() == "black"

    @pytest.mark.parametrize(
        ("signals", "options", "message"),
        [
            ([], {}, "one to three"),
            ([ecg()] * 4, {}, "one to three"),
            ([ecg(), ecg()[:, :-1]], {}, "of one shape"),
            ([ecg()[0]], {}, r"\(leads, samples\)"),
            ([ecg(leads=3)], {}, "3 leads but there are 12 lead_names"),
            ([ecg()], {"titles": ["a", "b"]}, "as many titles"),
            ([ecg()], {"sampling_rate": 0}, "check sampling_rate"),
            ([ecg()], {"sampling_rate": 10}, "check sampling_rate"),
            ([ecg()[:, :3]], {}, "4 samples to 30 s"),
            ([1000 * ecg()], {}, "another unit"),
        ],
    )
    def test_errors_write_nothing(self, signals, options, message, tmp_path):
        options = {"sampling_rate": 100, **options}
        with pytest.raises(ValueError, match=message):
            plot_ecg(signals, tmp_path / "a.png", **options)
        assert not list(tmp_path.iterdir())
