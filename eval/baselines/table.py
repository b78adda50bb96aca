"""The table of a comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.baselines.combine import OURS

LABELS = {
    OURS: "SparseFormer (ours)",
    "vit": "full ViT",
    "pool": "average pooling",
    "visionzip": "VisionZip",
    "prumerge": "PruMerge",
    "tome": "ToMe",
    "resampler": "resampler (trained)",
    "random": "random patches",
    "no-image": "none: trained without pictures",
}
_HEADS = (
    "tower",
    "visual tokens",
    "accuracy, %",
    "95 %, pictures",
    "single trainings, %",
    "ours minus it, points",
    "bits gained by seeing",
    "tower, GMACs",
    "projector + prefill, GMACs",
    "total, GMACs",
    "tower, ms",
    "to the first word, ms",
)


def name_method(method: str) -> str:
    """What a method is called; one without words of its own by its name."""
    return LABELS.get(method, method)


def write_table(results: Sequence[dict[str, Any]], primary: str, skipped: Sequence[str]) -> str:
    """One line a point, the cheapest first, and what was not applicable.

    Args:
        results: Of `combine`, with "gmacs" and "ms".
        primary: The figure to show.
        skipped: Points that cannot be, with reasons.
    """
    lines = [_row(_HEADS), _row(["---"] * len(_HEADS))]
    for result in sorted(results, key=lambda result: result["gmacs"]["total"]):
        macs, ms = result["gmacs"], result["ms"]
        label = name_method(result["method"])
        lines.append(
            _row(
                [
                    f"**{label}**" if result["method"] == OURS else label,
                    str(result["tokens"]),
                    *_accuracy(result["figures"][primary]),
                    _difference(result.get("ours_minus")),
                    _bits(result.get("gain")),
                    f"{macs['tower']:.3f}",
                    f"{macs['projector'] + macs['prefill']:.3f}",
                    f"{macs['total']:.3f}",
                    f"{ms['tower']:.1f}",
                    f"{ms['total']:.1f} ({ms['quartiles'][0]:.1f} to {ms['quartiles'][1]:.1f})",
                ]
            )
        )
        wrong = result.get("random-picture")
        if wrong is not None:
            cells = [
                f"{label}, wrong picture",
                str(result["tokens"]),
                *_accuracy(wrong["figures"][primary]),
                "",
            ]
            lines.append(_row([*cells, _bits(wrong.get("gain")), *[""] * 5]))
    count = results[0]["figures"][primary]
    lines += ["", f"{count['n']} questions about {count['pictures']} pictures."]
    if skipped:
        lines += ["", "Not applicable: " + "; ".join(skipped) + "."]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _accuracy(figure: dict[str, Any]) -> list[str]:
    single = figure["by_seed"]
    return [
        f"{figure['value']:.1f}",
        f"{figure['low']:.1f} to {figure['high']:.1f}",
        ", ".join(f"{value:.1f}" for value in single) if len(single) > 1 else "one",
    ]


def _bits(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['value']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f})"


def _difference(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['value']:+.1f} ({figure['low']:+.1f} to {figure['high']:+.1f})"
