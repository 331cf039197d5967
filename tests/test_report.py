"""report.py: the page is safe, whole and self-contained, says the right numbers, and copes with
what a run lacks."""

import base64
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import comparison
import report
from engine.media import gallery_file

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
CONFIG = {
    "method": "ours",
    "four_stage": True,
    "caption_reward": True,
    "selection": True,
    "nce_weight": 0.01,
}
CONFIG |= {
    "seed": 0,
    "tau": 0.54,
    "prompts_per_step": 4,
    "responses": 8,
    "rl_steps": 6,
    "judge": HOSTILE,
}


def png() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(4)))
        + chunk(b"IEND", b"")
    )


def rate(right: int, n: int) -> dict:
    share = right / n
    return {"value": share, "low": max(0, share - 0.1), "high": min(1, share + 0.1), "n": n}


def response(caption: str, answer: str, think: str = "so") -> str:
    return f"<prethink>west</prethink><caption>{caption}</caption><think>{think}</think><answer>{answer}</answer>"


def scored(
    right: list[bool], hallucinated: list[list[str]], texts: dict[int, str], yes: float
) -> dict:
    rows = [
        {
            "id": f"test:{i}",
            "category": "count" if i % 2 else "row",
            "problem": f"How many? {HOSTILE}",
            "options": ["A. one", "B. two"],
            "solution": "B",
            "text": texts.get(i, response(f"a cat, {', '.join(phrases)}", "B" if ok else "A")),
            "answer": "B" if ok else "A",
            "right": ok,
            "format": i not in texts,
            "hallucinated": phrases,
            "captioned": 1 + len(phrases),
            "covered": 1,
            "relevant": 2,
            "answerable": None if i == 0 else ok,
            "judge": None if i == 0 else HOSTILE,
        }
        for i, (ok, phrases) in enumerate(zip(right, hallucinated, strict=True))
    ]
    n, wrong = len(rows), sum(map(len, hallucinated))
    parity = {"row": rate(sum(right[::2]), n // 2), "count": rate(sum(right[1::2]), n // 2)}
    parity = {kind: {"accuracy": value} for kind, value in parity.items()}
    metrics = {
        "accuracy": rate(sum(right), n),
        "format": rate(n - len(texts), n),
        "by category": parity,
        "paired": rate(sum(right[: n // 2]), n // 2),
        "existence": {
            "accuracy": 0.5,
            "precision": 0.4,
            "recall": yes * 0.4 / 0.48,
            "f1": 0.44,
            "yes ratio": yes,
            "n": n,
        },
        "hallucinated objects": rate(wrong, n + wrong),
        "hallucinated captions": rate(sum(map(bool, hallucinated)), n),
        "coverage": rate(n, 2 * n),
        "answerable captions": rate(sum(right[1:]), n - 1),
    }
    return {"metrics": metrics, "rows": rows}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: accuracy rises from 10 to 25 of 40, hallucinated objects from 0 to 10 of
    50."""
    folder = tmp_path / "a run"
    for name in ("sft", "select", "rl", "eval/gallery/test"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    lines(
        folder / "sft/metrics.jsonl",
        [{"step": i, "loss": 3 / i, "grad_norm": 1.0, "lr": 0.1} for i in range(1, 21)],
    )
    metrics = {
        "reward/accuracy": 0.5,
        "reward/format": 1.0,
        "reward/caption": 0.4,
        "kl": 0.01,
        "entropy": 1.0,
    }
    metrics |= {
        "length": 20.0,
        "tied": 0.1,
        "nce": 0.7,
        "nce/active": 1.5,
        "nce/cosine_mean": 0.5,
        "nce/cosine_sd": 0.1,
    }
    lines(folder / "rl/metrics.jsonl", [{"step": i, **metrics} for i in range(1, 7)])
    classes = ["easy", "hard", "medium", "medium"]
    rows = [
        {"id": f"p{i}", "mean": i / 8, "variance": i / 16, "class": classes[i % 4]}
        for i in range(8)
    ]
    lines(folder / "select/scores.jsonl", rows)
    (folder / "select/selected.json").write_text(
        json.dumps({"kept": ["p7", "p6", "p3"], "of": 8, "tied": 1})
    )
    nothing, before = [[] for _ in range(40)], [i < 10 for i in range(40)]
    bad = {3: response(HOSTILE, HOSTILE, HOSTILE), 2: f"no stages {HOSTILE}"}
    phrases = [["red dog"] if i < 10 else [] for i in range(40)]
    after = [i < 2 or i >= 17 for i in range(40)]
    (folder / "eval/before.json").write_text(json.dumps({"test": scored(before, nothing, {}, 0.6)}))
    (folder / "eval/after.json").write_text(json.dumps({"test": scored(after, phrases, bad, 0.9)}))
    for i in range(6):
        (folder / "eval/gallery/test" / gallery_file(f"test:{i}")).write_bytes(png())
    return folder


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Leaves the figures out, for tests that are about something else: drawing takes nearly all the
    time."""
    monkeypatch.setattr(report, "figure", lambda title, text, draw: "")


def lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(folder: Path) -> str:
    return report.write(folder).read_text(encoding="utf-8")


def plain(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_table_states_numbers_and_difference(run):
    text = report.table(run)
    accuracy = next(line for line in text.splitlines() if line.startswith("  accuracy"))
    # 8 rows turn wrong and 23 turn right: the paired difference has sd sqrt((31 - 15^2 / 40) / 39)
    half = 1.96 * math.sqrt((31 - 15**2 / 40) / 39 / 40) * 100
    difference = f"+37.5 [{37.5 - half:+.1f}, {37.5 + half:+.1f}]"
    assert (
        accuracy.split()
        == f"accuracy 25.0 [15.0, 35.0] -> 62.5 [52.5, 72.5] {difference} better".split()
    )
    assert re.search(
        r"hallucinated objects +0\.0 \[0\.0, 10\.0\] +-> 20\.0 .* worse$", text, re.MULTILINE
    )
    assert re.search(
        r"coverage +50\.0 .*\+0\.0 \[-14\.1, \+14\.1\] +no clear change$", text, re.MULTILINE
    )
    for name in (
        "- count",
        "- row",
        "paired accuracy",
        "answerable captions",
        "format",
        "F1 of yes",
    ):
        assert f"  {name} " in text
    assert re.search(r"said yes \(true: 48%\) +60\.0 +-> 90\.0 +\+30\.0$", text, re.MULTILINE)
    assert text.isascii()


def test_page_states_the_same_numbers(run, undrawn):
    text = plain(page(run))
    assert "accuracy 40 25.0 [15.0, 35.0] 62.5 [52.5, 72.5] +37.5" in text
    summary = text[: text.index("Before and after")]
    assert "3 of 8 prompts selected" in summary and "6 of 6 updates" in summary
    better, worse = summary.split("Better after RL:")[1].split("Worse after RL:")
    assert "accuracy (test 25.0 → 62.5 %)" in better and "hallucinated" not in better
    assert "hallucinated objects (test 0.0 → 20.0 %)" in worse.split("No clear change")[0]
    assert "test 60% → 90%, true 48%" in worse


def test_interval_of_a_ratio_is_that_of_a_jackknife():
    """Hallucinated objects have a random denominator: compare the linearised interval with leaving
    out each row."""
    named = [[1 + 3 * (i * k % 7) for i in range(60)] for k in (1, 2)]
    rows = [
        [
            {"id": str(i), "hallucinated": [0] * (n // (4 - k)), "captioned": n}
            for i, n in enumerate(side)
        ]
        for k, side in enumerate(named, 1)
    ]
    pair = [rate(1, 10), rate(2, 10)]
    low, high = comparison.difference_interval("hallucinated objects", pair, rows)

    def ratio(side):
        return sum(len(r["hallucinated"]) for r in side) / sum(r["captioned"] for r in side)

    without = [
        ratio(rows[1][:i] + rows[1][i + 1 :]) - ratio(rows[0][:i] + rows[0][i + 1 :])
        for i in range(60)
    ]
    mean = sum(without) / 60
    half = 1.96 * math.sqrt(59 / 60 * sum((x - mean) ** 2 for x in without))
    assert (low + high) / 2 == pytest.approx(ratio(rows[1]) - ratio(rows[0]))
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)


def test_few_rows_fall_back_to_newcombe():
    """The published example: 56/70 - 48/80 has the interval [0.0524, 0.3339] (Newcombe 1998, method
    10)."""

    def wilson(right, n, z=1.959964):
        p, scale = right / n, 1 + z * z / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return {
            "value": p,
            "low": (p + z * z / (2 * n) - half) / scale,
            "high": (p + z * z / (2 * n) + half) / scale,
        }

    interval = comparison.difference_interval("paired", [wilson(48, 80), wilson(56, 70)], [[], []])
    assert interval == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_hostile_text_is_escaped(run, undrawn):
    html = page(run)
    assert "<script" not in html and "<img src=http" not in html
    # question, response, judge and configuration are all shown
    assert html.count("&lt;script&gt;") > 10
    assert "no stages &lt;script&gt;" in html


def test_hostile_names_are_escaped(run, undrawn):
    for side in ("before", "after"):
        file = run / f"eval/{side}.json"
        scores = json.loads(file.read_text())["test"]
        scores["metrics"]["by category"] = {
            HOSTILE: {"accuracy": rate(1, 2)},
            '"><script>': {"accuracy": rate(1, 2)},
        }
        file.write_text(json.dumps({f"test{HOSTILE}": scores}))
    assert "<script" not in page(run) and "<img src=http" not in page(run)


def test_page_is_self_contained(run):
    html = page(run)
    assert not re.search(r"<(script|link|iframe|object|embed)\b", html)
    assert not re.search(r"@import|url\((?!#)", html)
    for value in re.findall(
        r"\s(?:src|(?:xlink:)?href)=[\"']?([^\s\"'>]*)", re.sub(r"&lt;.*?&gt;", "", html)
    ):
        assert value.startswith(("#", "data:image/png;base64,")), value
    assert base64.b64encode(png()).decode() in html
    assert '<meta name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_figures_are_named_themed_and_apart(run):
    html = page(run)
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 9
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        assert tree.get("role") == "img" and len(tree.get("aria-label")) > 20
        assert "currentColor" in figure and "var(--one)" in figure and "#0101" not in figure
        names = set(re.findall(r'\bid="([^"]+)"', figure))
        assert names.issuperset(re.findall(r'(?:href="|url\()#([^")]+)', figure))
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "2 easy (0 kept), 4 medium (3 kept), 2 hard (0 kept)" in html
    assert "3 of 8 have a variance of 0.188 or more" in html
    # 1.5 active anchors of 3: only 3 prompts are kept, of the 4 of a step
    assert "share 0.5 → 0.5" in html


def test_gallery_puts_changes_first_and_says_so(run, undrawn):
    html = page(run)
    gallery = html[html.index("Held-out pictures") : html.index("<h2>Configuration")]
    assert re.findall(r'alt="picture or clip ([^"]+)"', gallery) == [
        f"test:{i}" for i in (2, 3, 4, 5)
    ]
    assert (
        "Not picked by hand" in gallery
        and "Of all 40 rows, 23 turned right and 8 turned wrong" in gallery
    )
    assert gallery.count("✓ right") == 4 and gallery.count("✗ wrong") == 4
    assert "A. one<br>B. two" in gallery
    for stage in report.STAGES.values():
        assert f"<dt>{stage}</dt>" in gallery
    # the phrase, and the legend
    assert "<mark>red dog</mark>" in gallery and "<mark>Marked" in gallery


@pytest.mark.parametrize(
    "caption, phrases, expected",
    [
        ("a Red Dog, red dogs", ["red dog"], "a <mark>Red Dog</mark>, red dogs"),
        ("dark red dog", ["red dog", "dark red dog"], "<mark>dark red dog</mark>"),
        ("a < b & c", [], "a &lt; b &amp; c"),
        ("<b>cat</b> & dog", ["cat"], "&lt;b&gt;<mark>cat</mark>&lt;/b&gt; &amp; dog"),
        ("amp & lt", ["amp", "lt"], "<mark>amp</mark> &amp; <mark>lt</mark>"),
    ],
)
def test_marks(caption, phrases, expected):
    assert report.marked(caption, phrases) == expected


def test_same_run_same_page(run):
    first = page(run)
    assert page(run) == first


def test_a_failing_write_leaves_the_old_page(run, undrawn, monkeypatch):
    first = page(run)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": 1}))

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError):
            report.write(run)
    assert (run / "report.html").read_text(encoding="utf-8") == first
    assert page(run) != first
    assert not list(run.glob(".report*"))


def strip(folder: Path, *patterns: str) -> None:
    """Remove what a run that has not come so far would lack."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "lacking, method, said",
    [
        (
            ["rl/*", "select/*", "eval/after.json"],
            "sft",
            "There is no evaluation after RL: the method is the cold start",
        ),
        (["rl/*", "eval/after.json"], "ours", "0 of 6 updates of reinforcement learning"),
        (["eval/after.json"], "ours", "the run has not come so far"),
        (["eval/gallery/*", "eval/*"], "ours", "Nothing was evaluated"),
        (["eval/gallery/*"], "ours", "kept no pictures"),
        (["select/*"], "ours", "Not in this run: Selection by reward variance"),
        (["sft/*"], "ours", "no cold start"),
        (["*/*/*", "*/*", "config.yaml"], "ours", "Not in this run: Rewards, KL"),
    ],
)
def test_what_is_missing_is_said(run, undrawn, lacking, method, said):
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"method": method}))
    strip(run, *lacking)
    assert said in plain(page(run))
    assert report.table(run)


def test_figures_of_a_run_that_has_just_begun_rl(run):
    (run / "select/selected.json").unlink()
    lines(
        run / "rl/metrics.jsonl",
        [{"step": 1, "kl": 0.0, "nce/active": 0.0, "nce/cosine_mean": 0, "nce/cosine_sd": 0}],
    )
    html = page(run)
    assert html.count("<svg") == 5 and "Not finished" in html
    assert (
        "Not in this run: Rewards, Entropy of the policy, Length of responses, Tied groups." in html
    )


def test_baseline_without_captions_kl_or_conflict(run):
    """--method grpo --beta 0: two stages, two rewards, no Eq. 4, no judge."""
    keep = ("step", "reward/accuracy", "reward/format", "entropy", "length", "tied")
    rows = [json.loads(line) for line in (run / "rl/metrics.jsonl").read_text().splitlines()]
    lines(run / "rl/metrics.jsonl", [{key: row[key] for key in keep} for row in rows])
    for side in ("before", "after"):
        scores = json.loads((run / f"eval/{side}.json").read_text())
        for row in scores["test"]["rows"]:
            for key in (
                "hallucinated",
                "captioned",
                "covered",
                "relevant",
                "answerable",
                "judge",
                "options",
            ):
                del row[key]
            row["text"] = f"<think>so</think><answer>{row['answer']}</answer>"
        names = ("accuracy", "format", "by category")
        scores["test"]["metrics"] = {name: scores["test"]["metrics"][name] for name in names}
        (run / f"eval/{side}.json").write_text(json.dumps(scores))
    html = page(run)
    assert (
        "Not in this run: KL from the cold-start model, Gradient cosines, Active anchors." in html
    )
    assert (
        "caption 0" not in html
        and "<dt>Caption</dt>" not in html
        and "hallucinated objects" not in report.table(run)
    )


def test_an_unfinished_line_and_odd_characters_are_read(run):
    """A metrics file may be cut off mid-line; U+2028 in a response ends no line; NaN is a gap and
    not an error."""
    with (run / "rl/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"step": 7, "kl": float("nan"), "note": "a\u2028b"}, ensure_ascii=False)
            + "\n"
        )
        file.write('{"step": 8, "kl": 0.')
    assert "7 of 6 updates" in page(run)


def test_command(run):
    command = [sys.executable, report.__file__]
    done = subprocess.run(
        [*command, run],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and "+37.5" in done.stdout and "report.html" in done.stdout
    failed = subprocess.run([*command, run / "eval"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert (
        failed.stderr.startswith("error: ")
        and failed.stderr.count("\n") == 1
        and "run folder" in failed.stderr
    )


def test_a_report_that_cannot_be_written_is_one_line(run):
    (run / "report.html").mkdir()
    command = [sys.executable, report.__file__, run]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "+37.5" in done.stdout
    assert done.stderr.startswith("error: the report cannot") and done.stderr.count("\n") == 1


def test_a_category_that_selection_nearly_loses_is_warned_about():
    """With the option that helps, where it can help; not for a handful, and not where all is
    tied."""
    kept = [str(i) for i in range(50)]

    def said(within="", **categories):
        return report.selected_by_category(
            {"kept": kept, "of": 100, "within": within, "categories": categories}
        )

    counts, *warned = said(colour=[2, 40, 10], row=[48, 60, 0])
    assert counts == "colour: 2 of 40, row: 48 of 60"
    assert warned == [
        "warning: few prompts of colour were kept, so RL hardly trains it. "
        "--select_within category keeps up to the same share of each"
    ]
    assert said("category", colour=[2, 40, 38], row=[48, 60, 0])[1:] == [
        "warning: few prompts of colour were kept, so RL hardly trains it"
    ]
    assert said(colour=[0, 40, 40], row=[50, 60, 0])[1:] == [
        "warning: all responses to every prompt of colour earn the same: RL cannot train it"
    ]
    assert said(rare=[0, 3, 0], row=[50, 97, 0])[1:] == [] and said(one=[50, 100, 0]) == [""]
    assert report.selected_by_category({"kept": kept, "of": 100, "tied": 3}) == [""], (
        "a run of an earlier version"
    )


# --- two runs -------------------------------------------------------------------------------------


def test_two_runs_are_compared_row_by_row_after_rl(run, undrawn):
    """The second one's rows against the first one's, and what both began with once."""
    other = run.parent / "b run"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": 77}))
    shutil.copy(run / "eval/before.json", other / "eval/after.json")  # as if it had learned nothing
    both = report.contrast_of(run, other)
    assert list(both.evals) == ["before", "a", "b"] and both.config == {"seed": "0 | 77"}
    text = report.table_of(both)
    assert re.search(r"test +a run +b run +points", text)
    assert re.search(r"  accuracy +62\.5 .*-> 25\.0 .*-37\.5.* worse", text)
    html = report.contrast(both).read_text()
    assert "Both began with the same responses" in plain(html)
    assert html.count("<h4>Before RL") == html.count("<h4>b run") == html.count("<h4>a run") > 0
    # another beginning is said, and not shown as if it were common
    shutil.copy(run / "eval/after.json", other / "eval/before.json")
    both = report.contrast_of(run, other)
    assert list(both.evals) == ["a", "b"]
    assert "did not begin with the same responses" in plain(report.contrast(both).read_text())


def test_a_run_without_its_end_is_not_compared(run):
    other = run.parent / "b run"
    shutil.copytree(run, other)
    (other / "eval/after.json").unlink()
    with pytest.raises(SystemExit, match="b run has no evaluation after RL"):
        report.contrast_of(run, other)


def test_the_gallery_opens_with_right_answers_behind_captions(run, undrawn):
    """One that RL has mended comes first, then one that it has not."""
    for side, captions in (("before", {4: False, 5: False}), ("after", {4: False, 5: True})):
        file = run / f"eval/{side}.json"
        scores = json.loads(file.read_text())
        for i, row in enumerate(scores["test"]["rows"]):
            row |= {"right": True, "answerable": captions.get(i, True), "hallucinated": []}
        file.write_text(json.dumps(scores))
    html = page(run)
    shown = re.findall(r'alt="picture or clip test:(\d)"', html)
    assert shown[:2] == ["5", "4"]
    assert "right answers behind wrong captions: 2 → 1" in html
