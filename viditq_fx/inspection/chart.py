"""What the charts of the page share: the frame of an SVG, its colours in light and dark, and small shapes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CHAR = 6.1
"""Width of a character of the charts' text, in pixels."""
LEVELS = (1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0)
"""Between the colours of a heat map of ratios: below the first nothing stands out, from 5 a channel is named."""
_HEAT_LIGHT = ("#eef1f5", "#fdebd3", "#fbd3a5", "#f6b36f", "#ea8b42", "#d2611f", "#a8420f", "#6f2706")
_HEAT_DARK = ("#242a32", "#3d2f22", "#5b3d22", "#7f4f22", "#a96424", "#d27e35", "#f2a25f", "#ffd0a1")
_LIGHT = {"text": "#1d2129", "soft": "#5a6270", "rule": "#b4bac4", "track": "#eef1f5", "bar": "#2f62b5"}
_LIGHT |= {"loud": "#b23c0e", "high": "#2f62b5", "low": "#3fa76c"}
_DARK = {"text": "#e6e8ec", "soft": "#a2a9b6", "rule": "#4d5562", "track": "#242a32", "bar": "#7fa8ea"}
_DARK |= {"loud": "#f0a07c", "high": "#7fa8ea", "low": "#6fcf97"}


def level(value: float) -> int:
    """Index of the colour of a ratio."""
    return sum(value >= edge for edge in LEVELS)


def frame(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """A stand-alone SVG picture around `parts`, light or dark as the reader's browser is."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="vq-chart" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" style="min-width:{0.8 * width:.0f}px">'
    )
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>{_style()}</style>", *parts, "</svg>"]
    )


def text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start", tip: str = "") -> str:
    """One line of text; `y` is its baseline."""
    told = f"<title>{escape(tip)}</title>" if tip else ""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{told}{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    """A filled rectangle, with a tooltip."""
    shape = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f"<rect {shape}><title>{escape(tip)}</title></rect>" if tip else f"<rect {shape}/>"


def rule(x: float, y: float, to_x: float, to_y: float, kind: str = "rule") -> str:
    """A thin line."""
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f} L{to_x:.1f} {to_y:.1f}"/>'


def _style() -> str:
    base = (
        ".vq-chart{font:11px system-ui,sans-serif}.vq-chart .path{font:11px ui-monospace,Menlo,Consolas,monospace}"
        ".vq-chart .head{font-weight:600}.vq-chart path{fill:none;stroke-width:1}"
        ".vq-chart .dashed,.vq-chart .limit{stroke-dasharray:3 3}.vq-chart .limit{stroke-width:1.5}"
        ".vq-chart .sum{stroke-width:1.5}"
    )
    dark = _themed(_DARK, _HEAT_DARK)
    return f"{base}{_themed(_LIGHT, _HEAT_LIGHT)}@media (prefers-color-scheme:dark){{{dark}}}"


def _themed(colours: dict[str, str], heat: Sequence[str]) -> str:
    scope = ".vq-chart"
    rules = [f"{scope} text{{fill:{colours['text']}}}{scope} .soft{{fill:{colours['soft']}}}"]
    rules += [
        f"{scope} rect.{kind}{{fill:{colours[kind]}}}" for kind in ("track", "bar", "loud", "high", "low")
    ]
    rules += [f"{scope} circle.{kind}{{fill:{colours[kind]}}}" for kind in ("high", "low")]
    rules += [
        f"{scope} .rule,{scope} .dashed{{stroke:{colours['rule']}}}{scope} .sum{{stroke:{colours['soft']}}}"
    ]
    rules += [
        f"{scope} .limit{{stroke:{colours['loud']}}}{scope} text.limit{{fill:{colours['loud']};stroke:none}}"
    ]
    rules += [f"{scope} rect.heat{index}{{fill:{colour}}}" for index, colour in enumerate(heat)]
    return "".join(rules)
