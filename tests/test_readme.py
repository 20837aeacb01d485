"""What README.md and CONTRIBUTING.md name exists: files, commands, options, make targets."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hybridk2.cli import SUBCOMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}

# Folders described by one line instead of a line per file.
DESCRIBED_AS_ONE = ("hybridk2/verification", "hybridk2/nano", "csrc/kernels", "tests", "bench")


def tree_entries() -> list[str]:
    """The paths of the tree under "File tree", folders without their slash."""
    block = README.split("## File tree")[1].split("```")[1]
    entries: list[str] = []
    folders: list[str] = []
    for line in block.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        entries.append("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return entries


def source_files() -> Iterator[str]:
    """Every source file that a reader may want to find, relative to the root."""
    for folder in ("hybridk2", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT).as_posix()
            described = inside.startswith(tuple(f"{name}/" for name in DESCRIBED_AS_ONE))
            if path.suffix in (".py", ".cc", ".h") and path.name != "__init__.py" and not described:
                yield inside


@pytest.mark.parametrize("entry", tree_entries())
def test_what_the_tree_names_exists(entry: str) -> None:
    assert list(ROOT.glob(entry)), f"README.md's tree names {entry}, which is not there"


@pytest.mark.parametrize("file", sorted(source_files()))
def test_every_source_file_has_its_line_in_the_tree(file: str) -> None:
    assert {file, file.rsplit(".", 1)[0] + ".*"} & set(tree_entries()), f"{file} has no line"


def code(page: str) -> Iterator[str]:
    """The lines of a page's code blocks and its code spans."""
    for number, part in enumerate(page.split("```")):
        if number % 2:
            yield from part.splitlines()
        else:
            yield from re.findall(r"`([^`\n]+)`", part)


def commands(program: str) -> list[str]:
    found = (line for page in PAGES.values() for line in code(page))
    return sorted({line for line in found if re.match(rf"{program} [a-z-]", line)})


@pytest.mark.parametrize("line", commands("hybridk2"))
def test_every_command_and_option_exists(line: str) -> None:
    _, subcommand, *words = shlex.split(line, comments=True)
    assert subcommand in SUBCOMMANDS
    command = main.get_command(click.Context(main), subcommand)
    assert command is not None
    for word in words:
        if word.startswith("--"):
            assert word in option_names(command), f"hybridk2 {subcommand} has no {word}"


def test_every_option_in_the_tables_exists_and_every_option_is_in_the_page() -> None:
    options: set[str] = set()
    for name in ("chat", "serve"):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        options |= option_names(command)
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `--")]
    tabled = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    assert tabled <= options
    mentioned = set(re.findall(r"--[a-z][a-z-]+", README))
    assert options - {"--help"} <= mentioned


@pytest.mark.parametrize("line", commands("make"))
def test_every_make_target_exists(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert line.split()[1] in targets


def test_every_module_that_a_page_runs_exists() -> None:
    modules = {name for page in PAGES.values() for name in re.findall(r"python -m ([\w.]+)", page)}
    assert "hybridk2" in modules
    for module in modules:
        assert importlib.util.find_spec(module), f"python -m {module}: there is no such module"


def option_names(command: click.Command) -> set[str]:
    context = click.Context(command)
    shown = (
        parameter
        for parameter in command.get_params(context)
        if not getattr(parameter, "hidden", False)
    )
    names = (name for parameter in shown for name in parameter.opts)
    return {name for name in names if name.startswith("--")}
