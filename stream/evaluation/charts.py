"""A run as a page: tables, and of each series a chart to zoom into. One file that needs no network.

Charts are drawn when they come into view, so that a page of forty series opens at once. A long series is thinned so
that no extreme is lost: of each bucket the lowest and the highest value and the highest score stay, and every alarm.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stream.columns import BoolArray, Float64Array, Int64Array
from stream.errors import ConfigError, InputError
from stream.evaluation import table
from stream.evaluation.data import Series
from stream.evaluation.runs import Figures, Run
from stream.evaluation.vus import segments
from stream.events import TYPE_OPENED, EventData
from stream.render import counted

if TYPE_CHECKING:
    import plotly.graph_objects as go

Drawn = tuple[Series, Run, Sequence[Figures]]

DRAWN_MAX: Final = 6_000  # cells of one chart; beyond it they are thinned
_INSTALL: Final = "pip install 'tocsin[report]'"
_VALUE, _BAND, _EXPECTED = "#3b82c4", "rgba(59,130,196,0.20)", "#8a93a3"
_ALARM, _LABEL, _SCORE, _THRESHOLD = "#e0433c", "rgba(240,160,30,0.26)", "#8b6cc9", "#d9822b"
_COMPLETED: Final = "#2ba38b"
_NARROWEST: Final = 0.003  # of the whole time: a shaded segment
_WIDE: Final = 30.0  # highest score over the typical one, from which on the axis is logarithmic
_SPARSE: Final = 0.2  # share of missing cells
_PNG_SIZE: Final = (1600, 900)


def check(*, png: bool) -> None:
    """Make sure that charts can be drawn.

    Raises:
        ConfigError: plotly is not installed; for a PNG, kaleido or a browser.
    """
    try:
        import plotly.graph_objects  # noqa: F401
    except ImportError:
        raise ConfigError(f"charts need plotly: {_INSTALL}") from None
    if not png:
        return
    try:
        import kaleido  # noqa: F401
        from choreographer.browsers.chromium import Chromium
    except ImportError:
        raise ConfigError(f"--png needs kaleido: {_INSTALL}") from None
    if not Chromium.find_browser(skip_local=False):
        raise ConfigError(
            "--png needs Chromium or Chrome: install one (apt install chromium), or run plotly_get_chrome"
        )


def write_html(path: Path, drawn: Sequence[Drawn], together: Sequence[Figures]) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    model = together[0].model
    body = [f"<h1>Evaluation of {html.escape(model)}</h1>", f"<p class=sub>{_summary(together[0], len(drawn))}</p>"]
    if len(drawn) > 1:
        body.append(_table(f"all {len(drawn)} series", together))
    for number, (series, made, rows) in enumerate(drawn):
        body.append(f"<section><h2>{html.escape(f'{series.category}/{series.name}')}</h2>{_table('', rows)}")
        if made.cells is None:
            body.append("<p class=sub>An entity that is watched metric by metric has no one chart.</p></section>")
            continue
        data = figure(series, made).to_json().replace("</", "<\\/")
        body.append(f"<div class=chart id=c{number}></div><script type='application/json' id=d{number}>{data}</script>")
        body.append("</section>")
    notes = "".join(
        f"<dt>{html.escape(one.head)}</dt><dd>{html.escape(one.note)}</dd>" for one in table.columns(together)
    )
    page = _PAGE.format(
        title=html.escape(f"{model}: evaluation"),
        style=_STYLE,
        body="\n".join(body),
        notes=notes,
        plotly=get_plotlyjs(),
        script=_SCRIPT,
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as e:
        raise InputError(f"--report {path}: cannot be written: {e.strerror}") from None


def write_png(path: Path, series: Series, made: Run, rows: Sequence[Figures]) -> None:
    """Write the chart of one series, on white.

    Raises:
        ConfigError: there is no browser to draw it, or it is an entity that is watched metric by metric.
        InputError: the file cannot be written.
    """
    if made.cells is None:
        raise ConfigError(f"--png: {series.name} is watched metric by metric and has no one chart")
    drawing = figure(series, made)
    first = rows[0]
    drawing.update_layout(
        template="plotly_white",
        title=f"{series.category}/{series.name} · {first.model} · " + _summary(first, 1),
        margin={"t": 90},
    )
    try:
        image = drawing.to_image(format="png", width=_PNG_SIZE[0], height=_PNG_SIZE[1], scale=1)
    except Exception as e:  # kaleido raises what its browser meets
        raise ConfigError(f"--png {path}: the browser could not draw it: {e}") from None
    try:
        path.write_bytes(image)
    except OSError as e:
        raise InputError(f"--png {path}: cannot be written: {e.strerror}") from None


def figure(series: Series, made: Run) -> go.Figure:
    """Return the chart of a series: values above, scores below, on one axis of time."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    cells = made.cells
    assert cells is not None
    at = thinned(cells.value, cells.score, cells.anomaly)
    time = _times(cells.timestamp_ms[at])
    value, expected = cells.value[at], cells.expected[at]
    chart = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[0.66, 0.34])

    def line(y: Float64Array, name: str, colour: str, row: int, **style: Any) -> None:
        chart.add_trace(
            go.Scatter(x=time, y=y, name=name, mode="lines", line={"color": colour, "width": 1.3, **style}), row, 1
        )

    if np.isfinite(expected).any():
        _band(chart, time, *(_within_sight(one[at], value) for one in (cells.lower, cells.upper)))
        line(expected, "expected", _EXPECTED, 1, dash="dot")
    line(value, "value", _VALUE, 1)
    if np.isnan(value).mean() > _SPARSE:  # a point between two missing ones is on no line
        chart.update_traces(mode="lines+markers", marker={"size": 3}, selector={"name": "value"})
    missing = np.isnan(value) & np.isfinite(expected)
    _dots(
        chart, time[missing], expected[missing], "completed", {"symbol": "circle-open", "color": _COMPLETED, "size": 5}
    )
    alarm = cells.anomaly[at]
    _dots(chart, time[alarm], value[alarm], "above threshold", {"color": _ALARM, "size": 5})
    _openings(chart, made)
    score = cells.score[at]
    line(score, "score", _SCORE, 2)
    line(cells.threshold[at], "threshold", _THRESHOLD, 2, dash="dash")
    _dots(chart, time[alarm], score[alarm], "", {"color": _ALARM, "size": 5}, row=2)
    _shade(chart, series)
    positive = score[np.isfinite(score) & (score > 0)]
    wide = len(positive) > 0 and positive.max() > _WIDE * np.median(positive)
    chart.update_yaxes(title_text=series.name if len(series.name) < 30 else "value", row=1, col=1)
    chart.update_yaxes(title_text="score", type="log" if wide else "linear", row=2, col=1)
    if wide:  # what lies below the typical score says nothing
        limit = cells.threshold[at]
        top = max(float(positive.max()), float(np.max(limit, where=np.isfinite(limit), initial=0.0)))
        top = min(top, _WIDE * float(positive.max()))
        span = [float(np.log10(np.median(positive))) - 1.0, float(np.log10(top)) + 0.2]
        chart.update_yaxes(range=span, row=2, col=1)
    drawn = (
        "every point"
        if len(at) == len(cells.value)
        else f"{len(at):,} of {len(cells.value):,} points, no extreme left out"
    )
    chart.update_layout(
        height=560,
        hovermode="x unified",
        margin={"l": 70, "r": 20, "t": 40, "b": 40},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        annotations=[
            {
                "text": drawn,
                "xref": "paper",
                "yref": "paper",
                "x": 1,
                "y": -0.09,
                "showarrow": False,
                "font": {"size": 11},
            }
        ],
    )
    return chart


def thinned(value: Float64Array, score: Float64Array, alarm: BoolArray, most: int = DRAWN_MAX) -> Int64Array:
    """Return which cells are drawn, rising: all, or the extremes of each bucket, both ends and every alarm.

    Args:
        value: (N,), NaN where missing.
        score: (N,), NaN where there is none.
        alarm: (N,).
        most: cells up to which all are drawn, and about how many stay of more.
    """
    n = len(value)
    if n <= most:
        return np.arange(n)
    edges = np.linspace(0, n, most // 3 + 1).astype(np.int64)
    kept = [np.array([0, n - 1]), np.flatnonzero(alarm)]
    for array, best in ((value, np.nanargmax), (value, np.nanargmin), (score, np.nanargmax)):
        kept.append(
            np.array([
                first + int(best(array[first:last]))
                for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
                if not np.isnan(array[first:last]).all()
            ], np.int64)
        )  # fmt: skip
    return np.unique(np.concatenate(kept)).astype(np.int64)


def _band(chart: go.Figure, time: Any, low: Float64Array, high: Float64Array) -> None:
    """Shade the normal band, a polygon for each stretch in which it is known."""
    import plotly.graph_objects as go

    x, y = list[str | None](), list[float | None]()
    first, last = segments(np.isfinite(low) & np.isfinite(high))
    for begin, end in zip(first.tolist(), (last + 1).tolist(), strict=True):
        along = time[begin:end].tolist()
        if end - begin < 2:  # one point has no area
            continue
        x += [*along, *reversed(along), None]
        y += [*high[begin:end].tolist(), *low[begin:end][::-1].tolist(), None]
    band = go.Scatter(
        x=x, y=y, name="normal band", mode="lines", line={"width": 0}, fill="toself", fillcolor=_BAND, hoverinfo="skip"
    )
    chart.add_trace(band, 1, 1)


def _within_sight(edge: Float64Array, value: Float64Array) -> Float64Array:
    """Return an edge of the band, cut where it would leave the values a thin line."""
    known = value[np.isfinite(value)]
    if not len(known):
        return edge
    low, high = float(known.min()), float(known.max())
    room = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-100)
    return np.clip(edge, low - room, high + room)


def _dots(chart: go.Figure, x: Any, y: Any, name: str, marker: dict[str, Any], row: int = 1) -> None:
    import plotly.graph_objects as go

    if len(x):
        dots = go.Scatter(
            x=x,
            y=y,
            name=name or "above threshold",
            mode="markers",
            marker=marker,
            showlegend=bool(name),
            hoverinfo="skip",
        )
        chart.add_trace(dots, row, 1)


def _openings(chart: go.Figure, made: Run) -> None:
    """Mark where incidents were published, with what their events say."""
    import plotly.graph_objects as go

    x, y, text = list[str](), list[float | None](), list[str]()
    for event in made.events:
        if event.type == TYPE_OPENED and isinstance(event.data, EventData):
            x.append(event.time.removesuffix("Z"))
            y.append(event.data.value)
            text.append(f"{event.data.severity}, {event.data.ratio:.3g} × threshold")
    if x:
        marker = {"symbol": "triangle-down", "size": 13, "color": _ALARM, "line": {"width": 1, "color": "white"}}
        # An entity has no one value: its incidents stand at the top.
        at = {"y": y} if all(one is not None for one in y) else {"y": [1.0] * len(x), "yaxis": "y3"}
        chart.add_trace(
            go.Scatter(
                x=x, mode="markers", name="incident opened", marker=marker, text=text, hovertemplate="%{text}", **at
            )
        )
        if "yaxis" in at:
            chart.update_layout(yaxis3={"overlaying": "y", "range": [0, 1.05], "visible": False})


def _shade(chart: go.Figure, series: Series) -> None:
    """Shade labelled segments, in both parts of the chart."""
    label, time = series.label.copy(), series.time_ms
    label[: series.first_record] = False
    order = np.argsort(time, kind="stable")
    label, time = label[order], time[order]
    # A segment of one point would be too thin to see.
    half = max(float(np.median(np.diff(time))) / 2, float(np.ptp(time)) * _NARROWEST / 2) if len(time) > 1 else 0.0
    for number, (first, last) in enumerate(zip(*(one.tolist() for one in segments(label)), strict=True)):
        x0, x1 = (str(one) for one in _times(np.array([time[first] - half, time[last] + half]).astype(np.int64)))
        style = {"type": "rect", "xref": "x", "x0": x0, "x1": x1, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        shown = {"showlegend": True, "name": "labelled"} if not number else {}
        chart.add_shape(**style, **shown, fillcolor=_LABEL, line={"width": 0})


def _times(timestamp_ms: Int64Array) -> Any:
    return timestamp_ms.astype("datetime64[ms]").astype(str)


def _summary(figures: Figures, count: int) -> str:
    said = f"{figures.caught} of {counted(figures.segments, 'labelled segment')} caught"
    weeks = f"{figures.weeks:.1f} weeks of {count} series" if count > 1 else f"{figures.weeks:.1f} weeks"
    return f"{said}, {counted(figures.false_incidents, 'false alarm')} in {weeks}"


def _table(title: str, rows: Sequence[Figures]) -> str:
    shown = table.columns(rows)
    head = "".join(f"<th title='{html.escape(one.note)}'>{html.escape(one.head)}</th>" for one in shown)
    lines = "".join(
        f"<tr{' class=own' if not k else ''}><th>{html.escape(row.model)}</th>"
        + "".join(f"<td>{html.escape(one.cell(row))}</td>" for one in shown)
        + "</tr>"
        for k, row in enumerate(rows)
    )
    head = f"<thead><tr><th>{html.escape(title)}</th>{head}</tr></thead>"
    return f"<div class=wide><table>{head}<tbody>{lines}</tbody></table></div>"


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>
<meta name=color-scheme content='light dark'><title>{title}</title><style>{style}</style></head>
<body><main>{body}<dl>{notes}</dl></main>
<script>{plotly}</script><script>{script}</script></body></html>
"""

_STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#d9dee6;--page:#f6f7f9;--card:#fff;--own:#eef4fb;--grid:#e6e9ee}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#9aa5b4;--line:#323a46;--page:#12161c;--card:#1a2029;
--own:#1d2c3d;--grid:#2a323d}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 20px 60px}h1{font-size:24px;margin:0}h2{font-size:17px;margin:0 0 10px}
.sub{color:var(--soft);margin:2px 0 18px}.wide{overflow-x:auto;margin-bottom:12px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px;margin:18px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--line)}thead th{color:var(--soft);
font-weight:500;font-size:13px}tbody th{text-align:left;font-weight:500}tr.own th,tr.own td{background:var(--own);
font-weight:650}th:first-child{text-align:left;padding-left:8px}.chart{height:560px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;color:var(--soft);font-size:13px}dd{margin:0}
@media(max-width:700px){main{padding:14px 8px}section{padding:12px 8px}}
"""

# Colours follow the reader's scheme, also when it changes.
_SCRIPT = """
const tint = () => { const s = getComputedStyle(document.documentElement), v = n => s.getPropertyValue(n).trim();
  const a = {gridcolor: v('--grid'), zerolinecolor: v('--grid'), linecolor: v('--line')}, out = {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', 'font.color': v('--ink'),
    'hoverlabel.bgcolor': v('--card'), 'hoverlabel.font.color': v('--ink'), 'legend.bgcolor': 'rgba(0,0,0,0)',
    'modebar.bgcolor': 'rgba(0,0,0,0)', 'modebar.color': v('--soft'), 'modebar.activecolor': v('--ink')};
  for (const axis of ['xaxis', 'xaxis2', 'yaxis', 'yaxis2'])
    for (const [k, x] of Object.entries(a)) out[axis + '.' + k] = x;
  return out; };
const drawn = [];
const draw = box => { const f = JSON.parse(document.getElementById('d' + box.id.slice(1)).textContent);
  delete f.layout.template;
  Plotly.newPlot(box, f.data, f.layout, {responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ['select2d', 'lasso2d']})
    .then(() => Plotly.relayout(box, tint()));
  drawn.push(box); };
const seen = new IntersectionObserver(entries => { for (const e of entries) if (e.isIntersecting) {
  seen.unobserve(e.target); draw(e.target); } }, {rootMargin: '400px'});
document.querySelectorAll('.chart').forEach(box => seen.observe(box));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change',
  () => drawn.forEach(box => Plotly.relayout(box, tint())));
"""
