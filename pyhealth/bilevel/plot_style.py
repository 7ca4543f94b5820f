"""What all pictures have in common: size, style, colours and how they are written."""

from __future__ import annotations

import io
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = [
    "COLOURS",
    "DASHES",
    "GREY",
    "PIXELS_PER_MM",
    "PathLike",
    "new_figure",
    "png_of",
    "style_axes",
    "write_png",
]

PathLike = str | os.PathLike[str]

PIXELS_PER_MM = 6  # a whole number, so that the ECG grid falls on whole pixels
DPI = 25.4 * PIXELS_PER_MM
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#000000")  # Okabe and Ito
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))


def write_png(figure: Figure, path: PathLike) -> Path:
    """Render in memory, then write: an error while drawing leaves no file.

    Args:
        figure: the picture.
        path: PNG to write.

    Raises:
        ValueError: if the path does not end in ".png".

    Examples:
        >>> write_png(new_figure(1, 1), "empty.png").name
        'empty.png'
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"{target.name!r}: pictures are PNG; end it in '.png'.")
    content = png_of(figure)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


def png_of(figure: Figure, dpi: float = DPI) -> bytes:
    """Return a picture as the bytes of a PNG file.

    Args:
        figure: the picture.
        dpi: dots per inch.

    Examples:
        >>> png_of(new_figure(1, 1))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure; width and height in inches.

    Examples:
        >>> new_figure(5, 3).get_size_inches().tolist()
        [5.0, 3.0]
    """
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure((width, height), dpi=DPI, layout=layout, facecolor="white")


def style_axes(ax: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Set what every panel has in common, and not leave it to the user's rcParams.

    Examples:
        >>> ax = new_figure(1, 1).add_subplot()
        >>> style_axes(ax, "AUROC", "epoch")
        >>> ax.get_xlabel()
        'epoch'
    """
    ax.set_title(title, fontsize=12, fontweight="bold", loc="left")
    ax.set_xlabel(xlabel, fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    ax.tick_params(labelsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E3E3E3", linewidth=0.7)
    ax.set_axisbelow(True)
