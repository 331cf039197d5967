"""VideoHallucer: pairs of a basic and a hallucinated question; both must be right."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import rules
from benchmarks.base import Benchmark, Counts, Row, Verdict, right_or_wrong, share, yes_or_no
from benchmarks.files import Source

SUBSETS = (
    "object_relation",
    "temporal",
    "semantic_detail",
    "external_factual",
    "external_nonfactual",
)
EXTRA_SUBSETS = ("interaction", "fact_detect")  # published beside the five, not in the mean
SAME_CLIPS = dict.fromkeys(("external_factual", "external_nonfactual"), "external")


def read(raw: dict, number: int, source: Source) -> Iterator[Row]:
    subset = (source.file.stem if source.file else source.label).lower()
    pair = f"{subset}/{number}"
    # semantic_detail asks about two clips, cut from one
    cluster = f"{SAME_CLIPS.get(subset, subset)}/{raw['basic']['video']}"
    for variant in ("basic", "hallucination"):
        half = raw[variant]
        yield Row(
            id=f"{pair}/{variant}",
            question=half["question"],
            answer=yes_or_no(half["answer"]),
            kind="yes/no",
            # every subset has its own 1.mp4
            media=source.files.find(f"{subset}/videos/{half['video']}"),
            options={"A": "Yes", "B": "No"},
            subsets=(subset,),
            group=pair,
            cluster=cluster,
            more={"variant": variant, "type": raw.get("type", "")},
        )


def prompts(row: Row) -> dict[str, str]:
    return {"official": f"{row.question}\nAnswer the question using 'yes' or 'no'."}


def verdict(row: Row, text: str, tools) -> tuple[str, str]:
    said = [word for word in ("yes", "no") if rules.video_hallucer(text, word)]
    return right_or_wrong(row.answer in said), " ".join(said)


def count(
    protocol: str, rows: Sequence[Row], verdicts: Mapping[str, Verdict], problems: dict
) -> Iterator[tuple[str, Counts]]:
    """The questions by variant, and the pairs."""
    pairs = defaultdict(list)
    for row in rows:
        pairs[row.group].append(row)
        measure = f"{row.more['variant']} accuracy"
        yield row.cluster, share(verdicts[row.id].verdict, measure, "overall", *row.subsets)
    for pair in pairs.values():
        is_right = len(pair) == 2 and all(verdicts[row.id].verdict == "right" for row in pair)
        first = pair[0]
        found = share(right_or_wrong(is_right), "pair accuracy", "overall", *first.subsets)
        yield first.cluster, found


ENTRY = Benchmark(
    name="videohallucer",
    title="VideoHallucer",
    media="video",
    rows=1952,
    source="<subset>/<subset>.json and <subset>/videos/ of the hub",
    hub=("bigai-nlco/VideoHallucer", "ColorfulAI/VideoHallucer"),
    splits=(),
    files=(rf"(^|/)({'|'.join((*SUBSETS, *EXTRA_SUBSETS))})\.json$",),
    forms=("basic hallucination",),
    official="both questions of a pair right, by subset, and the unweighted mean of the five",
    paper="the same mean, asked as A. Yes / B. No (the authors' pairing script is not public)",
    paper_number=50.8,
    headline={
        "official": ("mean of subsets", "pair accuracy"),
        "paper": ("mean of subsets", "pair accuracy"),
    },
    beware="runs before and after 2025-10-24, when 24 of 200 temporal pairs went (2,000 rows "
    "before); question accuracy",
    read=read,
    prompts=prompts,
    verdict=verdict,
    count=count,
    mean=("mean of subsets", SUBSETS),
)
