"""What users read: the README is short, links lead somewhere; options, files and tests that are named are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from conftest import REPOSITORY
from w2v_export import cli as export
from w2v_runtime.commands import doctor, embed, merge, models

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
APPS = {"w2v-export": export, "w2v-embed": embed, "w2v-merge": merge, "w2v-models": models, "w2v-doctor": doctor}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
#: What an inline word of code or a line of a shell begins with whose options are not ours.
OTHERS = ("pip ", "python ", ".venv/", "mypy ", "find ", "make ")


def options(command: str) -> set[str]:
    """The long options of a command and of what it has below it."""
    root = typer.main.get_command(APPS[command].app)
    below = getattr(root, "commands", {}).values()
    names = {name for part in (root, *below) for parameter in part.params for name in parameter.opts}
    return {name for name in names if name.startswith("--")} | {"--help"}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def code(page: Path) -> list[str]:
    """Lines of shell, and words of code between backticks."""
    text = page.read_text(encoding="utf-8")
    shell = [line for language, block in FENCE.findall(text) if language == "sh" for line in block.splitlines()]
    return [*shell, *re.findall(r"`([^`\n]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page, but for those on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"https?:", target)]


def test_the_readme_is_short_and_says_how_to_try_it():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "make demo" in text
    assert "make test" in text


def test_every_page_can_be_reached_from_the_readme():
    pages = {(README.parent / target.partition("#")[0]).resolve() for target in links(README)}
    assert not set(PAGES) - {README} - pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        file, _, heading = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not heading or heading in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_that_are_named_exist(page):
    rooms = "|".join(path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in re.findall(rf"`((?:{rooms})/[\w./-]+)`", prose(page)):
        assert (REPOSITORY / name).exists() or "NAME" in name, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_are_those_of_the_commands(page):
    """After a command its own, alone those of any of the five."""
    every = {name for command in APPS for name in options(command)}
    for words in code(page):
        if words.startswith(OTHERS):
            continue
        for part in re.split(r"(?=w2v-[a-z]+(?: |$))|[|;]", words):
            known = options(part.split()[0]) if part.split()[:1] and part.split()[0] in APPS else every
            assert set(OPTION.findall(part)) <= known, words
    assert not set(OPTION.findall(re.sub(r"`[^`\n]+`", "", prose(page)))), "options stand in backticks"


def test_every_option_of_embed_is_described():
    told = {name for page in PAGES for words in code(page) for name in OPTION.findall(words)}
    assert options("w2v-embed") - told <= {"--version"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_code_are_of_a_language_and_python_compiles(page):
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        assert language in ("sh", "python")
        if language == "python":
            compile(block, page.name, "exec")


def test_the_tests_that_hold_a_promise_exist():
    """In a line of docs/reliability.md, a function stands behind the file that it is in."""
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = 0
    for line in text.splitlines():
        source = None
        for file, function in re.findall(r"`(?:tests/)?((?:fuzz/)?test_\w+\.py)`|`(test_\w+)`", line):
            if file:
                source = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
            else:
                assert source is not None, line
                assert re.search(rf"^def {function}\(", source, re.MULTILINE), function
            found += 1
    assert found > 100
