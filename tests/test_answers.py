"""answers.py: one verdict on an answer, the official strict rule."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import answers

KINDS = ("multiple choice", "numerical", "regression", "OCR", "free-form")
exact = settings(derandomize=True, deadline=None)
numbers = st.one_of(st.integers(-(10**9), 10**9).map(str), st.floats(-1e6, 1e6).map(lambda x: f"{x:.3f}"))


@pytest.mark.parametrize(
    "prediction, right",
    [("A", True), (" A\n", True), ("B", False), ("a", False), ("A.", False), ("(A)", False), ("", False)]
    + [("A or B", False), ("A, B, C, D", False), ("ABCD", False), ("A A", False), ("the answer is A", False)],
)
def test_multiple_choice_wants_the_letter_and_nothing_else(prediction, right):
    assert answers.is_correct(prediction, "A", "multiple choice") is right


@pytest.mark.parametrize(
    "prediction, solution, right",
    [
        ("5", "5", True),
        (" 5 ", "5", True),
        ("-5", "5", False),
        ("5", "5.0", False),  # official: both or neither written as a decimal
        ("5.0", "5", False),
        ("5.0", "5.00", True),
        ("1,000", "1000", False),  # official: a comma counts as a decimal mark
        ("1000", "1,000", False),
        ("1,000", "1,000", True),
        ("1,000", "1000.0", True),
        ("1,204.5", "1204.50", True),
        ("0.104", "0.10", True),  # equal to two decimals
        ("0.106", "0.10", False),
        ("0.11", "0.10", False),
        ("3.14159", "3.14", True),
        ("4", "5", False),
        ("50%", "50", False),
        ("5 apples", "5", False),
        ("5 or 6", "5", False),
        ("", "5", False),
        ("5", "", False),
    ],
)
def test_numbers_must_be_written_alike_and_agree_to_two_decimals(prediction, solution, right):
    assert answers.is_correct(prediction, solution, "numerical") is right


@pytest.mark.parametrize(
    "prediction, solution, right",
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("100", "105.2", True),  # 5.2 <= 5.26: the measure is the solution, not the prediction
        ("105.2", "100", False),
        ("-98", "-100", True),
        ("98", "-100", False),
        ("0", "0", True),
        ("0.001", "0", False),
        ("1,000.0", "1000", True),  # the way it is written does not matter here
        ("ten", "10", False),
    ],
)
def test_regression_allows_five_percent_of_the_solution(prediction, solution, right):
    assert answers.is_correct(prediction, solution, "regression") is right


@pytest.mark.parametrize("kind", ["OCR", "free-form"])
@pytest.mark.parametrize(
    "prediction, solution, right",
    [("Exit", "EXIT", True), ("  no \n entry", "No Entry", True), ("straße", "STRASSE", True)]
    + [("no entry!", "no entry", False), ("noentry", "no entry", False), ("entry no", "no entry", False)]
    + [("no entry or exit", "no entry", False), ("", "no entry", False)],
)
def test_text_is_compared_word_by_word_without_case_and_spacing(kind, prediction, solution, right):
    assert answers.is_correct(prediction, solution, kind) is right


@pytest.mark.parametrize("kind", ["numerical", "regression"])
@pytest.mark.parametrize("text", ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999", "1,e,999"])
def test_nan_and_infinity_are_never_right_not_even_against_themselves(kind, text):
    assert answers.to_number(text) is None
    assert answers.is_correct(text, text, kind) is False
    assert answers.is_correct(text, "5", kind) is False
    assert answers.is_correct("5", text, kind) is False


def test_an_unknown_problem_type_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match="essay"):
        answers.is_correct("A", "A", "essay")
    with pytest.raises(ValueError):
        answers.is_correct("A", "A", "Multiple Choice")


@pytest.mark.parametrize(
    "text, number",
    [("12", 12.0), ("1,204.5", 1204.5), ("-0.5", -0.5), (" 7\n", 7.0), ("1e3", 1000.0), ("0", 0.0)]
    + [("", None), (",", None), ("A", None), ("1 2", None), ("50%", None), ("1.2.3", None), ("--1", None)],
)
def test_to_number_reads_one_finite_number_or_none(text, number):
    assert answers.to_number(text) == number


def test_the_answer_stage_is_judged_and_without_one_the_whole_response():
    assert answers.extract(" A\n", "<answer> A\n</answer>") == "A"
    assert answers.extract(None, " A \n") == "A"
    assert answers.extract("", "A") == ""  # an empty answer stage is an answer, and wrong


def test_the_solution_is_taken_out_of_its_tags():
    assert answers.solution_of("<answer>A</answer>") == "A"
    assert answers.solution_of(" <answer> 1,204.5 </answer>\n") == "1,204.5"
    assert answers.solution_of(" A ") == "A"
    assert answers.solution_of("<answer>A") == "<answer>A"
    assert answers.solution_of("A</answer>") == "A</answer>"


@exact
@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from(KINDS))
def test_no_text_makes_the_verdict_fail(prediction, solution, kind):
    assert answers.is_correct(prediction, solution, kind) in (True, False)
    number = answers.to_number(prediction)
    assert number is None or math.isfinite(number)


@exact
@given(st.text(max_size=12), st.sampled_from("ABCDEFGH"))
def test_whatever_holds_more_than_the_letter_is_wrong(text, letter):
    assume(text.strip())
    assert not answers.is_correct(letter + text, letter, "multiple choice")
    assert not answers.is_correct(text + letter, letter, "multiple choice")


@exact
@given(numbers, st.sampled_from(["numerical", "regression"]))
def test_every_finite_number_is_right_against_itself_and_white_space_is_ignored(number, kind):
    assert answers.is_correct(f" {number}\n", number, kind)


@exact
@given(numbers, numbers)
def test_the_numerical_verdict_is_symmetric(a, b):
    assert answers.is_correct(a, b, "numerical") == answers.is_correct(b, a, "numerical")


@exact
@given(st.integers(-(10**9), 10**9))
def test_a_whole_number_and_the_same_number_with_a_decimal_are_never_equal(n):
    assert not answers.is_correct(f"{n}", f"{n}.0", "numerical")
    assert answers.is_correct(f"{n:,}", f"{n}", "numerical") is (abs(n) < 1000)  # "1,000" is not "1000"


@exact
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_whole_numbers_are_right_only_when_equal(n, offset):
    assert not answers.is_correct(str(n + offset), str(n), "numerical")
    assert not answers.is_correct(str(n - offset), str(n), "numerical")
