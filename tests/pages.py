"""Takes the pages of the documentation apart: code, command lines, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
INDENTED = "indented"
"""The language of a block that is indented and not fenced."""


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Attributes:
        page: The page, relative to the repository.
        line: The number of the first line of code.
        section: The heading above it.
        language: What stands behind the opening fence, or `INDENTED`.
        code: What it holds.
    """

    page: str
    line: int
    section: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line in a page, without the prompt, the comment and settings of the environment.

    Attributes:
        place: Page and line.
        words: The command and its arguments.
    """

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place} {' '.join(self.words)}"

    @property
    def name(self) -> str:
        return Path(self.words[0]).name


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    found: list[Block] = []
    section, language, code, start, before = "", "", list[str](), 0, ""
    for number, line in enumerate([*text(page).splitlines(), ""], 1):
        if language == INDENTED and line.strip() and not line.startswith("    "):
            found.append(Block(page, start, section, language, _joined(code)))
            language = ""
        if language and language != INDENTED and line == "```":
            found.append(Block(page, start, section, language, _joined(code)))
            language = ""
        elif language:
            code.append(line)
        elif line.startswith("```"):
            language, code, start = line[3:] or "none", [], number + 1
        elif line.startswith("    ") and not before.strip():
            language, code, start = INDENTED, [line], number
        elif line.startswith("#"):
            section = line.lstrip("# ")
        before = line
    if language == INDENTED:
        found.append(Block(page, start, section, language, _joined(code)))
    elif language:
        raise ValueError(f"{page}:{start}: the block of code does not end")
    return found


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """The inline code of a page, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: str) -> list[str]:
    """The targets of the links of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """The names by which links reach the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(block: Block) -> Iterator[Command]:
    """The command lines of a console block, or of a script."""
    whole = re.sub(r"\\\n\s*", lambda found: " " * len(found[0]) + "\0", block.code)
    number = block.line
    for line in whole.splitlines():
        prompt = block.language == "console"
        if line.startswith("$ ") or (not prompt and line.strip() and not line.startswith("#")):
            yield from command(line.removeprefix("$ ").replace("\0", ""), f"{block.page}:{number}")
        number += 1 + line.count("\0")


def command(line: str, place: str) -> Iterator[Command]:
    """The command of a line, if there is one."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    if words:
        yield Command(place, tuple(words))


def _joined(code: list[str]) -> str:
    return "\n".join(code).rstrip() + "\n"
