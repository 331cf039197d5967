"""A row -> the text that the policy is asked."""

import data
import reasoning
from benchmarks.base import PaperForm, Row
from benchmarks.table import TABLE

PAPER_ASKS = {  # added to every prompt by the paper's code
    "multiple choice": "only the single option letter (e.g., A, B, C, D, etc.)",
    "numerical": "the numerical value (e.g., 42 or 3.14)",
}


def prompt(
    name: str,
    row: Row,
    protocol: str = "official",
    style: str = "official",
    template: str = "",
    four_stage=True,
) -> str:
    """The text of the user turn, beside the picture or clip.

    official: the benchmark's own prompt; `style` picks another published one (lmms, vlmevalkit,
    direct, ...). Raises ValueError for a style that the benchmark does not have.
    paper: the question as the paper's code lays it out, this repository's wording of the stages
    (D-11), and the paper's sentence on the form of the answer. `template`, with {Question} in it,
    replaces the stages, for example with QUESTION_TEMPLATE_PCDA of the paper's code for its
    checkpoints.
    """
    if protocol == "official":
        styles = TABLE[name].prompts(row)
        if style not in styles:
            raise ValueError(f"{name} has no prompt {style!r}, only {', '.join(styles)}")
        return styles[style]
    options, _, problem_type = _form_or_free(name, row)
    question = TABLE[name].paper_question(row)
    if options:  # no newline before "Options:", as there
        lines = (f"{letter}. {option}\n" for letter, option in options.items())
        question += "Options:\n" + "".join(lines)
    asks = PAPER_ASKS.get(problem_type)
    end = f" Please provide {asks} within the <answer> </answer> tags." if asks else ""
    if template:
        return template.replace("{Question}", question) + end
    return question + reasoning.prompt("", (), problem_type, four_stage) + end


def sample(name: str, row: Row) -> data.Sample:
    """The row in the paper's form as a `data.Sample`, with the prompt of training.

    A row that the paper leaves out is free-form.
    """
    options, solution, problem_type = _form_or_free(name, row)
    return data.Sample(
        id=row.id,
        data_type=TABLE[name].media,
        media=() if row.media is None else (row.media,),
        problem=TABLE[name].paper_question(row),
        options=tuple(f"{letter}. {option}" for letter, option in options.items()),
        problem_type=problem_type,
        answer=solution,
        category=row.subsets[0] if row.subsets else name,
        pair=row.group or None,
        sizes=row.sizes,
    )


def _form_or_free(name: str, row: Row) -> PaperForm:
    free = (dict(row.options), str(row.answer), "free-form")
    return TABLE[name].paper_form(row) or free
