"""The benchmarks, one file each; `load_task` finds them by name."""

from __future__ import annotations

import difflib
from importlib import import_module

from eval.answers import InputError
from eval.task import Task

_TASKS = {
    "vqav2": "eval.tasks.vqav2:VqaV2",
    "gqa": "eval.tasks.gqa:Gqa",
    "textvqa": "eval.tasks.textvqa:TextVqa",
    "pope": "eval.tasks.pope:Pope",
    "scienceqa": "eval.tasks.scienceqa:ScienceQa",
    "mme": "eval.tasks.mme:Mme",
    "mmbench": "eval.tasks.mmbench:MmBench",
    "vizwiz": "eval.tasks.vizwiz:VizWiz",
    "seedbench": "eval.tasks.seedbench:SeedBench",
    "mmvet": "eval.tasks.mmvet:MmVet",
    "daquar": "eval.tasks.daquar:Daquar",
    "easy_vqa": "eval.tasks.easy_vqa:EasyVqa",
    "scenes": "eval.tasks.scenes:Scenes",
}


def list_tasks() -> list[str]:
    """Names of all benchmarks."""
    return list(_TASKS)


def load_task(name: str) -> Task:
    """Makes a benchmark by name; case, "-" and "_" do not matter.

    Raises:
        InputError: If there is none of that name; says which spelling is nearest.
    """
    plain = {known.replace("_", ""): known for known in _TASKS}
    wanted = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    if wanted not in plain:
        near = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.0)
        raise InputError(
            f"There is no benchmark {name!r}; did you mean {plain[near[0]]!r}? All: {', '.join(_TASKS)}."
        )
    module, _, attribute = _TASKS[plain[wanted]].partition(":")
    task: Task = getattr(import_module(module), attribute)()
    return task
