"""reasoning.py: prompts out, responses in; the format is rewarded strictly and parsed leniently."""

import re
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reasoning
from reasoning import FOUR_STAGES, PROBLEM_TYPES, TWO_STAGES, Stages

pytestmark = pytest.mark.quick
BODY = {"prethink": "top left", "caption": "a red ball", "think": "the ball is red", "answer": "A"}
PART = {tag: f"<{tag}>{body}</{tag}>" for tag, body in BODY.items()}
GOOD = "".join(PART.values())
# D-19b
OFFICIAL = (
    r"<prethink>.*?</prethink>\s*<caption>.*?</caption>\s*<think>.*?</think>\s*<answer>.*?</answer>"
)

exact = settings(derandomize=True, deadline=None)
bodies = (
    st.text(max_size=30)
    .map(str.strip)
    .filter(lambda text: text and "<" not in text and ">" not in text)
)


# --- the format reward ----------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["", " ", "\n", "\r\n\t "])
def test_a_complete_response_earns_the_format_reward(
    gap,
):
    """A complete response earns the format reward whatever white space lies between stages."""
    assert reasoning.format_reward(gap + gap.join(PART.values()) + gap) == 1.0


def test_bodies_may_be_of_any_length_and_hold_other_markup():
    """Bodies may be one character or many lines. They may hold other markup."""
    assert reasoning.format_reward(GOOD.replace("the ball is red", "x")) == 1.0
    assert (
        reasoning.format_reward(
            GOOD.replace("the ball is red", "\n\nfirst 1 < 2,\n<b>then</b> 3 > 2\n")
        )
        == 1.0
    )


@pytest.mark.parametrize("tag", FOUR_STAGES)
def test_every_stage_is_needed(tag):
    assert reasoning.format_reward(GOOD.replace(PART[tag], "")) == 0.0


@pytest.mark.parametrize("blank", ["", " ", "\n \t"])
@pytest.mark.parametrize("tag", FOUR_STAGES)
def test_an_empty_stage_is_refused(tag, blank):
    assert reasoning.format_reward(GOOD.replace(BODY[tag], blank)) == 0.0


@pytest.mark.parametrize("tag", FOUR_STAGES)
def test_a_duplicated_stage_is_refused(tag):
    """A duplicated stage is refused although the official expression lets it pass."""
    twice = GOOD.replace(PART[tag], PART[tag] * 2)
    assert reasoning.format_reward(twice) == 0.0
    assert re.fullmatch(OFFICIAL, twice, re.DOTALL)


@pytest.mark.parametrize("inner", FOUR_STAGES)
@pytest.mark.parametrize("outer", FOUR_STAGES)
def test_a_nested_stage_is_refused(outer, inner):
    assert reasoning.format_reward(GOOD.replace(BODY[outer], f"one {PART[inner]} two")) == 0.0
    # each tag once, but one inside another
    moved = GOOD if inner == outer else GOOD.replace(PART[inner], "")
    assert reasoning.format_reward(moved.replace(BODY[outer], f"one {PART[inner]} two")) == 0.0


def test_of_the_24_orders_only_the_paper_s_is_rewarded():
    rewarded = [
        order
        for order in permutations(FOUR_STAGES)
        if reasoning.format_reward("".join(map(PART.get, order)))
    ]
    assert rewarded == [("prethink", "caption", "think", "answer")]


@pytest.mark.parametrize("place", range(5))
def test_text_outside_the_stages_is_refused(place):
    parts = list(PART.values())
    assert reasoning.format_reward("".join([*parts[:place], "Sure.", *parts[place:]])) == 0.0


@pytest.mark.parametrize("tag", FOUR_STAGES)
def test_unclosed_unopened_and_reversed_tags_are_refused(tag):
    assert reasoning.format_reward(GOOD.replace(f"</{tag}>", "")) == 0.0
    assert reasoning.format_reward(GOOD.replace(f"<{tag}>", "")) == 0.0
    assert reasoning.format_reward(GOOD.replace(PART[tag], f"</{tag}>{BODY[tag]}<{tag}>")) == 0.0
    assert reasoning.format_reward(GOOD.replace(BODY[tag], BODY[tag] + f"<{tag}>")) == 0.0


def test_four_and_two_stage_responses_are_not_interchangeable():
    two = PART["think"] + "\n" + PART["answer"]
    assert reasoning.format_reward(two, four_stage=False) == 1.0
    assert reasoning.format_reward(two) == 0.0
    assert reasoning.format_reward(GOOD, four_stage=False) == 0.0
    assert reasoning.format_reward(PART["caption"] + two, four_stage=False) == 0.0
    assert (
        reasoning.format_reward(two.replace(BODY["think"], PART["caption"]), four_stage=False)
        == 0.0
    )
    assert reasoning.format_reward(PART["answer"] + PART["think"], four_stage=False) == 0.0
    assert TWO_STAGES == ("think", "answer")


def test_tags_are_matched_exactly():
    assert reasoning.format_reward(GOOD.replace("caption>", "Caption>")) == 0.0
    assert reasoning.format_reward(GOOD.replace("caption>", "caption >")) == 0.0
    assert reasoning.format_reward("") == 0.0


@exact
@given(
    st.lists(
        st.sampled_from([*PART.values(), *(f"<{t}>" for t in FOUR_STAGES), "</answer>", "a", " "]),
        max_size=8,
    )
)
def test_what_earns_the_reward_parses_into_four_full_stages(pieces):
    """Whatever earns the reward parses into four stages that are not empty."""
    text = "".join(pieces)
    if reasoning.format_reward(text):
        assert all(vars(reasoning.parse(text)).values())
        assert [text.count(f"<{tag}>") for tag in FOUR_STAGES] == [1, 1, 1, 1]


@exact
@given(bodies, bodies, bodies, bodies)
def test_rendered_stages_earn_the_reward_and_parse_back(prethink, caption, think, answer):
    """Rendered stages earn the reward. They parse back into themselves."""
    stages = Stages(prethink, caption, think, answer)
    text = reasoning.render(stages)
    assert reasoning.format_reward(text) == 1.0
    assert reasoning.parse(text) == stages


# --- parsing --------------------------------------------------------------------------------------


def test_a_response_is_taken_apart_into_its_stages():
    assert reasoning.parse(GOOD) == Stages("top left", "a red ball", "the ball is red", "A")


def test_the_first_occurrence_of_a_tag_counts():
    assert reasoning.parse("<answer>A</answer><answer>B</answer>").answer == "A"
    assert reasoning.parse("<think><answer>B</answer></think><answer>A</answer>").answer == "B"
    assert reasoning.parse("<think>a <think>b</think> c</think>").think == "a <think>b"


def test_a_missing_stage_is_none_and_an_empty_one_is_empty():
    """A stage that is not there is None. An empty one is the empty string."""
    assert reasoning.parse("no tags at all") == Stages(None, None, None, None)
    assert reasoning.parse("<caption></caption><think> \n</think>") == Stages(caption="", think="")
    assert reasoning.parse("<answer>A").answer is None
    assert reasoning.parse("A</answer>").answer is None
    assert reasoning.parse("</answer>A<answer>").answer is None


def test_parsing_keeps_inner_lines_and_ignores_order():
    """Parsing strips white space and keeps inner lines. It ignores order and surroundings."""
    text = "Well: <answer> A\n</answer> and <caption>\n two\nlines </caption>."
    assert reasoning.parse(text) == Stages(caption="two\nlines", answer="A")


def test_render_leaves_out_absent_stages_and_keeps_the_order():
    """Rendering leaves out absent stages. It keeps empty ones and the order."""
    stages = Stages(answer="A", think="", prethink="x")
    assert reasoning.render(stages) == "<prethink>x</prethink><think></think><answer>A</answer>"
    assert reasoning.render(Stages()) == ""


# --- prompts --------------------------------------------------------------------------------------


def test_the_question_lists_the_options_one_a_line():
    assert (
        reasoning.question("Which?", ["A. red", "B. blue"]) == "Which?\nOptions:\nA. red\nB. blue"
    )
    assert reasoning.question("How many?") == "How many?"
    assert reasoning.question("How many?", []) == "How many?"


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_prompt_asks_for_every_stage_once_and_in_order(
    problem_type,
):
    """The prompt holds the question. It asks for every stage once in the order that is rewarded."""
    for four_stage, stages in ((True, FOUR_STAGES), (False, TWO_STAGES)):
        text = reasoning.prompt("Which?", ["A. red"], problem_type, four_stage)
        assert text.startswith("Which?\nOptions:\nA. red\n")
        assert re.findall(r"<(\w+)> ?</(\w+)>", text) == [(tag, tag) for tag in stages]
        assert text.count("<") == 2 * len(stages)
        # copying the instructions earns nothing
        assert reasoning.format_reward(text, four_stage) == 0.0


def test_the_prompt_says_what_the_answer_must_hold():
    endings = {
        kind: reasoning.prompt("Q", (), kind).rsplit("</think>", 1)[1] for kind in PROBLEM_TYPES
    }
    assert "letter" in endings["multiple choice"] and "text" in endings["OCR"]
    assert "number" in endings["numerical"] and "number" in endings["regression"]
    assert "letter" not in endings["free-form"] and "number" not in endings["free-form"]
    with pytest.raises(KeyError):
        reasoning.prompt("Q", (), "essay")


def test_four_stages_are_the_default():
    assert reasoning.prompt("Q", (), "numerical") == reasoning.prompt(
        "Q", (), "numerical", four_stage=True
    )
