"""Scenes of coloured shapes on a grid, questions about them, and a prior that a model can fall for.

What RL does to a real model is only worth copying if the ingredients are copied too. Each has its
counterpart in real training:

    here                                              there
    a prior: every shape has a usual colour, row,     language priors of a pretrained model: what is
    direction and companion                           usual is said, whatever the picture shows
    the base policy answers without a description     any VLM trained on VQA: an answer does not
    (`models.direct_case`)                            need the caption before it
    cold-start captions follow the prior in           rationales distilled from a model that was
    FLAW_CAPTION of the rows, thoughts and answers    told the answer: they describe what is not
    in FLAW_ANSWER, independently                     there and conclude what is right
    cold-start pictures are mostly unusual            curated reasoning sets prefer hard pictures
    (COLD_TYPICAL)
    RL never asks for existence (RL_KINDS), the       POPE and VideoHallucer measure what RL data
    test sets do in a fifth, the pairs in all         do not ask
    easy, medium and hard prompts, more than the      RL sets that are filtered by difficulty
    updates consume

So an answer can be right behind a wrong caption, and RL on answers has no reason to mend captions.

The usual value stands in TYPICAL of the cases: 50 %, above chance for colours and directions
(25 %). Of the existence questions, in that share both the shape and its companion are there or
neither is, and one alone in the rest; in the prior-breaking set it is always one. A count is asked
beside a companion in 1 - TYPICAL, and the prior then expects one more.

A question alone, without the picture, is answered right as often as its best constant answer (the
question-only floor):

    rows                                  existence   count   colour   row    motion
    typical = TYPICAL                     60 %        33 %    50 %     50 %   50 %
    typical = 0, the prior-breaking set   60 %        50 %    33 %     50 %   33 %

and in the pairs 50 %, where both questions of a pair may be right together: 50 % of the pairs.
"""

import itertools
import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import av
from PIL import Image, ImageDraw

import reasoning

ROWS = ("top", "bottom")
CELLS = (("northwest", "northeast"), ("southwest", "southeast"))
GRID = len(ROWS)
COLOURS = {
    "red": (240, 70, 70),
    "green": (70, 210, 90),
    "blue": (80, 120, 250),
    "yellow": (250, 220, 60),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
# shape: its typical colour, row, direction and companion
PRIOR = {
    "circle": ("red", "top", "right", "square"),
    "square": ("blue", "bottom", "left", "circle"),
    "triangle": ("green", "bottom", "up", "star"),
    "star": ("yellow", "top", "down", "triangle"),
    "cross": ("red", "bottom", "right", "diamond"),
    "diamond": ("blue", "top", "left", "cross"),
}
KINDS = ("existence", "count", "colour", "row", "motion")
CELL = 28  # pixels: one visual token of Qwen2.5-VL (patches of 14, merged 2 x 2)
# about the mean that the image processor subtracts: shapes stand out from zero
GROUND = (122, 116, 104)
RL_KINDS = KINDS[1:]  # of train.json, in turn
SHARED_KINDS = ("colour", "row", "count")  # of train_shared.json, in turn: three to a picture
TYPICAL = 0.5  # share of objects with their shape's usual colour; the same for rows and directions
COLD_TYPICAL = 0.2  # that share in the cold start
# shares of cold-start rows whose caption, and whose thought and answer, follow the prior, true or
# not
FLAW_CAPTION, FLAW_ANSWER = 0.9, 0.5
SIZES = {
    "cold_start": 2400,
    "train": 1536,
    "train_shared": 1536,
    "test": 400,
    "test_prior_breaking": 300,
    "test_pairs": 300,
}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    row: int
    column: int
    direction: str | None = None  # it moves, in a clip

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def cell(self) -> str:
        return CELLS[self.row][self.column]

    def describe(self) -> str:
        return f"{self.cell} {self.name}" + (f" moving {self.direction}" if self.direction else "")


Scene = tuple[Thing, ...]


# --- scenes and questions -------------------------------------------------------------------------


def pick_colour(rng: random.Random, shape: str, typical: float) -> str:
    usual = PRIOR[shape][0]
    return usual if rng.random() < typical else rng.choice([c for c in COLOURS if c != usual])


def place(
    rng: random.Random, scene: Scene, shape: str, typical: float, usual_row: float | None = None
) -> Scene:
    """The scene with one more object in a free cell. Its colour is the usual one with probability
    `typical`, its row with probability `usual_row` (`typical` unless given), or the other row's
    where all cells of that one are taken."""
    free = [
        (r, c)
        for r in range(GRID)
        for c in range(GRID)
        if (r, c) not in {(t.row, t.column) for t in scene}
    ]
    usual = ROWS.index(PRIOR[shape][1])
    follow = rng.random() < (typical if usual_row is None else usual_row)
    r, c = rng.choice([cell for cell in free if (cell[0] == usual) == follow] or free)
    return (*scene, Thing(shape, pick_colour(rng, shape, typical), r, c))


def start_cell(rng: random.Random, direction: str) -> tuple[int, int]:
    """Where something starts that will cross the grid from one edge to the other."""
    return tuple((d < 0) * (GRID - 1) if d else rng.randrange(GRID) for d in DIRECTIONS[direction])


def make_row(rng: random.Random, kind: str, typical: float = TYPICAL) -> tuple[Scene, dict]:
    """A scene and a question about it. typical=0 gives the prior-breaking set: no colour or
    direction is the usual one, and there is one object fewer than its companion suggests.

    Yes or no and top or bottom are only two, so that never the usual one would be always the other.
    The usual answer is therefore true of 40 % of existence questions there, and of half of those
    for a row (the others' rows stay unusual).
    """
    shape = rng.choice(list(PRIOR))
    companion = PRIOR[shape][3]
    scene: Scene = ()
    if kind == "motion":
        usual = PRIOR[shape][2]
        direction = (
            usual if rng.random() < typical else rng.choice([d for d in DIRECTIONS if d != usual])
        )
        r, c = start_cell(rng, direction)
        scene = (Thing(shape, pick_colour(rng, shape, typical), r, c, direction),)
    else:
        count = {"existence": rng.random() < 0.4, "count": rng.randint(1, 3 if typical else 2)}.get(
            kind, 1
        )
        usual_row = 0.5 if kind == "row" and typical == 0 else typical
        for _ in range(int(count)):
            scene = place(rng, scene, shape, typical, usual_row)
        usual = rng.random() < typical
        if (kind == "existence" and usual == bool(count)) or (kind == "count" and not usual):
            scene = place(rng, scene, companion, typical)
        others = [s for s in PRIOR if s not in (shape, companion)]
        # the last cell is for what is not there
        for _ in range(min(rng.randint(1, 2), GRID**2 - 1 - len(scene))):
            scene = place(rng, scene, rng.choice(others), typical)
    scene = tuple(rng.sample(scene, len(scene)))
    return scene, {"kind": kind, "shape": shape}


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def ask(query: dict) -> tuple[str, list[str]]:
    """The question and its options."""
    shape, listed = query["shape"], lambda names: [f"{'ABCD'[i]}. {n}" for i, n in enumerate(names)]
    return {
        "existence": (f"Is there a {shape} in the picture?", listed(["yes", "no"])),
        "count": (f"How many {plural(shape)} are in the picture?", []),
        "colour": (f"What colour is the {shape}?", listed(COLOURS)),
        "row": (f"In which row is the {shape}?", listed(ROWS)),
        "motion": (f"Which way does the {shape} move?", listed(DIRECTIONS)),
    }[query["kind"]]


def believe(scene: Scene, query: dict) -> Scene:
    """The scene as the prior has it: what a model sees that looks at habits and not at the
    picture."""
    shape, kind = query["shape"], query["kind"]
    colour, row, direction, companion = PRIOR[shape]
    seen = []
    for thing in scene:
        if thing.shape == shape and kind == "colour":
            thing = replace(thing, colour=colour)
        elif thing.shape == shape and kind == "row":
            thing = replace(thing, row=ROWS.index(row))
        elif thing.shape == shape and kind == "motion":
            thing = replace(thing, direction=direction)
        seen.append(thing)
    missing = not any(t.shape == shape for t in scene)
    expected = kind == "count" or (kind == "existence" and missing)
    # its companion is there, so it must be there too
    if expected and any(t.shape == companion for t in scene):
        taken = {(t.row, t.column) for t in scene}
        free = [cell for cell in itertools.product(range(GRID), range(GRID)) if cell not in taken]
        # in its usual row, if there is room
        habit = sorted(free, key=lambda cell: cell[0] != ROWS.index(row))
        seen += [Thing(shape, colour, *cell) for cell in habit[:1]]
    return tuple(seen)


def solve(scene: Scene, query: dict) -> reasoning.Stages:
    """The four stages of a reader who sees `scene`: locate, describe only what was asked for,
    reason, answer."""
    kind, shape = query["kind"], query["shape"]
    found = of_shape(scene, shape)
    first = found[0] if found else None
    if kind == "existence":
        thought, answer = (f"a {shape} is there", "A") if found else (f"no {shape} is there", "B")
    elif kind == "count":
        thought, answer = f"{len(found)} in all", str(len(found))
    elif kind == "colour":
        thought, answer = f"it is {first.colour}", "ABCD"[list(COLOURS).index(first.colour)]
    elif kind == "row":
        thought, answer = f"the {shape} is in the {ROWS[first.row]} row", "AB"[first.row]
    else:
        thought = f"the {shape} moves {first.direction}"
        answer = "ABCD"[list(DIRECTIONS).index(first.direction)]
    return reasoning.Stages(locate(scene, shape), describe(scene, shape), thought, answer)


def others_in(scene: Scene, shape: str) -> list[str]:
    """The other shapes of a scene, or all others where it has none."""
    here = sorted({t.shape for t in scene} - {shape})
    return here or [s for s in PRIOR if s != shape]


def of_shape(scene: Scene, shape: str) -> list[Thing]:
    """The objects of a shape, in reading order."""
    return sorted((t for t in scene if t.shape == shape), key=lambda t: (t.row, t.column))


def locate(scene: Scene, shape: str) -> str:
    """Where the objects of a shape are."""
    return " ".join([shape, *([t.cell for t in of_shape(scene, shape)] or ["nowhere"])])


def describe(scene: Scene, shape: str) -> str:
    """What the objects of a shape are."""
    return ", ".join(t.describe() for t in of_shape(scene, shape)) or f"no {shape}"


def read_description(text: str) -> Scene | None:
    """The scene that a caption in the words of `describe` tells of; None where it is none."""
    if re.fullmatch(rf"no (?:{'|'.join(PRIOR)})", text.strip()):
        return ()
    cells = {cell: (r, c) for r, row in enumerate(CELLS) for c, cell in enumerate(row)}
    thing = re.compile(
        rf"({'|'.join(cells)}) ({'|'.join(COLOURS)}) ({'|'.join(PRIOR)})"
        rf"(?: moving ({'|'.join(DIRECTIONS)}))?"
    )
    found = [thing.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        return None
    return tuple(Thing(m[3], m[2], *cells[m[1]], m[4]) for m in found)


# --- pictures and clips ---------------------------------------------------------------------------


def draw(rng: random.Random, scene: Scene, moved: float = 0.0) -> Image.Image:
    """One 56 x 56 frame; moving objects have covered `moved` cells."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL))
    pen = ImageDraw.Draw(image)
    # tinted by row and column: a cell can be told by its look
    for r, c in itertools.product(range(GRID), range(GRID)):
        tint = (GROUND[0] + 40 * c - 20, GROUND[1], GROUND[2] + 40 * r - 20)
        pen.rectangle((c * CELL, r * CELL, (c + 1) * CELL, (r + 1) * CELL), fill=tint)
    for t in scene:
        dr, dc = DIRECTIONS.get(t.direction, (0, 0))
        x = (t.column + 0.5 + dc * moved) * CELL + rng.uniform(-1.5, 1.5)
        y = (t.row + 0.5 + dr * moved) * CELL + rng.uniform(-1.5, 1.5)
        _draw_shape(pen, t.shape, x, y, rng.uniform(11, 12.5), COLOURS[t.colour])
    return image


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple
) -> None:
    def polygon(*corners):
        pen.polygon(
            [(x + r * a, y + r * b) for a, b in corners], fill=fill, outline="white", width=2
        )

    def spikes(*radii):  # corners clockwise from the top, at these distances in turn
        turn = 2 * math.pi / len(radii)
        polygon(*((d * math.sin(i * turn), -d * math.cos(i * turn)) for i, d in enumerate(radii)))

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline="white", width=2)
    elif shape == "square":
        polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    elif shape == "triangle":
        polygon((0, -1), (1, 0.8), (-1, 0.8))
    elif shape == "diamond":
        spikes(1.1, 0.7, 1.1, 0.7)
    elif shape == "star":
        spikes(*(1.1, 0.45) * 5)
    else:
        arm, w = 1.0, 0.3
        quarter = [(w, -arm), (w, -w), (arm, -w)]
        turns = [
            quarter,
            [(-b, a) for a, b in quarter],
            [(-a, -b) for a, b in quarter],
            [(b, -a) for a, b in quarter],
        ]
        polygon(*(corner for part in turns for corner in part))


def frames(rng: random.Random, scene: Scene) -> list[Image.Image]:
    return [draw(rng, scene, moved) for moved in (0.0, 0.15, 0.85, 1.0)]


def write_clip(path: Path, images: list[Image.Image], fps: int = 2) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": "12", "preset": "ultrafast", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


# --- the dataset folder ---------------------------------------------------------------------------


def write_data(folder: Path, sizes: dict[str, int] = SIZES, seed: int = 0) -> None:
    """A dataset in the official schema: cold start, RL, RL with three questions about each
    picture (train_shared, for --train_set), and three test sets.

    The pictures and clips of a test set are its own. Their scenes are not always, and then differ
    by shifts of a pixel or two: clips have only 192 scenes. At SIZES and seeds 0 to 4, cold start
    or RL ask the same of the same scene as 90 to 98 of 400 rows of test (78 to 80 of its 80 on
    motion among them), 71 to 79 of 300 of test_prior_breaking (56 to 60 of 60 on motion) and 2 to 6
    of 300 of test_pairs.
    """
    for split, size in sizes.items():
        rng = random.Random(f"{seed}/{split}")
        media = folder / split
        media.mkdir(parents=True)
        rows = []
        for i in range(size):
            # two questions about one shape of a picture, and one about another shape
            if split == "train_shared":
                if i % 3 == 0:
                    scene, query = make_row(rng, "colour", TYPICAL)
                    asked = [query["shape"]] * 2 + [rng.choice(others_in(scene, query["shape"]))]
                query = {"kind": SHARED_KINDS[i % 3], "shape": asked[i % 3]}
            # VideoHallucer's form: what is there, and its companion, which is not
            elif split == "test_pairs":
                if i % 2 == 0:
                    scene, query = make_row(rng, "colour", TYPICAL)
                shape = query["shape"] if i % 2 == 0 else PRIOR[query["shape"]][3]
                query = {"kind": "existence", "shape": shape}
            else:
                typical = {"cold_start": COLD_TYPICAL, "test_prior_breaking": 0.0}.get(
                    split, TYPICAL
                )
                kinds = RL_KINDS if split == "train" else KINDS
                scene, query = make_row(rng, kinds[i % len(kinds)], typical)
            drawn = i - i % 3 if split == "train_shared" else i
            rows.append(_write_row(rng, folder, split, i, scene, query, drawn))
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))


def _write_row(
    rng: random.Random, folder: Path, split: str, i: int, scene: Scene, query: dict, drawn: int
) -> dict:
    """Row i; drawn: the row whose picture it shows, this or an earlier one."""
    is_clip = query["kind"] == "motion"
    path = f"{split}/{drawn:05d}." + ("mp4" if is_clip else "png")
    if is_clip:
        write_clip(folder / path, frames(rng, scene))
    elif drawn == i:
        draw(rng, scene).save(folder / path)
    problem, options = ask(query)
    row = {
        "data_type": "video" if is_clip else "image",
        "problem_type": "multiple choice" if options else "numerical",
        "problem": problem,
        "options": options,
        "path": f"./{path}",
        "solution": f"<answer>{solve(scene, query).answer}</answer>",
        "problem_id": f"{split}-{i:05d}",
        "category": query["kind"],
    }
    if split == "cold_start":
        seen, meant = (
            solve(believe(scene, query) if rng.random() < flaw else scene, query)
            for flaw in (FLAW_CAPTION, FLAW_ANSWER)
        )
        row["process"] = reasoning.render(replace(seen, think=meant.think, answer=meant.answer))
    if split == "test_pairs":
        row["pair"] = f"pair-{i // 2:05d}"
    if split.startswith("test"):
        row["objects"] = sorted({t.name for t in scene})
        row["relevant"] = sorted({t.name for t in scene if t.shape == query["shape"]})
    return row
