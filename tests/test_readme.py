"""The first lines of Python in README.md run, and print what stands below them."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_snippet_prints_what_the_readme_says(capsys):
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    exec(compile(found[1], str(README), "exec"), {})
    assert capsys.readouterr().out == found[2]
