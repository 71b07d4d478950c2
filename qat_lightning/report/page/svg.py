"""Draws plots as inline SVG in the page's colours, without changing matplotlib's global state."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qat_lightning.base.formats import printable

# Placeholders for the variables of the page's style sheet, each with a light and a dark colour.
INK, MUTED, RULE, SURFACE = "#010001", "#010002", "#010003", "#010004"
GRAY, BLUE, ORANGE, GREEN, PURPLE, AMBER = (f"#01000{digit}" for digit in "56789a")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    SURFACE: "surface",
    GRAY: "gray",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
    AMBER: "amber",
}
_SENTINEL = re.compile("|".join(_VARIABLES))
_REFERENCE = re.compile(r"(?<=#)[\w-]+(?=\)?$)")
_FONT = re.compile(r"font-family: [^;]*;? ?")

FONT_SIZE = 11
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qat-lightning",
    "path.simplify": False,
    "font.size": FONT_SIZE,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@dataclass(frozen=True)
class Margins:
    """Space around the axes, in the units of the SVG (pixels, if it is not scaled)."""

    left: float
    top: float
    right: float = 8
    bottom: float = 22


@dataclass(frozen=True)
class Key:
    """An entry of a legend. The page draws the legend, not matplotlib.

    Attributes:
        name: What the colour stands for.
        variable: The colour's variable in the page's style sheet.
        dashed: Whether its line is dashed.
    """

    name: str
    variable: str
    dashed: bool = False


def key(name: str, colour: str, dashed: bool = False) -> Key:
    """Returns an entry of a legend for one of the colours above."""
    return Key(name, f"--{_VARIABLES[colour]}", dashed)


@dataclass(frozen=True)
class Plot:
    """A plot and its caption.

    Attributes:
        title: What it shows.
        svg: The `<svg>` element.
        note: A remark in the caption; may be empty.
        keys: The legend.
    """

    title: str
    svg: str
    note: str = ""
    keys: tuple[Key, ...] = ()


def draw(
    prefix: str, label: str, width: float, height: float, margins: Margins, paint: Callable[[Axes], None]
) -> str:
    """Draws one plot.

    Args:
        prefix: Begins the ids in the SVG; differs between the plots of a page.
        label: Describes the plot for screen readers.
        width: Width in the units of the SVG.
        height: Height in the units of the SVG.
        margins: Space around the axes.
        paint: Draws on the axes, in the colours above.
    """
    settings = matplotlib.style.context(["default", _STYLE])
    with warnings.catch_warnings(), settings:
        # The browser has glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_axes(
            (
                margins.left / width,
                margins.bottom / height,
                (width - margins.left - margins.right) / width,
                (height - margins.top - margins.bottom) / height,
            ),
            facecolor="none",
        )
        axes.tick_params(length=0, pad=5)
        paint(axes)
        written = StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _inline(written.getvalue(), prefix, label, width, height)


def _inline(text: str, prefix: str, label: str, width: float, height: float) -> str:
    root = ElementTree.fromstring(text)
    ids: dict[str, str] = {}
    kept = _element(root, lambda name: ids.setdefault(name, f"{prefix}-{len(ids)}"))
    kept.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "width": f"{width:g}",
        "height": f"{height:g}",
        "role": "img",
        "aria-label": printable(label),
    }
    return ElementTree.tostring(kept, encoding="unicode")


def _element(source: ElementTree.Element, renamed: Callable[[str], str]) -> ElementTree.Element:
    """Copies an element without namespaces, metadata, page-wide styles and unused ids."""
    element = ElementTree.Element(_local(source.tag))
    for name, value in source.attrib.items():
        if name == "style":
            # The page sets the font.
            value = _SENTINEL.sub(lambda match: f"var(--{_VARIABLES[match[0]]})", _FONT.sub("", value))
        elif name == "id":
            value = "" if element.tag in ("g", "text") else renamed(value)
        else:
            value = _REFERENCE.sub(lambda match: renamed(match[0]), value)
        if value:
            element.set(_local(name), value)
    element.text = source.text if source.text and source.text.strip() else None
    for child in source:
        if _local(child.tag) not in ("metadata", "style"):
            element.append(_element(child, renamed))
    return element


def _local(name: str) -> str:
    return name.rpartition("}")[2]
