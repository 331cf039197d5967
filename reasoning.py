"""Redefine the Reasoning Paradigm: planning -> caption -> thinking -> answer (paper,
"Visual-Grounded Reasoning").

The paper names four output stages; the official data writes them as the tags below, and so do we,
so that its data and checkpoints work here. "Planning" is the tag <prethink>. The prompt's wording
is our own [choice]: it asks for what the paper asks (first locate the regions, then caption *those
regions*), where the official prompt asks for "key thinking direction" and a description of the
whole image (departure D-11).

Strings in, strings and numbers out.
"""

import re
from dataclasses import dataclass

FOUR_STAGES = ("prethink", "caption", "think", "answer")  # planning, caption, thinking, answer
TWO_STAGES = ("think", "answer")  # the usual GRPO template, the paper's baseline
TAGS = tuple(f"<{end}{stage}>" for stage in FOUR_STAGES for end in ("", "/"))

ANSWER_FORM = {  # what <answer> must hold, by problem type
    "multiple choice": "only the letter of the option",
    "numerical": "only the number",
    "regression": "only the number",
    "OCR": "only the text that was read",
    "free-form": "only a short answer",
}
PROBLEM_TYPES = tuple(ANSWER_FORM)


@dataclass(frozen=True)
class Stages:
    """One response, taken apart. A stage that is not there is None; an empty one is ''."""

    prethink: str | None = None
    caption: str | None = None
    think: str | None = None
    answer: str | None = None


def question(problem: str, options: list[str] | tuple[str, ...] = ()) -> str:
    """The question as policy and judge both see it: the problem, then one option a line."""
    return "\n".join([problem, *(["Options:", *options] if options else [])])


def prompt(
    problem: str, options: list[str] | tuple[str, ...], problem_type: str, four_stage: bool = True
) -> str:
    """The user turn that follows the picture or clip.

    `four_stage=False` gives the think-then-answer prompt of plain GRPO.
    """
    stages = [
        "Locate what the question is about in <prethink></prethink>",
        "describe only that, concisely, in <caption></caption>",
        "reason from the description in <think></think>",
    ]
    if not four_stage:
        stages = ["Reason about what you see in <think></think>"]
    stages.append(f"and give {ANSWER_FORM[problem_type]} in <answer></answer>.")
    return "\n".join([question(problem, options), ", ".join(stages)])


def between(text: str, tag: str) -> str | None:
    """What stands between the first <tag> and the next </tag>, stripped; None without them."""
    # not a lazy regular expression: its time is quadratic in the length of a text of opening tags
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start + 1)
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end].strip()


def parse(text: str) -> Stages:
    """Split a response into its stages. The first occurrence of each tag counts, as officially."""
    return Stages(**{tag: between(text, tag) for tag in FOUR_STAGES})


def format_reward(text: str, four_stage: bool = True) -> float:
    """1.0 if the response is exactly its stages, each once, in order, none empty, nothing outside;
    else 0.0.

    Stricter than the official regular expression, which lets duplicated and nested tags pass
    (departure D-19b).
    """
    stages = FOUR_STAGES if four_stage else TWO_STAGES
    tags = re.findall(r"</?(?:" + "|".join(FOUR_STAGES) + ")>", text)
    if tags != [f"<{end}{tag}>" for tag in stages for end in ("", "/")]:
        return 0.0
    body = r"\s*".join(rf"<{tag}>\s*\S.*?</{tag}>" for tag in stages)
    return float(re.fullmatch(rf"\s*{body}\s*", text, re.DOTALL) is not None)


def render(stages: Stages) -> str:
    """The text of a response from its stages (used to write reference responses); None stages are
    left out."""
    parts = [(tag, getattr(stages, tag)) for tag in FOUR_STAGES]
    return "".join(f"<{tag}>{body}</{tag}>" for tag, body in parts if body is not None)
