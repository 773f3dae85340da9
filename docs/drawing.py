"""What the pictures of docs/pictures have in common: size, colours, fonts, and one claim as the title."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PICTURES = Path(__file__).parent / "pictures"
OURS, OURS_TOO, THEIRS, THEIRS_TOO = "tab:blue", "#00858a", "dimgrey", "grey"
FONTSIZE = 12


def start(height: float = 4.7) -> tuple[Figure, Axes]:
    """A figure that is legible at a width of 680 px."""
    figure = Figure(figsize=(6.6, height), layout="constrained")
    return figure, figure.subplots()


def name(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **style: object) -> None:
    """Write a name beside a point, `offset` typographic points away."""
    axes.annotate(text, point, offset, textcoords="offset points", **{"fontsize": FONTSIZE, **style})


def save(figure: Figure, axes: Axes, claim: str, file: str, grid: str = "y") -> None:
    figure.suptitle(claim, fontsize=13, x=0.01, horizontalalignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)
    axes.minorticks_off()
    axes.tick_params(labelsize=FONTSIZE)
    axes.xaxis.label.set_fontsize(FONTSIZE)
    axes.yaxis.label.set_fontsize(FONTSIZE)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / file, dpi=140)
