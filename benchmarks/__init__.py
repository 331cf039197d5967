"""Published benchmarks: read as they are shipped, asked, and scored by two protocols.

    import benchmarks

    rows = benchmarks.read("pope", "lmms-lab/POPE")    # or a folder or file; clips: media=FOLDER
    texts = [benchmarks.prompt("pope", row) for row in rows]
    scored = benchmarks.score("pope", rows, outputs, "official")
    scored.metrics["overall"]["f1"].value

*official* is the protocol that the benchmark's authors publish. *paper* is the one behind Table 1
of Ground What You See: one flat mean of exact matches. `TABLE` says what each number is, and what
must not be compared. Rows that only a judge can decide are counted as undecided, never guessed.

base      a row, a verdict, a metric, and the form of a benchmark's entry
pope, mmbench, mathvista, mmvu, videommmu, videohallucer, amber
          everything that only one benchmark has
table     these by name
rules     the publishers' scoring rules, as pure functions
files     Parquet, TSV, JSON, zips and hub ids
read      published files -> checked rows
prompts   a row -> the text that the policy is asked
score     outputs -> verdicts, measures, intervals
run       all of it for one policy, for `eval.py --benchmarks`
results   the files and tables of such a run, and `eval.py --compare`
"""

from benchmarks.amber import amber_tools
from benchmarks.base import Benchmark, Metric, Row, Verdict
from benchmarks.prompts import prompt, sample
from benchmarks.read import read, scan
from benchmarks.score import PROTOCOLS, Score, difference, intervals, mcnemar, measures, score
from benchmarks.table import TABLE

__all__ = [
    "PROTOCOLS",
    "TABLE",
    "Benchmark",
    "Metric",
    "Row",
    "Score",
    "Verdict",
    "amber_tools",
    "difference",
    "intervals",
    "mcnemar",
    "measures",
    "prompt",
    "read",
    "sample",
    "scan",
    "score",
]
