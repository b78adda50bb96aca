"""What is read of a record, key by key, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.answers import InputError
from eval.compare import GROUPS, QUESTIONS
from eval.shapes import (
    MisfitError,
    Shape,
    by_name,
    count,
    each,
    fields,
    flag,
    maybe,
    number,
    refuse_infinite,
    text,
)

_ANY = number()
_COST = number(least=0)
_MORE = number(above=0)
_ORIGIN = fields(
    command=text, commit=text, config_sha256=text, versions=by_name(text), date=text, device=maybe(text)
)
_SPAN = fields(value=_ANY, low=_ANY, high=_ANY)
_FIGURE = fields(
    value=_ANY,
    n=count,
    low=maybe(_ANY),
    high=maybe(_ANY),
    method=text,
    unit=text,
    protocol=text,
    detail=flag,
)
_ODDITIES = (
    "same_id",
    "unlabelled",
    "missing",
    "unknown",
    "repeated",
    "empty",
    "long",
    "non_latin",
    "reworded",
    "damaged",
)


def _scores(**more: Shape) -> Shape:
    """What eval.run and eval.rescore write alike."""
    return fields(
        {
            **dict.fromkeys(("protocol", "model", "floor"), maybe(text)),
            "visual_tokens": maybe(_COST),
            **dict.fromkeys((GROUPS, QUESTIONS), maybe(by_name(text))),
            "provenance": maybe(_ORIGIN),
        },
        task=text,
        scorer=text,
        primary=text,
        figures=by_name(_FIGURE),
        units=by_name(number(least=0, most=1)),
        coverage=fields(dict.fromkeys(_ODDITIES, fields(count=count)), asked=count, answered=count),
        **more,
    )


_POINT = fields(
    {
        "training": fields(steps=count, batch=count),
        "seeds": each(_ANY),
        "ours_minus": maybe(_SPAN),
        "random-picture": fields(figures=by_name(fields())),
    },
    method=text,
    tokens=count,
    figures=by_name(fields()),
    gmacs=fields(tower=_COST, total=_MORE),
    ms=fields({"quartiles": each(_ANY, 2)}, total=_MORE),
)
_TIMING = fields(median=_MORE, low=_MORE, high=_MORE, rounds=count)
_MEASURED = fields(
    batch=number(least=1),
    see=_TIMING,
    first_token=_TIMING,
    decode=_TIMING,
    peak_bytes=_COST,
    cache_bytes=_COST,
)
_COUNTS = fields(
    visual_tokens=count,
    tower_parameters=_COST,
    tower_gmacs=_COST,
    projector_gmacs=_COST,
    prefill_gmacs=_COST,
    total_gmacs=_MORE,
    cache_bytes=_MORE,
)
_GAP = fields(difference=_ANY, low=_ANY, high=_ANY, first=_ANY, second=_ANY, p=maybe(number(least=0, most=1)))
# By the kinds of `eval.reports.inputs`.
_SHAPES: dict[str, Shape] = {
    "run": _scores(provenance=_ORIGIN),
    "scores": _scores(),
    "pareto": fields(
        {"protocol": text, "prompt_tokens": count, "skipped": maybe(each(text))},
        task=text,
        scorer=text,
        primary=text,
        points=each(_POINT, 1),
        provenance=_ORIGIN,
    ),
    "cost": fields(
        llm=text,
        words=count,
        dtype=text,
        compiled=flag,
        baseline=text,
        labels=by_name(text),
        counts=by_name(_COUNTS, 1),
        measured=each(by_name(_MEASURED)),
        provenance=_ORIGIN,
    ),
    "encoder": fields(
        command=text,
        protocol=text,
        figures=by_name(by_name(fields(value=_ANY, low=_ANY, high=_ANY, n=count), 1), 1),
        differences=by_name(_GAP),
        notes=each(text),
        provenance=_ORIGIN,
    ),
}


def check_record(kind: str, record: Mapping[str, Any], file: str, command: str) -> None:
    """Sees that a record has everything that is read of its kind.

    Args:
        kind: As in `eval.reports.inputs.KINDS`.
        record: The parsed JSON object.
        file: Where it is, for the message.
        command: What writes such records, for the message.

    Raises:
        InputError: If not; names the file, the key, and what would be right.
    """
    try:
        refuse_infinite(record)
        _SHAPES[kind](record, "")
        if kind == "pareto":
            _check_points(record)
        elif kind == "cost":
            _check_towers(record)
    except MisfitError as error:
        raise InputError(f"{file} is damaged, or of another version of {command}: {error}.") from None


def check_rows(content: Mapping[str, Any], file: str) -> None:
    """Sees that what eval.quickstart wrote names its runs.

    Raises:
        InputError: If not.
    """
    try:
        fields(rows=by_name(fields(), 1))(content, "")
    except MisfitError as error:
        raise InputError(f"{file} is damaged: {error}.") from None


def _check_points(record: Mapping[str, Any]) -> None:
    """Every point has the figure that is drawn, and some point sees."""
    figure = fields({"unit": text, "by_seed": each(_ANY)}, value=_ANY, low=_ANY, high=_ANY, n=count)
    shape = fields(**{record["primary"]: figure})
    for place, point in enumerate(record["points"]):
        shape(point["figures"], f"points[{place}].figures")
        if "random-picture" in point:
            shape(point["random-picture"]["figures"], f"points[{place}].random-picture.figures")
    if all(point["method"] == "no-image" for point in record["points"]):
        raise MisfitError("none of its points has a tower")


def _check_towers(record: Mapping[str, Any]) -> None:
    """Every tower that is counted has a label and clocks, the baseline among them."""
    names = set(record["counts"])
    if record["baseline"] not in names:
        raise MisfitError(f"there are no counts of the baseline {record['baseline']}")
    fields(**dict.fromkeys(sorted(names), text))(record["labels"], "labels")
    for place, part in enumerate(record["measured"]):
        fields(**dict.fromkeys(sorted(names), _MEASURED))(part, f"measured[{place}]")
        if set(part) != names:
            raise MisfitError(f"measured[{place}] has towers that were not counted")
