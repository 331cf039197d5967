"""corruption.py: each corruption on photographs, and what it must never do."""

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter

import answers
import corruption

pytestmark = pytest.mark.quick
PHOTO = Image.fromarray(skimage.data.astronaut()).resize((96, 64))
CLIP = [Image.fromarray(skimage.data.chelsea()).crop((x, 0, x + 80, 50)) for x in range(0, 30, 10)]
CHANGES = {
    "blank": corruption.blank,
    "blur": lambda media: corruption.blur(media, 2.0),
    "occlude": lambda media: corruption.occlude(media, 3, "row"),
}


def pixels(media: corruption.Media) -> list[tuple]:
    frames = media if isinstance(media, list) else [media]
    return [(frame.mode, frame.size, frame.tobytes()) for frame in frames]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("media", [PHOTO, CLIP], ids=["picture", "clip"])
def test_size_stays_and_the_input_is_untouched(kind, media):
    before = pixels(media)
    changed = CHANGES[kind](media)
    assert pixels(media) == before != pixels(changed) == pixels(CHANGES[kind](media))
    assert [size for _, size, _ in pixels(changed)] == [size for _, size, _ in before]
    assert isinstance(changed, list) == isinstance(media, list)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("kind", CHANGES)
def test_every_mode_of_pillow_is_taken(kind, mode):
    image = Image.new("I;16", (9, 7), 300) if mode == "I;16" else PHOTO.convert(mode)
    before = image.tobytes()
    changed = CHANGES[kind](image)
    assert changed.size == image.size and changed.mode == "RGB" and image.tobytes() == before


def test_blank_is_one_colour_that_the_processor_makes_zero():
    """Qwen2.5-VL's normalisation brings mid-grey nearer to 0 than black or white."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor()
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    seen = [np.abs((np.array([level] * 3) / 255 - mean) / std).max() for level in (0, 128, 255)]
    assert corruption.blank(PHOTO).getcolors() == [(96 * 64, (128, 128, 128))]
    assert seen[1] < 0.4 and seen[0] > 1.4 and seen[2] > 1.8


def test_blur_is_pillow_s_gaussian():
    want = PHOTO.filter(ImageFilter.GaussianBlur(2.0))
    assert corruption.blur(PHOTO, 2.0).tobytes() == want.tobytes()
    assert corruption.blur(PHOTO, 0).tobytes() == PHOTO.tobytes()
    with pytest.raises(ValueError, match="sigma must be 0 or more, got -1"):
        corruption.blur(PHOTO, -1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_is_covered_and_nothing_else_changes(share):
    """On a white picture, the grey pixels are a rectangle of that area."""
    white = Image.new("RGB", (200, 150), "white")
    for id in map(str, range(20)):
        grey = (np.asarray(corruption.occlude(white, 0, id, share)) == 128).all(-1)
        assert grey.mean() == pytest.approx(share, abs=0.01)
        if share:
            rows, columns = np.nonzero(grey.any(1))[0], np.nonzero(grey.any(0))[0]
            assert grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    with pytest.raises(ValueError, match="share must lie in"):
        corruption.occlude(white, 0, "a", 1.5)


def test_places_differ_by_sample_and_seed_and_not_by_frame():
    white = [Image.new("RGB", (200, 150), "white")] * 3
    places = {(s, i): pixels(corruption.occlude(white, s, i)) for s in (0, 1) for i in "abc"}
    assert all(len(set(frames)) == 1 for frames in places.values())
    assert len({frames[0] for frames in places.values()}) == 6


# --- another sample's -----------------------------------------------------------------------------


def test_every_other_picture_has_its_turn_and_its_own_has_none():
    pool = [(f"picture {i // 2}", f"row {i}") for i in range(8)]
    drawn = {corruption.random_media(pool, "picture 1", seed, "row 2") for seed in range(80)}
    assert drawn == {f"row {i}" for i in (0, 1, 4, 5, 6, 7)}
    for own in ([], pool[2:4]):
        with pytest.raises(ValueError, match="row 2: there are no other media of its kind"):
            corruption.random_media(own, "picture 1", 0, "row 2")


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "left"),
    [
        ("AB is 5.2. Find x. Round to the nearest tenth.", "Round to the nearest tenth."),
        ("Is there a dog in the image? Please answer yes or no.", "Please answer yes or no."),
        ("<image>\nWhat is shown?\nA. cat\nB. dog", "<image>\nA. cat\nB. dog"),
        ("Which? (A) 3 (B) 4\nAnswer with the option's letter from the given choices directly.",
         "(A) 3 (B) 4\nAnswer with the option's letter from the given choices directly."),
        ("Hint: Please answer the question and provide the correct option letter, e.g., A, B, at "
         "the end.\nQuestion: What is it?\nChoices:\n(A) 1\n(B) 2",
         "Hint: Please answer the question and provide the correct option letter, e.g., A, B, at "
         "the end.\nChoices:\n(A) 1\n(B) 2"),
        ("Q: How many dogs?\n\nA. 1\nB. 2", "A. 1\nB. 2"),
        ("find x. answer in degrees.", "answer in degrees."),
        ("Compare <image> and <image>. Which is larger?", "<image> <image>"),
        ("Which? (A) <image> (B) <image>", "(A) <image> (B) <image>"),
        ("", ""),
    ],
)  # fmt: skip
def test_conditions_and_question_go_options_and_form_stay(problem, left):
    assert corruption.remove_text(problem) == left
    assert corruption.remove_text(left) == left


@pytest.mark.parametrize(
    "problem",
    [
        "In triangle ABC, AB = 5 and angle C is 30 degrees.",
        "Write the number of apples in the basket.",
        "Point A. B lies on C. What is AB?",
        "Answer yes or no: is there a snowboard in the image?",
        "Please answer the following question: is there a dog in the image?",
        "Answer the question based on the image: How many dogs are there?",
        "Round the length of AB to the nearest tenth.",
        "Pick the option that describes the tallest bar in the chart.",
        "Choose the letter of the shape that has 4 sides.",
        "Please write the answer that is shown on the whiteboard.",
        "Report the results shown in the table for 2019.",
        "Q: what is x?",
        "A. Jones is on the left. Who is on the right?",
        "S: 5, T: 7. Find S.",
        "What is the difference between point (A) and point (B) in the figure?",
        "If vitamin A: 5 mg and vitamin B: 7 mg, what is the total?",
        "In the figure: (A) is 5 and (B) is 7. Find their sum.",
    ],
)
def test_no_question_survives(problem):
    assert corruption.remove_text(problem) == ""


@pytest.mark.parametrize(
    "text",
    [
        *("(A)cat\n(B)dog", "A.cat\nB.dog", "**A.** cat\n**B.** dog", "- A. cat\n- B. dog"),
        *("[A] cat\n[B] dog", "A - cat\nB - dog", "1. cat\n2. dog", "Choices: A.3 B.4 C.5"),
        *("Use a single word or phrase.", "Output only the number.", "Just give the letter."),
        *("The final answer MUST BE put in \\boxed{}.", "(Unit: years)", "请用一个数字回答。"),
        *("Answer yes or no.", "Round your answer to two decimal places."),
        *("Please select the correct answer from the options above.",),
        *("Answer the question using a single word or phrase.",),
        "Please provide only the single option letter (e.g., A, B, C, D, etc.) within the <answer> "
        "</answer> tags.",
    ],
)
def test_no_option_and_no_form_is_lost(text):
    assert corruption.remove_text(f"How many are there?\n{text}").split() == text.split()


# --- false hints ----------------------------------------------------------------------------------

QUESTIONS = [
    (["A. red", "B. green", "C. blue"], "B", "multiple choice"),
    (["(A) red", "(B) green"], "A", "multiple choice"),
    (["A. red", "B. red", "C. blue"], "A", "multiple choice"),  # B says what is right
    (["A. red ", "B. blue"], "Red", "free-form"),
    (["A. 5 cm", "B. 7 cm"], "5", "numerical"),
    ([], "3", "numerical"),
    ([], "0", "numerical"),
    ([], "-7", "numerical"),
    ([], "4.5", "regression"),
    ([], "1,204", "numerical"),
    ([], "100", "regression"),
    ([], "Yes", "free-form"),
]


@pytest.mark.parametrize(("options", "answer", "kind"), QUESTIONS)
def test_a_hint_is_never_right(options, answer, kind):
    """By the rule that judges answers, strict and lenient."""
    hints = set()
    for seed in range(60):
        said = corruption.mislead("What is it?", options, answer, seed, "row")
        question, hint = said.split("\nHint: the answer is ")
        assert question == "What is it?" and hint.endswith(".")
        assert not answers.is_correct(hint[:-1], answer, kind, lenient=True)
        assert hint[:-1] != "B. red" or options != QUESTIONS[2][0]
        hints.add(hint)
    assert hints and (len(hints) > 1 or len(options) != 3 or options == QUESTIONS[2][0])


def test_a_hint_is_none_of_several_accepted_answers():
    several = answers.Answers("A", "B")
    options = ["A. red", "B. crimson", "C. blue"]
    said = {corruption.mislead("Q", options, several, seed, "x") for seed in range(30)}
    assert said == {"Q\nHint: the answer is C. blue."}


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ([], "a cat"),
        (["A. red"], "A"),
        (["A. red", "B. blue"], "C"),
        ([], answers.Answers("yes", "no")),
    ],
)
def test_no_false_answer_is_invented(options, answer):
    with pytest.raises(ValueError, match="row: no false answer is known"):
        corruption.mislead("What is it?", options, answer, 0, "row")
