"""The figures of a report, each with the sentence that says what it shows. No text of a stranger is drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import PROJECTIONS, Projection
from sglang_moe_ext.report import drawing
from sglang_moe_ext.report.drawing import LIGHT, DrawnFigure
from sglang_moe_ext.report.run_data import (
    ReportedRun,
    SpaceMap,
    TokensRow,
    kernels_gains,
    mean_gain,
    tuned_gains,
)
from sglang_moe_ext.tuning.search.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_STEPS = (1.05, 1.2, 1.5, 2.0)
"""Bounds of the classes of the map: times the best of the GEMM."""
_WIDTH = 8.0
_MOST_TICKS = 16

Draw = Callable[[ReportedRun, str], DrawnFigure | None]


def draw_all(run: ReportedRun, prefix: str, progress: Callable[[int, int], None]) -> list[DrawnFigure]:
    """Every figure that the run has data for. `prefix` begins the names of their files."""
    drawn: list[DrawnFigure] = []
    for done, (name, draw) in enumerate(FIGURES.items(), 1):
        with drawing.style(f"{prefix}{name}"):
            found = draw(run, f"{prefix}{name}")
        if found is not None:
            drawn.append(found)
        progress(done, len(FIGURES))
    return drawn


def _draw_times(run: ReportedRun, name: str) -> DrawnFigure | None:
    stock = [(row.m, row.stock_us) for row in run.rows]
    tuned = [(row.m, row.tuned_us) for row in run.rows]
    predicted = [(row.m, row.predicted_us) for row in run.rows]
    if all(us is None for _, us in (*stock, *tuned, *predicted)):
        return None
    figure = drawing.new_figure(_WIDTH, 4.6)
    axes = figure.subplots()
    _line(
        axes, [(row.m, row.floor_us) for row in run.rows], "muted", "roofline (uniform routing)", dashes=":", marker=""
    )
    _line(axes, stock, "stock", "stock, before tuning", dashes="--", marker="s")
    _line(axes, tuned, "tuned", "tuned", marker="o")
    _line(axes, predicted, "tuned", "predicted, both GEMMs", dashes="-.", marker="x")
    graphs = [(row.m, row.kernels if row.kernels is not None and row.kernels.in_graph else None) for row in run.rows]
    others = [(row.m, None if row.kernels is None or row.kernels.in_graph else row.kernels.us) for row in run.rows]
    _line(axes, others, "kernels", "our kernels", marker="^")
    in_graphs = [(m, None if row is None else row.us) for m, row in graphs]
    engines = [(m, None if row is None else row.engine_us) for m, row in graphs]
    _line(axes, in_graphs, "kernels", "our kernels, in CUDA graphs", dashes="--", marker="v")
    _line(axes, engines, "tuned", "tuned, in CUDA graphs", dashes=":", marker="d")
    _over_tokens(axes, [row.m for row in run.rows])
    _on_log_scale(axes)
    _legend(figure)
    alt = "Time of the layer over the number of tokens. " + " ".join(
        filter(None, (_ends("Stock", stock), _ends("Tuned", tuned), _ends("Predicted", predicted)))
    )
    caption = (
        "Median time of the whole layer with a cold L2 cache. The roofline is that of the two GEMMs alone, for uniform "
        "routing: uneven routing reads fewer experts and can lie below it. Times in CUDA graphs compare with each "
        "other alone."
    )
    return drawing.finish(figure, name, "Time over tokens", alt, caption)


def _draw_gains(run: ReportedRun, name: str) -> DrawnFigure | None:
    tuned = [(row.m, row.gain) for row in run.rows]
    ours = [(row.m, None if row.kernels is None else row.kernels.gain) for row in run.rows]
    if not any(gain for _, gain in (*tuned, *ours)):
        return None
    figure = drawing.new_figure(_WIDTH, 4.0)
    axes = figure.subplots()
    axes.axhline(1.0, color=LIGHT["muted"], linewidth=1)
    for points, colour, label, marker, dashes in (
        (tuned, "tuned", "tuned over stock", "o", "-"),
        (ours, "kernels", "our kernels over the tuned engine", "^", "--"),
    ):
        if any(gain for _, gain in points):
            _intervals(axes, points, colour, label, marker, dashes)
    _over_tokens(axes, [row.m for row in run.rows])
    axes.set_ylabel("times faster")
    _legend(figure)
    means = (("Tuned over stock", tuned_gains(run)), ("Our kernels over the tuned engine", kernels_gains(run)))
    alt = "Gain over the number of tokens. " + " ".join(
        f"{what}: geometric mean {mean_gain(list(gains.values())):.3f}, "
        f"most {max(gains.values()):.2f} at M={max(gains, key=gains.__getitem__)}."
        for what, gains in means
        if gains
    )
    caption = (
        "How many times faster, from interleaved rounds; bars are 95 % intervals. 1 means that stock stays, "
        "since nothing beat it beyond doubt."
    )
    return drawing.finish(figure, name, "Gain", alt, caption)


def _draw_space(run: ReportedRun, name: str) -> DrawnFigure | None:
    space = run.space
    if space is None or not space.cells:
        return None
    from matplotlib.patches import Patch

    columns = sorted({(cell.block_m, cell.block_n) for cell in space.cells})
    lines = sorted({(cell.block_k, cell.num_warps, cell.num_stages) for cell in space.cells})
    letters = _letters(space)
    figure = drawing.new_figure(_WIDTH + 1.5, 0.22 * len(lines) * 2 + 2.6)
    grids = figure.subplots(2, 1, sharex=True)
    for axes, projection in zip(grids, PROJECTIONS, strict=True):
        _fill_map(axes, space, projection, columns, lines, letters)
        axes.set_title(f"{projection} GEMM")
        axes.set_yticks([place + 0.5 for place in range(len(lines))], [f"{k} w{w} s{s}" for k, w, s in lines])
        axes.set_ylabel("BLOCK_SIZE_K, warps, stages")
        axes.tick_params(axis="y", labelsize=7)
    grids[-1].set_xticks(
        [place + 0.5 for place in range(len(columns))], [f"{m}x{n}" for m, n in columns], rotation=60, fontsize=8
    )
    grids[-1].set_xlabel("BLOCK_SIZE_M x BLOCK_SIZE_N")
    bounds = ("1", *map(str, HEAT_STEPS))
    patches = [
        Patch(facecolor=LIGHT[colour], label=f"{low} to {high}x the best" if high else f"over {low}x")
        for colour, low, high in zip(drawing.HEAT, bounds, (*bounds[1:], ""), strict=True)
    ]
    patches.append(Patch(facecolor=LIGHT["paper"], edgecolor=LIGHT["muted"], label="kept, not timed"))
    patches += [
        Patch(facecolor=LIGHT["panel"], edgecolor=LIGHT["grid"], label=f"{letter}  {rule}")
        for rule, letter in letters.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    dropped = ", ".join(f"{count} by {rule}" for rule, count in space.dropped.items()) or "none"
    alt = (
        f"Map of the search space: {space.configurations} configurations, {space.kept} kept; dropped: {dropped}; "
        f"{space.timed} of {len(space.cells)} binaries timed."
    )
    caption = (
        "Each cell is one binary, without TMA. Colour: its time over the best of the same GEMM, at the number of "
        "tokens where it did best. A letter: the rule that drops it before anything is compiled."
    )
    return drawing.finish(figure, name, "Search space", alt, caption)


def _letters(space: SpaceMap) -> dict[str, str]:
    """For each rule that drops something, a letter of its name that no other rule has."""
    letters: dict[str, str] = {}
    dropping = {cell.dropped_by for cell in space.cells}
    for rule in space.why:
        if rule in dropping:
            letters[rule] = next(letter for letter in f"{rule.upper()}0123456789" if letter not in letters.values())
    return letters


def _fill_map(
    axes: Axes,
    space: SpaceMap,
    projection: Projection,
    columns: Sequence[tuple[int, int]],
    lines: Sequence[tuple[int, int, int]],
    letters: dict[str, str],
) -> None:
    squares: dict[str, list[tuple[int, int]]] = {}
    for cell in space.cells:
        place = (
            columns.index((cell.block_m, cell.block_n)),
            lines.index((cell.block_k, cell.num_warps, cell.num_stages)),
        )
        slowdown = cell.slowdown.get(projection)
        if slowdown is not None:
            step = sum(slowdown > bound for bound in HEAT_STEPS)
            squares.setdefault(LIGHT[drawing.HEAT[step]], []).append(place)
        elif cell.dropped_by is not None:
            squares.setdefault(LIGHT["panel"], []).append(place)
            _letter(axes, place, letters[cell.dropped_by])
        else:
            squares.setdefault(LIGHT["paper"], []).append(place)
    for colour, places in squares.items():
        _add_squares(axes, colour, places)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(0, len(lines))
    axes.grid(visible=False)
    axes.tick_params(length=0)


def _letter(axes: Axes, place: tuple[int, int], letter: str) -> None:
    axes.text(place[0] + 0.5, place[1] + 0.45, letter, ha="center", va="center", fontsize=6, color=LIGHT["muted"])


def _add_squares(axes: Axes, colour: str, places: Sequence[tuple[int, int]]) -> None:
    """All squares of one colour as one path, which keeps the page small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    vertices = [(x + dx, y + dy) for x, y in places for dx, dy in corners]
    path = Path(vertices, codes * len(places))
    axes.add_patch(PathPatch(path, facecolor=colour, edgecolor=LIGHT["grid"], linewidth=0.6))


def _draw_regret(run: ReportedRun, name: str) -> DrawnFigure | None:
    if not run.regret:
        return None
    counts = range(1, max(len(row.curve) for row in run.regret) + 1)
    at = {count: sorted(row.after(count) for row in run.regret) for count in counts}
    figure = drawing.new_figure(_WIDTH, 3.8)
    axes = figure.subplots()
    axes.step(
        counts,
        [100 * of[-1] for of in at.values()],
        where="post",
        color=LIGHT["stock"],
        linestyle="--",
        label="worst number of tokens",
    )
    axes.step(
        counts,
        [100 * statistics.median(of) for of in at.values()],
        where="post",
        color=LIGHT["tuned"],
        label="median over numbers of tokens",
    )
    axes.set_xscale("log", base=2)
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("candidates timed, in the predicted order")
    axes.set_ylabel("slower than the best, %")
    axes.set_ylim(bottom=0)
    _legend(figure)
    first, eighth = ([row.after(count) for row in run.regret] for count in (1, 8))
    alt = (
        f"Regret against the predicted order. First in the order: {100 * statistics.median(first):.1f} % slower than "
        f"the best in the median, {100 * max(first):.1f} % at worst. Best of the first 8: "
        f"{100 * statistics.median(eighth):.1f} % and {100 * max(eighth):.1f} %."
    )
    caption = (
        "Had only the first so many by the cost model been timed, how much slower than the best measured would the "
        "choice be? Up and down GEMM together, one configuration for both, without TMA."
    )
    return drawing.finish(figure, name, "Regret of the predicted order", alt, caption)


def _draw_errors(run: ReportedRun, name: str) -> DrawnFigure | None:
    tuned = [(row.m, row.error or None) for row in run.rows]
    ours = [(row.m, (row.kernels.error or None) if row.kernels is not None else None) for row in run.rows]
    errors = [error for _, error in (*tuned, *ours) if error is not None]
    if not errors:
        return None
    figure = drawing.new_figure(_WIDTH, 3.4)
    axes = figure.subplots()
    if run.tolerated_error is not None:
        axes.axhline(run.tolerated_error, color=LIGHT["stock"], linestyle="--", label="tolerated")
    _line(axes, tuned, "tuned", "engine's kernels", marker="o")
    _line(axes, ours, "kernels", "our kernels", marker="^")
    _over_tokens(axes, [row.m for row in run.rows])
    axes.set_yscale("log")
    axes.margins(y=0.25)
    axes.set_ylabel("relative error")
    _legend(figure)
    bound = "" if run.tolerated_error is None else f" Tolerated: {run.tolerated_error:.1e}."
    alt = f"Relative error of the layer against float32 over the number of tokens: {max(errors):.1e} at most.{bound}"
    caption = "Error of the chosen layer against the reference in float32, on fresh inputs and poisoned buffers."
    return drawing.finish(figure, name, "Error", alt, caption)


def _draw_machine(run: ReportedRun, name: str) -> DrawnFigure | None:
    clocks = [(row.m, row.clock_mhz) for row in run.rows if row.clock_mhz]
    noise = [(row.m, 100 * row.noise) for row in run.rows if row.noise is not None]
    throttled = [(row.m, row.clock_mhz) for row in run.rows if row.throttled and row.clock_mhz]
    if not clocks and not noise:
        return None
    figure = drawing.new_figure(_WIDTH, 4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    _line(above, clocks, "tuned", "clock after the comparison", marker="o")
    _line(above, throttled, "stock", "the GPU slowed down", dashes="", marker="X")
    above.set_ylabel("MHz")
    _line(below, noise, "kernels", "noise: stock against itself", marker="^")
    below.set_ylabel("%")
    _over_tokens(below, [row.m for row in run.rows])
    for axes in (above, below):
        axes.margins(y=0.2)
    below.set_ylim(bottom=0)
    _legend(figure)
    parts = []
    if clocks:
        values = [clock for _, clock in clocks]
        parts.append(f"clock from {min(values):.0f} to {max(values):.0f} MHz")
    if noise:
        parts.append(f"noise {max(value for _, value in noise):.2f} % at most")
    slowed = f"; the GPU slowed down at {len(throttled)} of them" if throttled else ""
    alt = f"Clock of the multiprocessors and noise over the number of tokens: {', '.join(parts)}{slowed}."
    caption = "A gain counts only where it is larger than the noise, which is how much stock differs from itself."
    return drawing.finish(figure, name, "Clocks and noise", alt, caption)


FIGURES: dict[str, Draw] = {
    "gain": _draw_gains,
    "time": _draw_times,
    "space": _draw_space,
    "regret": _draw_regret,
    "error": _draw_errors,
    "machine": _draw_machine,
}
"""By the name of its file, in the order of the page."""


def draw_comparison(shared: Sequence[tuple[TokensRow, TokensRow]]) -> DrawnFigure | None:
    """Times of two runs at the M that both have, and their ratio. Rows are (of A, of B)."""
    points = [(a.m, a.tuned_us, b.tuned_us) for a, b in shared if a.tuned_us and b.tuned_us]
    if not points:
        return None
    name = "compare"
    with drawing.style(name):
        figure = drawing.new_figure(_WIDTH, 5.4)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _line(above, [(m, us) for m, us, _ in points], "other", "A, tuned", dashes="--", marker="s")
        _line(above, [(m, us) for m, _, us in points], "tuned", "B, tuned", marker="o")
        _on_log_scale(above)
        _legend(figure)
        below.axhline(1.0, color=LIGHT["muted"], linewidth=1)
        _line(below, [(m, a / b) for m, a, b in points], "kernels", "", marker="^")
        below.set_ylabel("A over B")
        below.margins(y=0.2)
        _over_tokens(below, [m for m, _, _ in points])
        mean = mean_gain([a / b for _, a, b in points])
        alt = f"Times of run A and run B over the number of tokens: B is {mean:.3f} times as fast, geometric mean."
        caption = "The two runs were not interleaved: a ratio has no interval, and clocks and inputs may differ."
        return drawing.finish(figure, name, "Times of both, and their ratio", alt, caption)


def _line(
    axes: Axes,
    points: Sequence[tuple[int, float | None]],
    colour: str,
    label: str,
    *,
    dashes: str = "-",
    marker: str = "o",
) -> None:
    if any(value is not None for _, value in points):
        axes.plot(
            [m for m, _ in points],
            [math.nan if value is None else value for _, value in points],
            color=LIGHT[colour],
            linestyle=dashes or "none",
            marker=marker or None,
            label=label or None,
        )


def _intervals(
    axes: Axes, points: Sequence[tuple[int, Interval | None]], colour: str, label: str, marker: str, dashes: str
) -> None:
    """Gains with their bounds; the line has a gap where there is none."""
    known = [(m, Interval(math.nan, math.nan, math.nan) if gain is None else gain) for m, gain in points]
    axes.errorbar(
        [m for m, _ in known],
        [gain.value for _, gain in known],
        yerr=([gain.value - gain.low for _, gain in known], [gain.high - gain.value for _, gain in known]),
        color=LIGHT[colour],
        label=label,
        marker=marker,
        linestyle=dashes,
        capsize=3,
    )


def _over_tokens(axes: Axes, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    powers = [1 << exponent for exponent in range(min(tokens).bit_length() - 1, (max(tokens) - 1).bit_length() + 1)]
    axes.set_xticks(powers[:: -(-len(powers) // _MOST_TICKS)], minor=False)
    axes.minorticks_off()
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("tokens")


def _on_log_scale(axes: Axes) -> None:
    """Times in microseconds from below to above."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _plain_numbers(axes.yaxis)
    axes.set_ylabel("microseconds")


def _legend(figure: Figure) -> None:
    """Above the axes, where it lies over no line."""
    figure.legend(loc="outside upper left", ncols=3, fontsize=9)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def _ends(what: str, points: Sequence[tuple[int, float | None]]) -> str:
    known = [(m, us) for m, us in points if us is not None]
    if not known:
        return ""
    (first, least), (last, most) = known[0], known[-1]
    return f"{what}: {least:.1f} us at M={first}, {most:.1f} us at M={last}."
