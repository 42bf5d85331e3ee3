"""Lines of Python in README.md run, and print what stands below them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


SNIPPETS = re.findall(
    r"```python\n((?:(?!```).)*)```\n\n```\n((?:(?!```).)*)```", README.read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize(("code", "printed"), SNIPPETS, ids=[f"snippet{place}" for place in range(len(SNIPPETS))])
def test_a_snippet_prints_what_the_readme_says(code, printed, capsys):
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out == printed


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
