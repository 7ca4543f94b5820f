"""Pictures of ECGs on paper, true to scale; for how they are drawn see ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from .plot_style import DPI, PathLike, write_png

__all__ = ["PRINTED_LEADS", "plot_ecg"]

_LIMB_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF")
#: The standard leads as they are printed, in the order of the page.
PRINTED_LEADS = (*_LIMB_LEADS, "V1", "V2", "V3", "V4", "V5", "V6")

_Segment = tuple[int, int, str, int, int]
_MM_PER_SECOND, _MM_PER_UNIT = 25.0, 10.0  # ECG paper: 25 mm/s and 10 mm/mV
_MAX_SECONDS, _MAX_HEIGHT = 30.0, 2000.0  # s, mm: beyond that it is no page
_MARGIN = 10.0  # mm, for the pulse
_CAPTION_WIDTH = 150.0  # mm


class _Ink(TypedDict, total=False):
    color: str
    lw: float
    ls: tuple[int, tuple[int, int]]


_INKS: tuple[_Ink, ...] = (
    {"color": "black", "lw": 0.7},
    {"color": "#0050C8", "lw": 1.3},
    {"color": "#B34700", "lw": 1.3, "ls": (0, (4, 1))},
)


def plot_ecg(
    signals: Sequence[ArrayLike],
    path: PathLike,
    *,
    sampling_rate: float,
    lead_names: Sequence[str] = PRINTED_LEADS,
    titles: Sequence[str] | None = None,
    unit: str = "mV",
    suptitle: str | None = None,
) -> Path:
    """Draw one ECG, or up to three versions of it overlaid, on standard ECG paper.

    The paper is true to scale: 25 mm a second and 10 mm a millivolt, small squares of
    1 mm and large ones of 5 mm; at the file's own resolution a print has real size.
    The twelve standard leads (any order, any case) give the clinical page: three rows
    of four leads, each lead for a quarter of the record, above a full-length lead II.
    Any other set of leads gives one full-length strip a lead. Each row starts with a
    pulse of 1 mV. Rows move apart for high voltages; nothing is clipped.

    Args:
        signals: one to three arrays (leads, samples) of one shape; the first is drawn
            thin and black, on top. Samples that are not finite are gaps.
        path: PNG to write.
        sampling_rate: samples per second (Hz).
        lead_names: one name a lead.
        titles: one legend entry a signal; two signals are "before" and "after".
        unit: what 10 mm stand for, e.g. "standard deviation" for z-scored signals;
            the caption says it.
        suptitle: heading of the page.

    Returns:
        The path of the written file.

    Raises:
        ValueError: if the numbers or shapes of signals, leads and titles do not match,
            or the record is too long or too high for a page (wrong rate or unit?).

    Examples:
        >>> import tempfile
        >>> ecg = 0.5 * np.sin(np.linspace(0, 60, 12 * 1000)).reshape(12, 1000)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_ecg([ecg, 2 * ecg], f"{folder}/ecg.png", sampling_rate=100).name
        'ecg.png'
    """
    stack = _checked_signals(signals, sampling_rate, lead_names)
    names = {1: ("",), 2: ("before", "after"), 3: ("first", "second", "third")}
    titles = names[len(stack)] if titles is None else titles
    if len(titles) != len(stack):
        raise ValueError(f"{len(stack)} signals need as many titles; found {titles}.")
    segments = _segments(lead_names, stack.shape[-1])
    page = _laid_out(stack, segments, sampling_rate, unit)
    figure, ax = _ecg_paper(page.width, page.height, 10.0 if suptitle else 5.0)
    _draw_traces(ax, stack, titles, segments, page)
    _draw_names(ax, segments, page)
    for y in page.baselines:
        pulse = y + _MM_PER_UNIT * np.array([0, 0, 1, 1, 0, 0])
        ax.plot([1, 2, 2, 7, 7, 8], pulse, color="black", lw=0.9, label="_pulse")
    gain = "10 mm/mV" if unit == "mV" else f"10 mm per {unit}"
    caption = f"25 mm/s, {gain}, {sampling_rate:g} Hz"
    ax.text(0, -2, caption, fontsize=10, va="top")
    ax.text(0, page.height + 2.5, suptitle or "", fontsize=12, fontweight="bold")
    if any(titles):
        corner = {"bbox_to_anchor": (page.width, -1), "bbox_transform": ax.transData}
        pads = {"frameon": False, "borderpad": 0, "borderaxespad": 0.3}
        ax.legend(loc="upper right", ncols=3, fontsize=10, **corner, **pads)
    return write_png(figure, path)


@dataclass(frozen=True)
class _Page:
    """Where things lie, in millimetres of paper."""

    width: float
    height: float
    step: float  # between two samples
    baselines: NDArray[np.float64]  # of the rows, from the page's lower end
    labels: list[float]  # heights of the segments' names above their baselines


def _laid_out(
    stack: NDArray[np.float64], segments: list[_Segment], rate: float, unit: str
) -> _Page:
    """Find the room that each row needs."""
    step = _MM_PER_SECOND / rate
    rows = segments[-1][0] + 1
    above, below = np.full(rows, _MM_PER_UNIT), np.zeros(rows)
    labels: list[float] = []
    for row, lead, _, start, stop in segments:
        part = _MM_PER_UNIT * np.nan_to_num(stack[:, lead, start:stop])
        near = part[:, : int(10 / step) + 1]  # what a label must stay clear of
        labels.append(max(2.0, near.max()) + 1)
        above[row] = max(above[row], part.max(), labels[-1] + 3)
        below[row] = max(below[row], -part.min())
    # Baselines lie on thick lines, the last row's lowest; a row stands as high above
    # the next as both need, so traces cannot meet.
    gaps = np.maximum(below + np.append(above[1:], 0) + 2, 10)
    baselines = np.cumsum(5 * np.ceil(gaps[::-1] / 5))[::-1]
    height = 5 * np.ceil((baselines[0] + above[0] + 2) / 5)
    width = _MARGIN + 5 * np.ceil((stack.shape[-1] * step + 5) / 5)
    if height > _MAX_HEIGHT:
        raise ValueError(
            f"The page would be {height:.0f} mm high: the signals span "
            f"{np.nanmin(stack):.4g} to {np.nanmax(stack):.4g} at 10 mm per {unit}. "
            f"Are they in another unit?"
        )
    return _Page(max(width, _CAPTION_WIDTH), height, step, baselines, labels)


def _draw_traces(
    ax: Axes,
    stack: NDArray[np.float64],
    titles: Sequence[str],
    segments: list[_Segment],
    page: _Page,
) -> None:
    for i, (signal, title, look) in enumerate(zip(stack, titles, _INKS, strict=False)):
        for row, lead, _, start, stop in segments:
            x = _MARGIN + page.step * np.arange(start, stop)
            y = page.baselines[row] + _MM_PER_UNIT * signal[lead, start:stop]
            ax.plot(x, y, zorder=5 - i, solid_joinstyle="round", **look)
        if title:
            ax.plot([], [], label=title, **look)


def _draw_names(ax: Axes, segments: list[_Segment], page: _Page) -> None:
    for (row, _, name, start, _), label in zip(segments, page.labels, strict=True):
        x, y = _MARGIN + page.step * start, page.baselines[row]
        ax.text(x + 1.5, y + label, name, fontsize=10, fontweight="bold", zorder=6)
        if start:  # where one lead ends and the next one starts
            ax.plot([x, x], [y - 2, y + 2], color="black", lw=1.2)


def _segments(lead_names: Sequence[str], samples: int) -> list[_Segment]:
    """The clinical 3 x 4 page with a rhythm strip, or one strip a lead.

    A segment is (row, index of the lead, name, first sample, sample after the last).
    """
    place = {name.upper(): lead for lead, name in enumerate(lead_names)}
    if len(lead_names) != 12 or set(place) != {n.upper() for n in PRINTED_LEADS}:
        return [(i, i, name, 0, samples) for i, name in enumerate(lead_names)]
    cuts = [round(quarter * samples / 4) for quarter in range(5)]
    page = [
        (i % 3, place[name.upper()], name, cuts[i // 3], cuts[i // 3 + 1])
        for i, name in enumerate(PRINTED_LEADS)
    ]
    return [*page, (3, place["II"], "II", 0, samples)]


def _checked_signals(
    signals: Sequence[ArrayLike], rate: float, lead_names: Sequence[str]
) -> NDArray[np.float64]:
    """The signals as (versions, leads, samples), NaN where not finite."""
    arrays = [np.asarray(signal, dtype=np.float64) for signal in signals]
    shapes = [array.shape for array in arrays]
    if not 1 <= len(arrays) <= 3 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"signals must be one to three arrays (leads, samples) of one shape; "
            f"found {shapes}."
        )
    leads, samples = shapes[0]
    if leads == 0 or leads != len(lead_names):
        raise ValueError(
            f"The signals have {leads} leads but there are {len(lead_names)} "
            f"lead_names {list(lead_names)}: pass one name a lead."
        )
    if samples < 4 or not rate > 0 or samples / rate > _MAX_SECONDS:
        raise ValueError(
            f"{samples} samples at {rate} Hz do not fit a page (4 samples to "
            f"{_MAX_SECONDS:g} s): check sampling_rate, or cut a window first."
        )
    return np.where(np.isfinite(arrays), arrays, np.nan)


def _ecg_paper(width: float, height: float, head: float) -> tuple[Figure, Axes]:
    """Pink paper in a white frame; the unit of the axes is a millimetre of paper."""
    page_width, page_height = width + 10, height + 9 + head
    figure = Figure((page_width / 25.4, page_height / 25.4), dpi=DPI, facecolor="white")
    box = (5 / page_width, 9 / page_height, width / page_width, height / page_height)
    ax = figure.add_axes(box, xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_facecolor("#FFF8F8")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color("#EFA3AB")
    for every, colour, line in ((1, "#F9D3D6", 0.4), (5, "#EFA3AB", 0.8)):
        x, y = np.arange(0, width + 1, every), np.arange(0, height + 1, every)
        ax.vlines(x, 0, height, colors=colour, lw=line, zorder=every / 10)
        ax.hlines(y, 0, width, colors=colour, lw=line, zorder=every / 10)
    return figure, ax
