"""Draw with matplotlib: one figure as an SVG whose colours a page's style sheet sets, and as a small PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import MoEExtError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEME: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b636d", "#a3abb5"),
    "grid": ("#d9dde2", "#353c44"),
    "paper": ("#ffffff", "#15191e"),
    "panel": ("#eef0f3", "#242a31"),
    "stock": ("#d55e00", "#e69f00"),
    "tuned": ("#0072b2", "#56b4e9"),
    "kernels": ("#008f68", "#00b583"),
    "other": ("#b5638f", "#cc79a7"),
    "heat1": ("#123570", "#fde737"),
    "heat2": ("#575d6d", "#bcaf6f"),
    "heat3": ("#8a8779", "#8a8779"),
    "heat4": ("#bcaf6f", "#575d6d"),
    "heat5": ("#ebdc78", "#123570"),
}
"""By name, a colour on light and on dark paper: hues of the palette of Okabe and Ito, which all eyes tell apart.

Blue and vermilion become sky blue and orange on dark paper. Series differ in marker and dash as well, for print.
heat1 to heat5 go from the fastest to the slowest: five steps of the cividis scale of matplotlib, whose lightness
changes steadily, so that it prints in grey. The fastest stand out most from either paper.
"""
LIGHT = {name: light for name, (light, _) in THEME.items()}

HEAT = tuple(f"heat{step}" for step in range(1, 6))
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "grid.color": LIGHT["grid"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": LIGHT["paper"],
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_PNG_DPI, _PNG_COLOURS = 110, 64


@dataclass(frozen=True, slots=True)
class DrawnFigure:
    """One figure. `alt` says in words what it shows; `svg` stands in a page as it is; `png` is a file's content."""

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    png: bytes


def require_extra() -> None:
    """Raises MoEExtError, with the command that installs them, where the libraries of reports are missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise MoEExtError(
            f"a report is drawn with matplotlib and jinja2 ({error}): pip install 'sglang-moe-ext[report]'"
        ) from error


def style(name: str) -> Any:
    """The settings of all figures, as a context to draw and to save in. `name` makes the ids of its SVG."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {**_STYLE, "svg.hashsalt": name}
    return mpl.rc_context(settings)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, name: str, title: str, alt: str, caption: str) -> DrawnFigure:
    """Both forms of a figure. Call it in `style(name)`."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return DrawnFigure(name, title, alt, caption, themed_svg(text.getvalue(), name, alt), _png(figure))


def _png(figure: Figure) -> bytes:
    from PIL import Image

    raw, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    with Image.open(raw) as image:
        image.convert("RGB").quantize(_PNG_COLOURS).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def themed_svg(svg: str, name: str, alt: str) -> str:
    """An SVG to stand in a page: no prologue, ids of its own, colours by name, a text for those who cannot see it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", body)
    for colour, light in LIGHT.items():
        body = body.replace(light, f"var(--{colour})")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    label = html.escape(alt, quote=True)
    shape = re.search(r'viewBox="[^"]*"', body)
    opening = f'<svg class="figure" {shape[0] if shape else ""} role="img" aria-label="{label}"><title>{label}</title>'
    return opening + body[body.index(">") + 1 :]
