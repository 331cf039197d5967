"""Ask a policy every row of some benchmarks, score its outputs, and write both.

Files in the run's folder:
    outputs/NAME.jsonl   raw outputs; grows by batches, and an interrupted run resumes there
    NAME.jsonl           prompt, output, and by protocol the answer read and the verdict
    scores.json          every measure by subset, with intervals and problems
    counts.json          the counts behind them by cluster, for --compare
    stress/              raw outputs on corrupted inputs by kind, and NAME.json, what they say
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import data
import reasoning
import stress
from benchmarks import results
from benchmarks.amber import amber_tools
from benchmarks.base import Row
from benchmarks.prompts import prompt, sample
from benchmarks.read import read
from benchmarks.score import PROTOCOLS, Judge, Score, score
from benchmarks.table import TABLE
from caption_reward import without_control_tokens
from corruption import corrupt
from engine import DataError, counted
from engine.files import rewrite, to_jsonl
from engine.judges import Journal
from engine.pretrained import open_policy
from engine.run import Run
from engine.shared_prefix import uniform_numbers
from engine.vlm import VLM

JUDGE_BATCH = 256  # prompts for which a judge has one deadline


def open_rows(
    paths: dict[str, str], media: dict[str, str], cfg, on_bad_row: str, run: Run
) -> dict[str, list[Row]]:
    """The rows of every benchmark, with media and lengths checked before a model is loaded.

    paths: name -> folder, file or hub id; empty for the hub. cfg: limit (rows of each; 0: all),
    model, and what `data.fit_to_model` needs. Raises DataError, ConfigError.
    """
    sets = {}
    with run.local_main_first():
        for name, path in paths.items():
            path = path or TABLE[name].hub[0]
            sets[name] = read(name, path, media.get(name), on_bad_row, run.say)
    for name, rows in sets.items():
        sizes, some = Counter(row.group for row in rows), rows[: cfg.limit or None]
        begun = Counter(row.group for row in some)
        # a pair, or a question with its rotations, is not cut in two
        sets[name] = [row for row in some if not row.group or begun[row.group] == sizes[row.group]]
        if not sets[name]:
            raise DataError(
                f"limit: the first {counted(cfg.limit, 'row')} of {name}: no whole pair or question"
            )
    samples = {name: [sample(name, row) for row in rows] for name, rows in sets.items()}
    fit = data.fit_to_model(samples, cfg.model, cfg, on_bad_row, run.say)
    ids = {name: {s.id for s in of} for name, of in fit.items()}
    return {name: [row for row in rows if row.id in ids[name]] for name, rows in sets.items()}


def evaluate(
    sets: dict[str, list[Row]],
    cfg,
    run: Run,
    judge: Judge | None = None,
    judge_name: str = "",
    kinds: Sequence[str] = (),
) -> None:
    """Ask every row, score by both protocols, print and write the scores.

    judge: on the main process only; its replies are kept. judge_name: on every process. kinds: of
    corruption, for the stress test. Raises DataError if outputs in the folder answer other
    questions, or were scored with a judge that is not given.
    """
    policy = functools.cache(lambda: open_policy(cfg.model, cfg, run.device))
    judge = _with_journal(judge, judge_name, run.folder) if judge else None
    files = [run.folder / f"{name}.json" for name in ("scores", "counts")]
    scores, counts = run.from_main(lambda: [_read_json(file) for file in files])
    for name in sets:
        if not judge_name and (used := scores.get(name, {}).get("judge")):
            raise DataError(
                f"judge: the scores of {name} in {run.folder} used the judge {used}. Give it "
                "again, or another --output_dir"
            )
    for name, rows in sets.items():
        samples, file = (
            [sample(name, row) for row in rows],
            run.folder / "outputs" / f"{name}.jsonl",
        )
        lines = _outputs(name, rows, samples, file, policy, cfg, run)
        if run.is_main:
            found = score_both(name, rows, lines, cfg.asked != "direct", judge)
            text = to_jsonl(list(results.verdict_lines(found, rows, lines)))
            rewrite(run.folder / f"{name}.jsonl", text)
            scores[name] = {protocol: results.as_json(of) for protocol, of in found.items()}
            scores[name] |= {"asked": cfg.asked, "judge": judge_name}
            counts[name] = {protocol: results.counts_as_json(of) for protocol, of in found.items()}
            print(results.table(name, scores[name]), flush=True)
            for note in [*results.notes(found), *results.unreadable(lines)]:
                print(f"  {note}")
        run.write(run.folder / "counts.json", counts)
        run.write(run.folder / "scores.json", scores)
        if kinds:
            _stress(name, rows, lines, kinds, policy, cfg, run, judge)
    run.say(f"rows, verdicts and scores: {run.folder}")


def _stress(
    name: str,
    rows: list[Row],
    lines: list[dict],
    kinds: Sequence[str],
    policy: Callable[[], VLM],
    cfg,
    run: Run,
    judge: Judge | None,
) -> None:
    """The stress test: the rows with every kind of corruption, by the official rule. Prints a
    table, and writes stress/NAME.json. Undecided answers are not right, as refusals often are."""
    said, picture = {stress.INTACT: lines}, {row.id: row.cluster for row in rows}
    for kind in kinds:
        # the prompt is made of the row's question, by every benchmark in its own way
        asked = [replace(sample(name, row), problem=row.question) for row in rows]
        samples, notes = corrupt(asked, kind, 0, picture=lambda s: picture[s.id])
        for note in notes:
            run.say(f"  {kind}: {note}")
        texts = {s.id: s.problem + s.hint for s in samples}
        changed = [_reworded(row, texts[row.id], kind) for row in rows if row.id in texts]
        file = run.folder / "stress" / kind / f"{name}.jsonl"
        said[kind] = _outputs(name, changed, samples, file, policy, cfg, run)
    if not run.is_main:
        return
    right = {}
    for kind, of in said.items():
        decided = score_both(name, rows, of, cfg.asked != "direct", judge)["official"].verdicts
        answered = {line["id"] for line in of}
        right[kind] = {
            v.id: v.verdict == "right"
            for v in decided
            if v.id in answered and v.verdict != "dropped"
        }
    questions = [
        # of the options one is right, and so of yes and no
        stress.Question(
            row.id,
            row.kind,
            row.cluster,
            stress.chance(len(row.options) or 2 * (row.kind == "yes/no"), 1),
        )
        for row in rows
        if row.kind != "description"
    ]
    found = list(stress.lines(questions, right))
    rewrite(run.folder / "stress" / f"{name}.json", json.dumps(stress.as_json(found)))
    print(stress.table(name, found), flush=True)


def _reworded(row: Row, question: str, kind: str) -> Row:
    """The row with another question, in all that its prompts are made of."""
    if question == row.question:
        return row
    more = dict(row.more)
    if "query" in more:  # the whole prompt as published, with the intact question in it
        more["query"] = ""
    if "hint" in more and kind == "remove_text":  # a passage that the question needs
        more["hint"] = None
    return replace(row, question=question, more=more)


def _outputs(
    name: str,
    rows: list[Row],
    samples: list[data.Sample],
    file: Path,
    policy: Callable[[], VLM],
    cfg,
    run: Run,
) -> list[dict]:
    """One line for each row: id, prompt, output. Lines in the file are not asked again."""
    texts = {row.id: prompt_of(name, row, cfg) for row in rows}

    def answer(shard: list[data.Sample]) -> list[dict]:
        micro_batches = run.micro_batches(shard, 0, _answer, policy, texts, cfg)
        return [line for lines in micro_batches for line in lines]

    lines = run.resumable_map(file, samples, cfg.eval_batch, answer, name)
    if any(texts.get(line["id"], line["prompt"]) != line["prompt"] for line in lines):
        raise DataError(
            f"{name}: the prompts in {file} differ from those of this evaluation. Delete the "
            "file, or give another --output_dir"
        )
    return lines


def _answer(
    samples: list[data.Sample], policy: Callable[[], VLM], texts: dict[str, str], cfg
) -> list[dict]:
    """The lines of some rows. A clip that cannot be decoded has no output, and its error."""
    chats, ids, lost = [], [], []
    for s in samples:
        try:
            chats.append(data.messages(s, texts[s.id], cfg.fps, cfg.max_frames))
            ids.append(s.id)
        except DataError as error:  # only key frames were checked before
            line = {"id": s.id, "prompt": texts[s.id], "output": None, "error": str(error)}
            lost.append(line)
    if not ids:
        return lost
    length = cfg.max_new_tokens
    draws = uniform_numbers(ids, 1, length, str(cfg.seed)) if cfg.sample else None
    inputs = policy().encode(chats)
    said = policy().generate(inputs, 1, length, sample=cfg.sample, draws=draws).text
    return lost + [
        {"id": i, "prompt": texts[i], "output": row[0]} for i, row in zip(ids, said, strict=True)
    ]


def prompt_of(name: str, row: Row, cfg) -> str:
    """The prompt by cfg.asked: of training (four_stage, two_stage), `direct` or `template`."""
    if cfg.asked == "direct":
        return prompt(name, row)
    if cfg.asked == "template":
        return prompt(name, row, "paper", template=cfg.template)
    s = sample(name, row)
    return reasoning.prompt(s.problem, s.options, s.problem_type, cfg.asked == "four_stage")


def score_both(
    name: str, rows: list[Row], lines: list[dict], lettered: bool, judge: Judge | None
) -> dict[str, Score]:
    """The score by each protocol. lettered: yes/no questions were asked as A and B."""
    outputs, tools = [(line["id"], line["output"]) for line in lines], {}
    if any(row.kind == "description" for row in rows):
        try:
            tools = dict(zip(("nouns", "similar"), amber_tools()))
        except DataError as error:
            print(f"amber: descriptions stay undecided ({error})")
    options = dict(lettered=lettered, judge=judge, **tools)
    return {protocol: score(name, rows, outputs, protocol, **options) for protocol in PROTOCOLS}


def _with_journal(judge: Judge, name: str, folder: Path) -> Judge:
    """The judge, asked for new prompts only, `JUDGE_BATCH` at a time. Its replies are kept."""
    journal = Journal(folder / "judge" / "0.jsonl", name)

    def ask(prompts: list[str]) -> list[str | None]:
        prompts = [without_control_tokens(text) for text in prompts]  # outputs may hold some
        new = list(dict.fromkeys(text for text in prompts if (text, "") not in journal))
        for i in range(0, len(new), JUDGE_BATCH):
            some = new[i : i + JUDGE_BATCH]
            for text, reply in zip(some, judge(some), strict=True):
                if reply is not None:
                    journal[text, ""] = reply
        return [journal.get((text, "")) for text in prompts]

    return ask


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}
