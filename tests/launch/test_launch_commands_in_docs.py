"""Every `tenko run` that documents and recipes print is one that the loader takes; every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenko.launch.recipe import bundled, load

ROOT = Path(__file__).parents[2]
VARIABLES = re.compile(r"([A-Z_]+=\S* +)*tenko run ")
"""How a command begins: perhaps with variables of the environment."""


def printed(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the commands of a document, or of a recipe's header: of indented blocks, and between backticks.

    What stands between backticks may break over a line; a block's line that ends in a backslash goes on.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        header = text[: re.search(r"^[^#\n]", text, flags=re.M).start()]  # type: ignore[union-attr]
        text = "".join(f"{line.removeprefix('#').removeprefix(' ')}\n" for line in header.splitlines())
    text = re.sub(r"^ *```.*$", "", text, flags=re.M)  # fences: three backticks would pair with those of the prose
    joined = re.sub(r"\\\n *", lambda match: " " * len(match[0]), text)
    for match in re.finditer(r"^(?: {4,}(?:\$ )?)(?P<line>.*)$|`(?P<span>[^`]+)`", joined, flags=re.M):
        command = " ".join((match["line"] or match["span"]).split())
        if VARIABLES.match(command):
            yield text[: match.start()].count("\n") + 1, command


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*/README.md"))]
COMMANDS = [
    (f"{path.relative_to(ROOT)}:{line}", command)
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("recipes/*.yaml"))]
    for line, command in printed(path)
]


def settings(command: str) -> tuple[str, list[str]]:
    """Recipe and overrides of a command; of what follows the recipe the options, and their values, are left out."""
    words = shlex.split(command, comments=True)
    recipe, *rest = words[words.index("run") + 1 :]
    options = [index for index, word in enumerate(rest) if word.startswith("--")]
    return recipe, [word for i, word in enumerate(rest) if i not in options and i - 1 not in options]


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) >= 30
    assert len({place.split(":")[0] for place, _ in COMMANDS}) >= 10, "documents and recipes"
    assert sum(bool(settings(command)[1]) for _, command in COMMANDS) >= 20, "with overrides"


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_a_printed_command_is_taken(place: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe, overrides = settings(command)
    assert recipe in bundled() or Path(recipe).is_file(), f"{place}: {recipe}: no such recipe"
    assert all("=" in one for one in overrides), f"{place}: {overrides}"
    load(recipe, overrides)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page}: {link}: no such file"
            assert not anchor or anchor in anchors(target), f"{page}: {link}: no such heading"
