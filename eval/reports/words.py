"""What a report calls benchmarks, figures, prompts and intervals; its JSON form keeps the identifiers."""

from __future__ import annotations

_TASKS = {
    "vqav2": "VQA v2",
    "gqa": "GQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "scienceqa": "ScienceQA",
    "mme": "MME",
    "mmbench": "MMBench",
    "vizwiz": "VizWiz",
    "seedbench": "SEED-Bench",
    "mmvet": "MM-Vet",
    "daquar": "DAQUAR",
    "easy_vqa": "easy-VQA",
}
_PROMPTS = {"llava-1.5": "LLaVA-1.5's prompts", "bare": "the bare question"}
# What stands before the first slash of a breakdown: the rest is the benchmark's own name.
_BREAKDOWNS = (
    *("answer_type", "question_type", "structural", "semantic", "subject", "type", "l2_category"),
    *("category", "split"),
)
_RULES = {"llava": "LLaVA's rule", "strict": "exact word"}
_FIGURES = {
    "f1": "F1",
    "yes_no": "yes or no",
    "yes_ratio": "share of yes",
    "accuracy_plus": "accuracy+",
    "img_accuracy": "accuracy with a picture",
    "top1": "top 1",
    "top5": "top 5",
}
_METHODS = {"wilson": "Wilson's interval", "wilson over pictures": "Wilson's interval over pictures"}


def name_task(task: str) -> str:
    """A benchmark; an unknown one by its own name."""
    return _TASKS.get(task, task)


def name_prompts(protocol: str | None) -> str:
    """A prompt protocol; None for answers that do not tell theirs."""
    if protocol is None:
        return "prompts unknown (rescored)"
    return _PROMPTS.get(protocol, f"{protocol} prompts")


def name_figure(figure: str) -> str:
    """A figure: `llava/mean/f1` is "LLaVA's rule: mean F1", `answer_type/yes/no` "answer type: yes/no"."""
    head, slash, rest = figure.partition("/")
    if slash and head in _BREAKDOWNS:
        return f"{_plain(head)}: {_plain(rest)}"
    if slash and head in _RULES:
        return f"{_RULES[head]}: {name_figure(rest)}"
    return " ".join(_FIGURES.get(part, _plain(part)) for part in figure.split("/"))


def name_interval(method: str) -> str:
    """How an interval was made."""
    return _METHODS.get(method, method)


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("@", " @ ")


def say_times(base: float, value: float, digits: int, less: str = "less", more: str = "more") -> str:
    """How many times less, or more, something takes than a baseline does.

    Args:
        base: What the baseline takes, above 0.
        value: What it takes itself, above 0.
        digits: Behind the point.
        less: The word for less.
        more: The word for more.
    """
    ratio, word = (base / value, less) if value <= base else (value / base, more)
    return f"{ratio:.{digits}f}× {word}"
