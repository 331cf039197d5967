"""answers.py: one verdict on an answer, by the official strict rule and by the lenient one."""

import math
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import answers

pytestmark = pytest.mark.quick
KINDS = ("multiple choice", "numerical", "regression", "OCR", "free-form")
exact = settings(derandomize=True, deadline=None)
numbers = st.one_of(
    st.integers(-(10**9), 10**9).map(str), st.floats(-1e6, 1e6).map(lambda x: f"{x:.3f}")
)


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("A", True),
        (" A\n", True),
        ("B", False),
        ("a", False),
        ("A.", False),
        ("(A)", False),
        ("", False),
    ]
    + [
        ("A or B", False),
        ("A, B, C, D", False),
        ("ABCD", False),
        ("A A", False),
        ("the answer is A", False),
    ],
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
    + [
        ("no entry!", "no entry", False),
        ("noentry", "no entry", False),
        ("entry no", "no entry", False),
    ]
    + [("no entry or exit", "no entry", False), ("", "no entry", False)],
)
def test_text_is_compared_word_by_word_without_case_and_spacing(kind, prediction, solution, right):
    assert answers.is_correct(prediction, solution, kind) is right


@pytest.mark.parametrize("kind", ["numerical", "regression"])
@pytest.mark.parametrize(
    "text", ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999", "1,e,999"]
)
def test_nan_and_infinity_are_never_right(kind, text):
    """NaN and infinity are wrong even against themselves."""
    assert answers.to_number(text) is None
    assert answers.is_correct(text, text, kind) is False
    assert answers.is_correct(text, "5", kind) is False
    assert answers.is_correct("5", text, kind) is False


def test_an_unknown_problem_type_is_an_error():
    """An unknown problem type is an error and not a wrong answer."""
    with pytest.raises(ValueError, match="essay"):
        answers.is_correct("A", "A", "essay")
    with pytest.raises(ValueError):
        answers.is_correct("A", "A", "Multiple Choice")


@pytest.mark.parametrize(
    "text, number",
    [("12", 12.0), ("1,204.5", 1204.5), ("-0.5", -0.5), (" 7\n", 7.0), ("1e3", 1000.0), ("0", 0.0)]
    + [
        ("", None),
        (",", None),
        ("A", None),
        ("1 2", None),
        ("50%", None),
        ("1.2.3", None),
        ("--1", None),
    ],
)
def test_to_number_reads_one_finite_number_or_none(text, number):
    assert answers.to_number(text) == number


def test_the_answer_stage_is_judged_or_the_whole_response():
    """The answer stage is judged. The whole response is judged where that stage is missing."""
    assert answers.extract(" A\n", "<answer> A\n</answer>") == "A"
    assert answers.extract(None, " A \n") == "A"
    assert answers.extract("", "A") == ""  # an empty answer stage is an answer, and wrong


def test_the_solution_is_taken_out_of_its_tags():
    assert answers.solution_of("<answer>A</answer>") == "A"
    assert answers.solution_of(" <answer> 1,204.5 </answer>\n") == "1,204.5"
    assert answers.solution_of(" A ") == "A"
    assert answers.solution_of("<answer>A") == "<answer>A"
    assert answers.solution_of("A</answer>") == "A</answer>"
    assert answers.solution_of("<think>\nB?\n</think>\n<answer> A </answer>") == "A"
    assert (
        answers.solution_of("<answer>A</answer><answer>B</answer>")
        == "<answer>A</answer><answer>B</answer>"
    )


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
def test_every_finite_number_is_right_against_itself(number, kind):
    """Every finite number is right against itself. White space around it is ignored."""
    assert answers.is_correct(f" {number}\n", number, kind)


@exact
@given(numbers, numbers)
def test_the_numerical_verdict_is_symmetric(a, b):
    assert answers.is_correct(a, b, "numerical") == answers.is_correct(b, a, "numerical")


@exact
@given(st.integers(-(10**9), 10**9))
def test_a_whole_number_never_equals_the_same_with_a_decimal(n):
    """A whole number and the same number with a decimal are never equal."""
    assert not answers.is_correct(f"{n}", f"{n}.0", "numerical")
    # "1,000" is not "1000"
    assert answers.is_correct(f"{n:,}", f"{n}", "numerical") is (abs(n) < 1000)


@exact
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_whole_numbers_are_right_only_when_equal(n, offset):
    assert not answers.is_correct(str(n + offset), str(n), "numerical")
    assert not answers.is_correct(str(n - offset), str(n), "numerical")


# --- the lenient rule -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "(b)",
        "B.",
        "(B).",
        "B)",
        "B) a cat",
        "B. a cat",
        "B: a cat",
        "(B) a cat",
        "**B**",
        '"B"',
        "B\n",
    ]
    + [
        "The answer is (B).",
        "the correct answer is B",
        "Answer: B",
        "answer B",
        "Option B",
        "It's B",
        "It is b.",
    ]
    + [
        "So, the answer is: B. a cat",
        "**The final answer is B**",
        "B. a cat or a dog",
        "B. above the table",
        "B. No",
        "B. No, it is not",
        "B. None of the above",
        "B. not visible",
        "Therefore the best choice is B",
    ],
)
def test_a_letter_is_read_out_of_the_words_around_it(text):
    assert answers.is_correct(text, "B", "multiple choice", lenient=True)
    assert not any(
        answers.is_correct(text, other, "multiple choice", lenient=True) for other in "ACD"
    )


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "B or A",
        "A, B, C, D",
        "A. B. C. D.",
        "A B C D",
        "ABCD",
        "A/B",
        "(A)(B)",
        "A. a cat or B. a dog",
        "B. or A",
    ]
    + [
        "not B",
        "B, or maybe A",
        "A. a cat\nB. a dog",
        "B. a cat, not A",
        "a. a cat or b. a dog",
        "either A or B",
        "A and B",
    ]
    + ["a cat", "A cat", "", "(", "()", "B (or A)", "I think A, but B", "option", "The answer is"]
    + ["B. or A maybe", "B. is wrong", "B. not A", "B. a cat, or C"],
)
def test_what_hedges_or_names_no_letter_is_wrong(text):
    """A text that hedges or names no letter is wrong whichever letter is right."""
    assert answers.read(text, "multiple choice") is None
    assert not any(
        answers.is_correct(text, letter, "multiple choice", lenient=True) for letter in "ABCD"
    )


@pytest.mark.parametrize(
    "text, solution",
    [
        ("5", "5.0"),
        ("5.0", "5"),
        ("1,000", "1000"),
        ("$1,200", "1200"),
        ("50%", "50"),
        ("50 %", "50"),
        ("12 cm", "12"),
    ]
    + [
        ("12 cm2", "12"),
        ("12 m^2", "12"),
        ("about 5", "5"),
        ("The answer is 5.", "5"),
        ("5 apples", "5"),
        ("+7", "7"),
    ]
    + [
        ("Two", "2"),
        ("two cats.", "2"),
        ("There: 3", "3"),
        ("-4.50 degrees", "-4.5"),
        ("1e3", "1000"),
        (".5", "0.5"),
    ]
    + [
        ("\u22125", "-5"),
        ("$-5", "-5"),
        ("\u20135", "-5"),
        ("20 km/h", "20"),
        ("3 T-shirts", "3"),
        ("5-year-old", "5"),
        ("3", "3 apples"),
        ("The total is $2,345.67", "2345.67"),
    ],
)
def test_a_number_is_read_out_of_units_commas_and_percent(text, solution):
    assert answers.is_correct(text, solution, "numerical", lenient=True)
    assert not answers.is_correct(text, "99", "numerical", lenient=True)


@pytest.mark.parametrize(
    "text",
    [
        "5 or 6",
        "5, 6",
        "5-6",
        "1/2",
        "2:30",
        "3,14",
        "1,0000",
        "1.2.3",
        "not 5",
        "isn't 5",
        "at least 5",
        "more than 5",
    ]
    + [
        "between 5",
        "two or three",
        "nan",
        "inf",
        "1e999",
        "H2O",
        "",
        "many",
        "5 apples and 6 pears",
        "5 5",
    ]
    + [
        "-$5",
        "minus 5",
        "- 5",
        "10^6",
        "5 million",
        "five hundred",
        "two thirds",
        "12½",
        "over 5",
        ">5",
        "up to 5",
    ]
    + [
        "5+",
        "never 5",
        "5 or six",
        "five or 6",
        "half of 5",
        "forty two",
        "twenty one",
        "5 millions",
        "5k",
        "10 dozen",
        "5²",
        "3*4",
        "two hundreds",
        "one fifth",
        "3 - 4",
        "$ - 5",
    ],
)
def test_two_numbers_a_bound_a_denial_or_none_is_no_number(text):
    assert answers.read(text, "numerical") is None
    assert not answers.is_correct(text, "5", "numerical", lenient=True)


def test_lenient_keeps_five_percent_and_ignores_punctuation():
    """Lenient regression still wants five percent. Lenient words ignore punctuation."""
    assert answers.is_correct("about 104 m", "100", "regression", lenient=True)
    assert not answers.is_correct("about 106 m", "100", "regression", lenient=True)
    assert answers.is_correct("The answer is: No entry!", "no entry", "free-form", lenient=True)
    assert answers.is_correct("a cat", "Cat.", "OCR", lenient=True)
    assert not answers.is_correct("a cat or a dog", "cat", "free-form", lenient=True)
    assert not answers.is_correct("!!", "??", "OCR", lenient=True)
    with pytest.raises(ValueError, match="essay"):
        answers.is_correct("A", "A", "essay", lenient=True)


@exact
@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from(KINDS))
def test_what_is_right_strictly_is_right_leniently(prediction, solution, kind):
    """An answer that is right by the strict rule is right by the lenient one."""
    assert answers.is_correct(prediction, solution, kind, lenient=True) in (True, False)
    if answers.is_correct(prediction, solution, kind):
        assert answers.is_correct(prediction, solution, kind, lenient=True)


@exact
@given(
    st.lists(st.sampled_from("ABCDEFGH"), min_size=2, max_size=5, unique=True),
    st.sampled_from([" ", ", ", " or ", "/", ". ", ") "]),
)
def test_no_list_of_letters_is_right_for_any_of_them(letters, joint):
    text = joint.join(letters)
    assert not any(answers.is_correct(text, x, "multiple choice", lenient=True) for x in letters)


@exact
@given(numbers, numbers, st.sampled_from([" or ", ", ", " and ", " to ", "/"]))
def test_no_pair_of_different_numbers_is_right_for_either(a, b, joint):
    assume(round(float(a), 2) != round(float(b), 2))
    for solution in (a, b):
        assert not answers.is_correct(f"{a}{joint}{b}", solution, "numerical", lenient=True)


@exact
@given(
    st.sampled_from("ABCDEFGH"),
    st.sampled_from(["{}", "({})", "{}.", "The answer is {}", "Answer: ({})", "{}. red"]),
)
def test_every_usual_form_is_right_for_its_letter_only(letter, form):
    """Every usual form is right for its letter and for no other."""
    text = form.format(letter)
    right = [x for x in "ABCDEFGH" if answers.is_correct(text, x, "multiple choice", lenient=True)]
    assert right == [letter]


# --- several answers, and how text is stored ------------------------------------------------------


@exact
@given(
    st.text(max_size=12),
    st.lists(st.text(max_size=12), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.booleans(),
)
def test_of_several_answers_any_is_right_and_nothing_else(prediction, accepted, kind, lenient):
    want = any([answers.is_correct(prediction, one, kind, lenient) for one in accepted])
    assert answers.is_correct(prediction, answers.Answers(*accepted), kind, lenient) is want
    assert answers.is_correct(accepted[-1], answers.Answers(*accepted), "OCR", lenient)
    assert answers.Answers(*accepted) == accepted[0]


@exact
@given(
    st.text(st.characters(categories=["L", "M", "N", "Z"]), max_size=12),
    st.sampled_from(["OCR", "free-form"]),
)
def test_composed_and_decomposed_text_is_the_same(text, kind):
    """Two forms of one text, by the interpreter's own Unicode tables."""
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    for lenient in (False, True):
        verdicts = {
            answers.is_correct(a, b, kind, lenient) for a in (text, *forms) for b in (text, *forms)
        }
        assert verdicts == {True}


def test_combining_marks_are_part_of_a_word():
    """Hindi's vowels are marks: without them "ki" and "ka" were one word."""
    ki, ka = "\u0915\u0940", "\u0915\u093e"
    assert answers.is_correct(f"{ki}!", ki, "free-form", lenient=True)
    assert not answers.is_correct(ki, ka, "free-form", lenient=True)
    assert not answers.is_correct("Zu\u0308rich", "Zurich", "OCR", lenient=True)


def test_full_width_forms_are_read_by_the_lenient_rule_only():
    wide = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
    for text, solution, kind in (
        ("B", "B", "multiple choice"),
        ("(B)", "B", "multiple choice"),
        ("Exit", "exit", "OCR"),
    ):
        assert answers.is_correct(text.translate(wide), solution, kind, lenient=True)
        assert not answers.is_correct(text.translate(wide), solution, kind)
    assert answers.is_correct("50%".translate(wide), "50", "numerical", lenient=True)
    for text in (
        ">5",
        "5-6",
        "1/2",
        "A/B",
        "A or B",
    ):  # what hedges in plain letters hedges in wide ones
        assert not any(
            answers.is_correct(text.translate(wide), x, "numerical", lenient=True) for x in "1256"
        )
        assert not any(
            answers.is_correct(text.translate(wide), x, "multiple choice", lenient=True)
            for x in "AB"
        )
