"""Is this answer right? One verdict, used by the accuracy reward, by the caption judge and by evaluation.

The rule is the official one ("strict", OMNEX-VL's `reward_fn`): the whole answer must be the option letter, or a
number equal to two decimals. Anything lax ("A or B", every letter listed) is wrong, so that it cannot be hacked.

Strings in, booleans out.
"""


def extract(answer: str | None, text: str) -> str:
    """What is judged: the <answer> stage, or the whole response when it has no such stage (official rule)."""
    return (text if answer is None else answer).strip()


def solution_of(field: str) -> str:
    """The bare solution of a data row: 'A' from '<answer>A</answer>', or the field as it is."""
    field = field.strip()
    if field.startswith("<answer>") and field.endswith("</answer>"):
        field = field[len("<answer>") : -len("</answer>")]
    return field.strip()


def to_number(text: str) -> float | None:
    """'1,204.5' -> 1204.5; None where the text is not one finite number."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None  # also refuses nan


def is_correct(prediction: str, solution: str, problem_type: str) -> bool:
    """The verdict on one answer. Both are bare strings (no tags).

    multiple choice   the same letter, nothing else, case kept
    numerical         both written with or both without a decimal point or comma, and equal to two decimals (D-19)
    regression        within 5 % of the solution [choice: one threshold of the graded measure]
    OCR, free-form    the same words, ignoring case and spacing [choice: the official code scores these 0, D-18]

    Raises ValueError for any other problem type.
    """
    if problem_type == "multiple choice":
        return prediction.strip() == solution.strip()
    if problem_type in ("numerical", "regression"):
        got, want = to_number(prediction), to_number(solution)
        if got is None or want is None:
            return False
        if problem_type == "regression":
            return abs(got - want) <= 0.05 * abs(want)
        as_decimal = [any(mark in text for mark in ".,") for text in (prediction, solution)]
        return as_decimal[0] == as_decimal[1] and round(got, 2) == round(want, 2)
    if problem_type in ("OCR", "free-form"):
        return prediction.casefold().split() == solution.casefold().split()
    raise ValueError(f"unknown problem type {problem_type!r}")
