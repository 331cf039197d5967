"""DEPARTURES.md and the code name the same departures."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "engine", "world", "benchmarks")
FILES = [file for folder in FOLDERS for file in (ROOT / folder).glob("*.py")]
NOT_A_LINE = {"D-31"}  # an absence: nothing is drawn from outside the batch


def test_every_departure_stands_in_the_code_and_the_reverse():
    listed = set(re.findall(r"^\| (D-\w+) \|", (ROOT / "DEPARTURES.md").read_text(), re.MULTILINE))
    code = "\n".join(file.read_text() for file in FILES).replace("D-1 and the like", "")
    named = set(re.findall(r"\bD-\d+\w*", code))
    assert len(listed) > 10
    assert named - listed == set(), "named in the code, not explained"
    assert listed - named - NOT_A_LINE == set(), "explained, but nowhere in the code"


def test_what_the_departures_name_exists():
    text = (ROOT / "DEPARTURES.md").read_text()
    code = "\n".join(file.read_text() for file in FILES)
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(?:--)?([A-Za-z_][\w./]*(?: [\w.]+)?)`", text))
    assert sum(name.startswith("test_") for name in named) > 10
    for name in named:
        if "/" in name or name.endswith(".py"):
            assert (ROOT / name).exists(), name
        elif name.startswith("test_"):
            assert f"def {name}(" in tests, name
        else:
            assert re.search(rf"\b{name.split()[0]}\b", code), name


def test_the_equation_map_of_the_readme_names_what_exists():
    rows = re.findall(
        r"^\|[^|]+\|[^|]+\| `([\w/]+\.py)` `(\w+)` \| `(\w+)` \|",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) >= 8
    for file, function, test in rows:
        assert (
            f"def {function}(" in (ROOT / file).read_text()
            or f"class {function}" in (ROOT / file).read_text()
        )
        assert f"def {test}(" in tests, f"{test} is in the README's equation map only"
