"""Draws and writes every figure in one style: SVG for the report or PNG for pages."""

import re
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenkeel.errors import EvenkeelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

__all__ = ["GREY", "INK", "PALETTE", "drawing", "save", "svg"]


# After Okabe and Ito's palette, which colour-blind readers can tell apart; grey for doing nothing. All of them stand
# out on white and on near-black.
GREY = "#8a8f98"
INK = "#3b4048"  # text and axes; in SVG the surrounding page's own colour
PALETTE = ("#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#7f6bd0", "#b8a500", "#a0522d", "#5f9ea0")
_WIDTH = 9.6  # inches
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "evenkeel",
    "text.color": INK,
    "text.parse_math": False,  # a policy may have any name
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "axes.unicode_minus": True,
}


@contextmanager
def drawing(
    height: float, *, left: float, right: float = 0.1, top: float = 0.1, bottom: float = 0.5
) -> "Iterator[Figure]":
    """Makes a figure to draw on in our style, of a height and with margins in inches.

    The margins are fixed because matplotlib's own layout takes as long as all the drawing. No global state of
    matplotlib is left changed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=left / _WIDTH, right=1 - right / _WIDTH, top=1 - top / height, bottom=bottom / height, hspace=0.42
        )
        yield figure


def svg(figure: "Figure", name: str) -> str:
    """Gives the figure as an `<svg>` element to be put into a page: text and axes take the page's colour and font.

    Args:
        figure: what to draw.
        name: goes before every id, so that several figures can share a page.
    """
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    # Only ids that something refers to are kept.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)


def save(figure: "Figure", path: str | Path) -> None:
    """Writes the figure to a file, `.png` (two pixels a point) or `.svg`, on white.

    Raises:
        EvenkeelError: the file cannot be written, or has another ending.
    """
    import matplotlib

    if Path(path).suffix not in (".png", ".svg"):
        raise EvenkeelError(f"figure {path}: the file's name must end in .png or .svg")
    try:
        with matplotlib.rc_context(_STYLE):
            figure.savefig(
                path, dpi=144, facecolor="white", metadata={"Date": None} if str(path).endswith("svg") else {}
            )
    except OSError as error:
        raise EvenkeelError(f"figure {path} cannot be written: {error.strerror or error}") from error
