"""Builds the documentation site: the pages of the repository, and a reference made from the code. Needs no network.

`python scripts/build_docs.py FOLDER` fails on a link, an anchor or an image that leads nowhere, on a page that nothing
leads to, and on anything that a browser would fetch from elsewhere.
"""

import contextlib
import inspect
import io
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import evenkeel
import evenkeel.client
import evenkeel.testing
from evenkeel.backends.worker.config import config_from
from evenkeel.cli.main import main as command_line
from evenkeel.edge.node import edge_json_schema
from evenkeel.serving.config import SCHEMA

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs", "examples", "src/evenkeel/models/README.md")
ELSEWHERE = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']*["'][^>]*>""")


def main() -> None:
    """Makes the tree of pages in a folder that goes away, and builds it strictly."""
    site = Path(sys.argv[1]).resolve()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        for name in PAGES:
            there = pages / name
            there.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, there)
        reference = pages / "docs" / "reference"
        reference.mkdir()
        for name, text in references():
            (reference / f"{name}.md").write_text(text, encoding="utf-8")
        config = Path(folder) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(configuration(pages, site)))
        try:
            build(load_config(str(config), strict=True))
        except Abort as error:
            sys.exit(f"the documentation is not built: {error}")
    fetched = [
        f"{page.relative_to(site)}: {found}"
        for page in site.rglob("*.html")
        for found in ELSEWHERE.findall(page.read_text(encoding="utf-8"))
        if 'rel="canonical"' not in found
    ]
    if fetched:
        sys.exit("pages fetch from elsewhere:\n" + "\n".join(fetched))


def configuration(pages: Path, site: Path) -> dict[str, Any]:
    """Gives the settings of MkDocs; every page stands in the navigation."""
    how_to = sorted((pages / "docs" / "how-to").glob("*.md"))
    systems = sorted((pages / "docs" / "systems").glob("*.md"))
    reference = sorted((pages / "docs" / "reference").glob("*.md"))
    named = {
        "How to": how_to,
        "Reference": reference,
        "What it rests on": systems,
    }
    nav: list[Any] = [{"evenkeel": "README.md"}]
    nav += [{title: [str(page.relative_to(pages)) for page in found]} for title, found in named.items()]
    others = ("docs/performance.md", "docs/security.md", "docs/design.md", "CONTRIBUTING.md", "CHANGELOG.md")
    nav += [{"The project": [*others, "src/evenkeel/models/README.md"]}]
    return {
        "site_name": "evenkeel",
        "docs_dir": str(pages),
        "site_dir": str(site),
        "use_directory_urls": False,  # the site works from a folder, without a server
        "theme": {"name": "readthedocs", "highlightjs": False, "include_homepage_in_sidebar": False},
        "markdown_extensions": ["tables", "fenced_code", "sane_lists", {"toc": {"permalink": False}}],
        "nav": nav,
        "validation": {
            "omitted_files": "warn",
            "absolute_links": "warn",
            "unrecognized_links": "warn",
            "anchors": "warn",
        },
    }


def references() -> Iterator[tuple[str, str]]:
    """Gives the pages that are made from the code."""
    serve = fields_page("The configuration of `evenkeel serve`", SCHEMA.json_schema())
    yield "configuration-serve", serve
    yield "configuration-edge", fields_page("The configuration of `evenkeel edge`", edge_json_schema())
    yield "commands", "# Commands\n\n" + "\n".join(commands(command_line, "evenkeel"))
    yield (
        "python",
        "# Python\n\n"
        + "\n".join(text for module in (evenkeel, evenkeel.client, evenkeel.testing) for text in public_names(module)),
    )


def fields_page(title: str, schema: dict[str, Any]) -> str:
    """Gives a page with a table for each section of a configuration."""
    sections = list(sections_of(schema, "", schema))
    return f"# {title}\n\n" + "\n".join(sections)


def sections_of(schema: dict[str, Any], place: str, whole: dict[str, Any]) -> Iterator[str]:
    """Gives the table of a section, then those of the sections in it."""
    rows, inner = [], []
    for name, field in schema["properties"].items():
        found = section(field, whole)
        if found is not None:
            inner.append((f"{place}{name}", found))
        default = json.dumps(field["default"]) if "default" in field else ""
        cells = (f"`{name}`", kind(field, whole), f"`{default}`" if default else "", field.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    heading = f"## `{place.rstrip('.')}`\n\n" if place else ""
    yield heading + "| field | value | default | what it is for |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    for name, found in inner:
        yield from sections_of(found, f"{name}.", whole)


def section(field: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any] | None:
    """Gives the section that a field may hold."""
    items = field.get("items", {})
    for form in (field, *field.get("anyOf", ()), items, *items.get("anyOf", ())):
        if "$ref" in form:
            return whole["$defs"][form["$ref"].rpartition("/")[2]]
        if "properties" in form:
            return form
    return None


def kind(field: dict[str, Any], whole: dict[str, Any]) -> str:
    """Says what a field may hold, in words."""
    if "anyOf" in field:
        found = dict.fromkeys(kind(one, whole) for one in field["anyOf"] if one.get("type") != "null")
        return "seconds, or a time" if "a time" in found else " or ".join(found)
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "$ref" in field or "properties" in field:
        return "fields"
    if field.get("x-unit"):
        return {"seconds": "a time", "bytes": "a size"}[field["x-unit"]]
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list"}
    low, high = field.get("minimum"), field.get("maximum")
    bounds = "" if low is None else f", at least {low:g}" if high is None else f" from {low:g} to {high:.10g}"
    return words.get(field.get("type", ""), field.get("type", "fields")) + bounds


def commands(command: click.Command, name: str) -> Iterator[str]:
    """Gives the help of a command and of those below it."""
    with click.Context(command, info_name=name, max_content_width=110) as context:
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                yield from commands(command.commands[inner], f"{name} {inner}")
        elif not command.hidden:
            text = worker_help() if name == "evenkeel worker" else command.get_help(context)
            yield f"## {name}\n\n```\n{text.rstrip()}\n```\n"


def worker_help() -> str:
    """Gives the help of a worker, which reads its command line itself."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        config_from(["--help"], "evenkeel worker")
    return said.getvalue()


def public_names(module: Any) -> Iterator[str]:
    """Gives the documentation of a module's public names."""
    yield f"## {module.__name__}\n\n{inspect.cleandoc(module.__doc__ or '')}\n"
    for name in sorted(module.__all__):
        found = getattr(module, name)
        if not callable(found) or not getattr(found, "__doc__", None) or not hasattr(found, "__module__"):
            continue
        yield f"### {name}\n\n```\n{name}{signature(found)}\n```\n\n{described(found)}\n"
        if inspect.isclass(found):
            for inner, method in vars(found).items():
                if not inner.startswith("_") and inspect.isfunction(method) and method.__doc__:
                    yield f"#### {name}.{inner}\n\n```\n{inner}{signature(method)}\n```\n\n{described(method)}\n"


def described(found: Any) -> str:
    """Gives a docstring as Markdown: its arguments and errors as lists."""
    lines, listed = [], False
    for line in (inspect.getdoc(found) or "").splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line):
            listed = True
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif listed and (match := re.fullmatch(r"    (\w[\w., *]*): (.*)", line)):
            lines.append(f"- `{match[1]}`: {match[2]}")
        else:
            listed = listed and (not line or line.startswith("    "))
            lines.append(line.strip() if listed else line)
    return "\n".join(lines)


def signature(found: Any) -> str:
    """Gives the arguments; none where they are not known."""
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(found))).replace(str(ROOT), "")
    except (TypeError, ValueError):
        return "(...)"


if __name__ == "__main__":
    main()
