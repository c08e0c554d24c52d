"""The pages of the repository as the tests of the documentation see them: blocks with their tags, links, command lines."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("text", "toml")
"""What a block may be besides commands: output or a picture made of letters, and files of settings."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a page, indented ones with an empty tag."""

    page: str
    line: int
    info: str
    text: str

    @property
    def tag(self) -> str:
        """What follows the language: run, lint, `not-run: reason`; of TOML the file's name, or `part of` it."""
        return self.info.partition(" ")[2].strip()

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def fault(self) -> str | None:
        """Why the block is not tagged as it must be."""
        if self.language == "sh":
            good = self.tag in {"run", "lint"} or re.fullmatch(r"not-run: \S.+", self.tag)
            return None if good else "a block of commands says run, lint or not-run: reason"
        return None if self.language in PLAIN else "a block is sh, text or toml"


def pages() -> list[str]:
    """Return every page of the repository, also one that is new and not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    if (ROOT / ".git").exists():
        found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    else:
        found = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if not path.is_relative_to(ROOT / ".venv")]
    return sorted(name for name in set(found) if (ROOT / name).exists())


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_in(text: str, page: str = "page.md") -> list[Block]:
    return [
        Block(page, (token.map or [0])[0] + 1, token.info.strip(), token.content)
        for token in MarkdownIt().parse(text)
        if token.type in {"fence", "code_block"}
    ]


def blocks_of(page: str) -> list[Block]:
    return blocks_in(text_of(page), page)


def links_in(text: str) -> Iterator[str]:
    """Yield the targets of links and pictures."""
    for token in _inline(text):
        if target := token.attrGet("href") or token.attrGet("src"):
            yield str(target)


def spans_in(text: str) -> Iterator[str]:
    """Yield what stands in backticks."""
    yield from (token.content for token in _inline(text) if token.type == "code_inline")


def _inline(text: str) -> Iterator[Token]:
    for token in MarkdownIt().enable("table").parse(text):
        yield from token.children or ()


def anchors_in(text: str) -> set[str]:
    """Return the names by which headings can be linked to, as the forges make them."""
    tokens = MarkdownIt().parse(text)
    heads = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words of each command; comments and redirections are left out, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in (given := iter(lexer)):
            if word in {"|", "||", "&", "&&", ";"}:
                yield from [words] if words else []
                words = []
            elif word in {">", ">>", "<", ">&"}:
                next(given, None)
            else:
                words.append(word)
        yield from [words] if words else []


def program_in(words: list[str], programs: dict[str, click.Command]) -> tuple[str, list[str]] | None:
    """Return the program that a command line starts, and its arguments; None for one that is not ours."""
    for at, word in enumerate(words):
        name = word.removeprefix(".venv/bin/").removeprefix("/opt/icmoe/.venv/bin/")
        if word == "-m" and words[at + 1 :] and words[at + 1].startswith("simulations"):
            return words[at + 1], words[at + 2 :]
        if name in programs or name.startswith(("simulations/run_sim", "simulations/ablation")):
            return name, words[at + 1 :]
    return None


def mistake(words: list[str], programs: dict[str, click.Command]) -> str | None:
    """Return what is wrong with a command line that starts one of our programs: a command or option that does not exist."""
    found = program_in(words, programs)
    if found is None:
        return None
    name, rest = found
    if name not in programs:
        return f"there is no {name}"
    try:
        _parse(programs[name], rest, click.Context(programs[name], info_name=name))
    except click.UsageError as error:
        return f"{shlex.join(words)}: {error.format_message()}"
    return None


def _parse(command: click.Command, words: list[str], context: click.Context) -> None:
    """Parse as Click does, but convert no value: the files of a guide need not exist, and RUN may stand for a number."""
    given, left, _ = command.make_parser(context).parse_args(list(words))
    if given.get("help"):
        return
    if isinstance(command, click.Group):
        if left:
            _, found, rest = command.resolve_command(context, left)
            assert found is not None
            _parse(found, rest, click.Context(found, parent=context, info_name=left[0]))
        return
    if left:
        raise click.UsageError(f"one word too many: {left[0]}", context)
    for parameter in command.params:
        value = given.get(str(parameter.name))
        if parameter.required and not (isinstance(value, str | tuple | list) and value):
            raise click.MissingParameter(ctx=context, param=parameter)
