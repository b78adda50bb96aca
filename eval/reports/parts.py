"""Pieces of HTML that several sections need."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from eval.reports.inputs import Source
from eval.reports.words import name_figure

_MARKED = '<tr class="marked">'


def esc(value: object) -> str:
    """Text as HTML."""
    return html.escape(str(value))


def figure_name(name: str) -> str:
    """A figure in words as HTML; its identifier, as the JSON form has it, shows under the pointer."""
    words = name_figure(name)
    return esc(words) if words == name else f'<span title="{esc(name)}">{esc(words)}</span>'


def show_p(p: float) -> str:
    """A p value as one reads it."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def anchor(words: str) -> str:
    """A name for a place in the page."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "part"


def ref(number: int) -> str:
    """A small link to where a figure comes from."""
    return f'<a class="ref" href="#source-{number}" title="where this comes from">{number}</a>'


def named(source: Source) -> str:
    """A source's label with its link."""
    return f"{esc(source.label)}{ref(source.number)}"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "", marked: int | None = None
) -> str:
    """A table that scrolls sideways where the page is narrow.

    Args:
        head: Cells of HTML.
        rows: The same.
        css: Classes of the table.
        marked: Row to set off, by number.
    """

    def line(cells: Sequence[str], number: int) -> str:
        first = f'<th scope="row">{cells[0]}</th>'
        rest = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        return f"{_MARKED if number == marked else '<tr>'}{first}{rest}</tr>"

    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(line(row, number) for number, row in enumerate(rows))
    return (
        f'<div class="wide" tabindex="0"><table class="{css}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure_cell(figure: Mapping[str, Any] | None) -> str:
    """A figure over its interval."""
    if figure is None:
        return '<span class="none">–</span>'
    places = 2 if figure.get("unit", "%") == "%" else 1
    value = f'<span class="value">{figure["value"]:.{places}f}</span>'
    if figure.get("low") is None or figure.get("high") is None:
        return f'{value}<span class="interval">undefined</span>'
    return f'{value}<span class="interval">{figure["low"]:.{places}f} – {figure["high"]:.{places}f}</span>'


def notes(lines: Sequence[str]) -> str:
    """Remarks below a table, from plain text."""
    items = "".join(f"<li>{esc(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def signed(value: float, places: int = 1) -> str:
    """A difference with its sign; a true minus."""
    text = f"{value:+.{places}f}"
    return text.replace("-", "−") if float(text) else f"±{abs(value):.{places}f}"


def chart(drawing: str, caption: str = "") -> str:
    """A drawing with what is below it."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="plot">{drawing}{below}</figure>'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Colours and their names: (class, name)."""
    entries = "".join(
        f'<li class="{css}"><svg class="key" viewBox="0 0 14 14" aria-hidden="true">'
        f'<rect class="bar" x="1" y="1" width="12" height="12" rx="2"/></svg>{esc(name)}</li>'
        for css, name in items
    )
    return f'<ul class="legend">{entries}</ul>'


def embed(picture: Image.Image, side: int = 480) -> str:
    """A picture as a data address: small ones as they are, others reduced to JPEG.

    Args:
        picture: RGB.
        side: Its longer side at most, in pixels.
    """
    buffer = io.BytesIO()
    if max(picture.size) <= 160:
        picture.save(buffer, "PNG")
        kind = "png"
    else:
        reduced = picture.copy()
        reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
        reduced.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def section(title: str, lead: str, body: str) -> str:
    """A part of the page."""
    name = anchor(title)
    first = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}"><h2><a href="#{name}">{esc(title)}</a></h2>{first}{body}</section>'
