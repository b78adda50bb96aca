"""Finished runs as one page that needs no network.

python -m eval.report RUN... -o report.html

A RUN is a folder of eval.run, eval.quickstart or eval.pareto, a JSON file of eval.rescore, eval.zeroshot,
eval.retrieval, eval.knn, eval.probe or eval.agreement, or the JSON lines of eval.cost. LABEL=RUN gives it a
name. The first run of a benchmark is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from eval.answers import InputError
from eval.outputs import check_output, write_output
from eval.provenance import describe_origin
from eval.reports.content import Content, build_content, to_values
from eval.reports.examples import load_settings_of
from eval.reports.eyes import Eyes, load_eyes
from eval.reports.inputs import read_sources
from eval.reports.markdown import build_markdown
from eval.reports.page import build_page

_FORMS = {".html": "HTML", ".md": "Markdown", ".json": "JSON"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        outputs = list_outputs(options.output, options.markdown, options.json)
        if options.examples < 0:
            raise InputError("--examples must be at least 0.")
        written = make_report(options, outputs, words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, size in written.items():
        print(f"{path}  {size / 1e3:,.0f} kB")
    return 0


def _parser() -> argparse.ArgumentParser:
    head, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=head, epilog=rest.partition("\n\n")[2]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's folder or file; LABEL=RUN")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the report: .html, .md or .json, by its suffix"
    )
    parser.add_argument("--markdown", type=Path, help="write it in Markdown too")
    parser.add_argument("--json", type=Path, help="write it as JSON too")
    parser.add_argument("--title", default="What fewer tokens keep, and what they save", help="of the page")
    parser.add_argument(
        "--examples", type=int, default=3, help="questions shown of each outcome (default 3; 0 for none)"
    )
    parser.add_argument(
        "--no-rois", action="store_true", help="photographs alone; the models need not be there then"
    )
    return parser


def list_outputs(output: Path, markdown: Path | None = None, values: Path | None = None) -> dict[Path, str]:
    """Files to write and their forms.

    Raises:
        InputError: If a suffix names no form, a folder is in the way, or a file is named twice.
    """
    if output.suffix.lower() not in _FORMS:
        raise InputError(f"-o {output}: the name must end in {', '.join(_FORMS)}.")
    named = [(output, _FORMS[output.suffix.lower()])]
    named += [(markdown, "Markdown")] if markdown is not None else []
    named += [(values, "JSON")] if values is not None else []
    outputs: dict[Path, str] = {}
    for path, form in named:
        if path in outputs:
            raise InputError(f"{path} is named twice.")
        check_output(path, "The report")
        outputs[path] = form
    return outputs


def make_report(
    options: argparse.Namespace, outputs: dict[Path, str], words: Sequence[str]
) -> dict[Path, int]:
    """Reads the runs, makes the report in all forms and writes them.

    Returns:
        Bytes by file.

    Raises:
        InputError: If a run cannot be used; nothing is written then.
    """
    sources = read_sources(options.runs)
    for path in outputs:
        check_output(path, "The report", [file for source in sources for file in source.files])
    settings = {key: str(value) for key, value in vars(options).items()}
    origin = describe_origin("eval.report", words, settings)
    with tqdm(desc="report", disable=None, bar_format="{desc}: {postfix}") as bar:
        show: Callable[[str], object] = lambda name: bar.set_postfix_str(name)  # noqa: E731
        content = build_content(sources, options.title, origin, options.examples, show)
        makers: dict[str, Callable[[], str]] = {
            "HTML": lambda: build_page(content, {} if options.no_rois else open_eyes(content, show)),
            "Markdown": lambda: build_markdown(content),
            "JSON": lambda: json.dumps(to_values(content), indent=1, ensure_ascii=False) + "\n",
        }
        made = {path: makers[form]() for path, form in outputs.items()}
    for path, text in made.items():
        write_output(path, text, "The report")
    return {path: len(text.encode()) for path, text in made.items()}


def open_eyes(content: Content, show: Callable[[str], object] = lambda name: None) -> dict[int, Eyes]:
    """The eyes of all runs whose examples are shown, as far as they are SparseFormers.

    Raises:
        InputError: If a model is not where its run found it.
    """
    eyes: dict[int, Eyes] = {}
    for benchmark in content.benchmarks:
        shown = {given.source for group in benchmark.groups for given in group.shown[0].answers}
        for run in (run for run in benchmark.runs if run.number in shown):
            show(f"regions of {run.label}")
            try:
                found = load_eyes(load_settings_of(run).model)
            except InputError as error:
                raise InputError(f"{error}; --no-rois leaves them out.") from None
            if found is not None:
                eyes[run.number] = found
    return eyes


if __name__ == "__main__":
    sys.exit(main())
