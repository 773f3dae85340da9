"""Draws docs/pictures/stack.png: how FacT cuts the weights of a block into slices, stacks and factorizes them.

python docs/draw_stack.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FILE = Path(__file__).parent / "pictures" / "stack.png"
COLOURS = {"q": "#4477aa", "k": "#66ccee", "v": "#228833", "o": "#ccbb44", "up": "#ee6677", "down": "#aa3377"}
SHARED, OWN = "#bbbbbb", "#ffffff"
# Of the matrices of a block: rows and columns of slices, and where the upper left corner is.
PLACES = {
    "q": (1, 1, 0, 0),
    "k": (1, 1, 1.4, 0),
    "v": (1, 1, 2.8, 0),
    "o": (1, 1, 4.2, 0),
    "up": (1, 4, 0, -1.8),
    "down": (4, 1, 5.6, 0),
}


def square(axes: Axes, x: float, y: float, colour: str, width: float = 1, height: float = 1) -> None:
    """A rectangle whose upper left corner is (x, y)."""
    axes.add_patch(Rectangle((x, y - height), width, height, facecolor=colour, edgecolor="black", linewidth=0.8))


def draw_block(axes: Axes) -> None:
    axes.set_title("1. Cut the weights into d x d slices")
    for name, (rows, columns, x, y) in PLACES.items():
        for row in range(rows):
            for column in range(columns):
                square(axes, x + column, y - row, COLOURS[name])
        axes.text(x + columns / 2, y + 0.12, name, ha="center", va="bottom")
    axes.text(0, -3.2, "12 slices per block; a ViT-B has\n144 slices of 768 x 768", va="top")
    axes.set(xlim=(-0.2, 6.8), ylim=(-4.3, 0.8))


def draw_stack(axes: Axes) -> None:
    axes.set_title("2. Stack the slices of all blocks")
    slices = [name for name, (rows, columns, _, _) in PLACES.items() for _ in range(rows * columns)]
    for index, name in reversed(list(enumerate(slices))):
        square(axes, 0.28 * index, 0.17 * index, COLOURS[name], 1.6, 1.6)
    axes.text(4.2, -0.6, "12 L slices of d x d\n(L blocks)", va="top")
    axes.text(-0.1, -1.95, "only the increment dW is trained", va="top")
    axes.set(xlim=(-0.2, 6.8), ylim=(-2.6, 2.4))


def draw_factors(axes: Axes) -> None:
    axes.set_title("3. Factorize: shared U and V, one core per slice")
    axes.text(0.05, 0.15, "dW$_k$ = s", va="center", fontsize=13)
    square(axes, 1.75, 0.95, SHARED, 0.5, 1.6)
    axes.text(2, 1.05, "U", ha="center", va="bottom")
    axes.text(2, -0.75, "d x r\nshared", ha="center", va="top")
    for index in reversed(range(6)):
        square(axes, 3.1 + 0.14 * index, 0.4 + 0.12 * index, list(COLOURS.values())[index], 0.5, 0.5)
    axes.text(3.7, 1.25, "$\\Sigma_k$", ha="center", va="bottom")
    axes.text(3.7, -0.75, "r x r\none for\neach slice", ha="center", va="top")
    square(axes, 4.95, 0.4, SHARED, 1.6, 0.5)
    axes.text(5.75, 0.5, "V$^T$", ha="center", va="bottom")
    axes.text(5.75, -0.75, "r x d\nshared", ha="center", va="top")
    axes.set(xlim=(-0.2, 6.8), ylim=(-2.1, 1.7))


def draw_rebuilt(axes: Axes) -> None:
    axes.set_title("4. Put the increments back in place")
    for column in range(4):
        x = 0.1 + 1.65 * column
        square(axes, x, 1, COLOURS["up"], 1.65, 1.65)
        square(axes, x + 0.12, 0.87, SHARED, 0.2, 1.3)
        square(axes, x + 0.45, 0.87, OWN, 0.28, 0.28)
        square(axes, x + 0.85, 0.87, SHARED, 0.7, 0.2)
    axes.text(
        0.1,
        -0.8,
        "dW of up = [dW$_5$ dW$_6$ dW$_7$ dW$_8$], of rank r:\nthe frozen layer adds x dW to its output",
        va="top",
    )
    axes.set(xlim=(-0.2, 6.8), ylim=(-1.9, 1.4))


def main() -> None:
    figure = Figure(figsize=(5.6, 10), layout="constrained")
    panels = figure.subplots(4, 1, height_ratios=[5.1, 5, 3.8, 3.3])
    for axes, draw in zip(panels, (draw_block, draw_stack, draw_factors, draw_rebuilt), strict=True):
        draw(axes)
        axes.set_aspect("equal")
        axes.axis("off")
        axes.title.set(horizontalalignment="left", x=0, fontsize=12.5, fontweight="bold")
        for text in axes.texts:
            text.set_fontsize(max(text.get_fontsize(), 12))
    FILE.parent.mkdir(exist_ok=True)
    figure.savefig(FILE, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
