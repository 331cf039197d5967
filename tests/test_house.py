"""The house: who may import whom, how long a file may be, how long a test's name may be."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "world", "benchmarks")
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in [*ROOT.glob("*.py"), *(f for p in PACKAGES for f in (ROOT / p).glob("*.py"))]
}
CONCEPTS = "reasoning answers caption_reward variance_select grpo ntk_infonce".split()
CONCEPTS += ["corruption", "ovip"]
STAGES = "train rollouts conflict config data eval measures report dry_run".split()


def imports(module: str, everywhere: bool = True) -> set[str]:
    """Our modules that a module imports; without `everywhere`, at its top only."""
    tree, found = ast.parse(FILES[module].read_text()), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            # a name of a package is a module of it, or stands in its __init__
            found |= {name if name in FILES else node.module for name in inside}
    return {name for name in found if name in FILES} - {module}


def reached(start: str) -> set[str]:
    """All of our modules that importing `start` imports."""
    seen, todo = set(), [start]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += imports(module)
    return seen


def test_imports_have_no_cycle():
    graph = {module: imports(module, everywhere=False) for module in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize("module", CONCEPTS)
def test_a_concept_imports_only_reasoning_and_answers(module):
    assert imports(module) <= {"reasoning", "answers"}


def test_the_engine_imports_no_stage():
    for module in FILES:
        if module.startswith("engine"):
            assert not imports(module) & set(STAGES) and not any(
                name.startswith(("world", "benchmarks")) for name in imports(module)
            ), module


def test_training_imports_no_benchmark():
    assert not [module for module in reached("train") if module.startswith("benchmarks")]


def test_files_at_the_root_are_short():
    lines = {f.name: len(f.read_text().splitlines()) for f in ROOT.glob("*.py")}
    assert {name for name, n in lines.items() if n > 450} <= {"report.py"}


def test_test_names_have_at_most_60_characters():
    for file in (ROOT / "tests").glob("test_*.py"):
        names = re.findall(r"def (test_\w+)", file.read_text())
        assert [name for name in names if len(name) > 60] == [], file.name
        assert len(names) == len(set(names)), file.name
