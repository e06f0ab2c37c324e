"""The scripts and the stylesheet as they are joined; what they do is tried in a browser by the other tests."""

from importlib import resources

import pytest

from sae.report.assets import LATER_SCRIPTS, SCRIPTS, STYLES, read_script, stripped

SITE = resources.files("sae.report") / "site"
FILES = {path.name: path.read_text(encoding="utf-8") for path in (SITE / "app").iterdir()}


def test_every_file_is_in_one_script_or_the_stylesheet() -> None:
    assert sorted(FILES) == sorted(f"{name}.js" for name in (*SCRIPTS, *LATER_SCRIPTS))
    assert sorted(path.name for path in (SITE / "style").iterdir()) == sorted(f"{name}.css" for name in STYLES)


def test_comments_and_indentation_go_and_statements_stay() -> None:
    script = """/** What it is.
 * @param {string} x
 */
function f(x) {
  // why
  const address = `http://${x}`; // said here

  /* one more */
  return address;
}
"""
    assert stripped(script) == ("function f(x) {\nconst address = `http://${x}`; // said here\nreturn address;\n}\n")


@pytest.mark.parametrize("name", FILES)
def test_no_template_literal_goes_on_over_the_end_of_a_line(name: str) -> None:
    """It would lose its indentation."""
    odd = [line for line in stripped(FILES[name]).splitlines() if line.count("`") % 2]
    assert odd == []


def test_scripts_are_strict_and_small() -> None:
    for names in (SCRIPTS, LATER_SCRIPTS):
        script = read_script(SITE, names).decode()
        assert '\n"use strict";\n' in script
        assert "/**" not in script
        assert len(script.encode()) <= 120_000
