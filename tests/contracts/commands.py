"""Finds the commands that documents tell people to type, and takes them apart."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^( *)```(?:bash|sh|shell|console)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_LAUNCH = re.compile(r"^# Launch: (.*(?:\n#  .*)*)", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Z_0-9]+=.*")


@dataclass(frozen=True)
class Command:
    """One command of a document.

    Attributes:
        place: Where it stands.
        words: The command as the shell would split it, without leading VARIABLE=value.
    """

    place: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """The first word."""
        return self.words[0]

    @property
    def module(self) -> str | None:
        """The Python module that is run: by python, torchrun, deepspeed or accelerate."""
        if Path(self.program).name in ("python", "python3", "torchrun", "deepspeed", "accelerate"):
            for flag, name in zip(self.words, self.words[1:], strict=False):
                if flag in ("-m", "--module"):
                    return name
        return None

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the module's name."""
        return self.words[self.words.index(self.module) + 1 :] if self.module else self.words[1:]

    @property
    def flags(self) -> list[str]:
        """The module's own flags, without their values."""
        return [word.partition("=")[0] for word in self.arguments if re.match(r"--?[A-Za-z]", word)]


def read_document(path: Path, place: str) -> list[Command]:
    """All commands in a Markdown file's fenced shell blocks, or in a configuration's `# Launch:` line."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        blocks = [match.group(2) for match in _FENCE.finditer(text)]
    else:
        blocks = [match.group(1).replace("\n#", "\n") for match in _LAUNCH.finditer(text)]
    return [command for block in blocks for command in split_commands(block, place)]


def split_commands(block: str, place: str) -> list[Command]:
    """Takes a block of shell lines apart; a `$ ` prompt makes lines without one output."""
    lines = block.replace("\\\n", " ").splitlines()
    if any(line.lstrip().startswith("$ ") for line in lines):
        lines = [line.lstrip()[2:] for line in lines if line.lstrip().startswith("$ ")]
    commands = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("&|;"):
                words.append(word)
                continue
            while words and (_ASSIGNMENT.fullmatch(words[0]) or words[0] == "env"):
                words.pop(0)
            if words:
                commands.append(Command(place, tuple(words)))
            words = []
    return commands
