"""The embedded world: coloured shapes on a grid, questions about them, a tiny policy and a tiny judge.

    python shapes.py --out DIR        # DIR/data, DIR/policy, DIR/judge, each skipped when it is complete

It exercises every real path without a download. The data are PNG pictures and MP4 clips in the official schema; the
policy is a Qwen2_5_VLForConditionalGeneration and the judge a Qwen2ForCausalLM, built from config and saved in
Hugging Face format. Whatever trains or evaluates on them knows only files on disk.

Like the real thing, the world has a *prior*: every shape has a usual colour, row, direction and companion. The usual
value stands in TYPICAL of the cases: 40 %, above chance for colours and directions (25 %) and below it for rows (50 %).
The companion is there in 90 % of existence and count questions, whether the shape is there or not. The base policy is
taught to describe pictures without the prior. The cold-start data then teach the four stages and, in FLAW of the rows,
a bad habit: the reference follows the prior instead of the picture (usual attributes, an object too many because its
companion is there), which makes it false in about 35 % of the rows. That is the hallucination for RL to undo.

A question alone, without the picture, is answered right as often as its best constant answer (the question-only floor):

    rows                                  existence   count   colour   row    motion
    typical = TYPICAL                     60 %        33 %    40 %     60 %   40 %
    typical = 0, the prior-breaking set   60 %        50 %    33 %     50 %   33 %

and in the pairs 50 %, where both questions of a pair may be right together: 50 % of the pairs.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import av
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import answers
import caption_reward
import reasoning
import vlm

ROWS = ("top", "bottom")
CELLS = (("northwest", "northeast"), ("southwest", "southeast"))
GRID = len(ROWS)
COLOURS = {"red": (240, 70, 70), "green": (70, 210, 90), "blue": (80, 120, 250), "yellow": (250, 220, 60)}
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
GROUND = (122, 116, 104)  # about the mean that the image processor subtracts: shapes stand out from zero
TYPICAL = 0.4  # share of objects with their shape's usual colour; the same for rows and directions
FLAW = 0.6  # share of cold-start rows whose reference follows the prior, true or not
SIZES = {"cold_start": 2400, "train": 480, "test": 400, "test_prior_breaking": 300, "test_pairs": 300}


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


# --- scenes and questions -------------------------------------------------------------------------------------------


def pick_colour(rng: random.Random, shape: str, typical: float) -> str:
    usual = PRIOR[shape][0]
    return usual if rng.random() < typical else rng.choice([c for c in COLOURS if c != usual])


def place(rng: random.Random, scene: Scene, shape: str, typical: float, usual_row: float | None = None) -> Scene:
    """The scene with one more object in a free cell. Its colour is the usual one with probability `typical`, its row
    with probability `usual_row` (`typical` unless given), or the other row's where all cells of that one are taken."""
    free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in {(t.row, t.column) for t in scene}]
    usual = ROWS.index(PRIOR[shape][1])
    follow = rng.random() < (typical if usual_row is None else usual_row)
    r, c = rng.choice([cell for cell in free if (cell[0] == usual) == follow] or free)
    return (*scene, Thing(shape, pick_colour(rng, shape, typical), r, c))


def start_cell(rng: random.Random, direction: str) -> tuple[int, int]:
    """Where something starts that will cross the grid from one edge to the other."""
    return tuple((d < 0) * (GRID - 1) if d else rng.randrange(GRID) for d in DIRECTIONS[direction])


def make_row(rng: random.Random, kind: str, typical: float = TYPICAL) -> tuple[Scene, dict]:
    """A scene and a question about it. typical=0 gives the prior-breaking set: no colour or direction is the usual one,
    and there is one object fewer than its companion suggests.

    Yes or no and top or bottom are only two, so that never the usual one would be always the other. The usual answer is
    therefore true of 40 % of existence questions there, and of half of those for a row (the others' rows stay unusual).
    """
    shape = rng.choice(list(PRIOR))
    companion = PRIOR[shape][3]
    scene: Scene = ()
    if kind == "motion":
        usual = PRIOR[shape][2]
        direction = usual if rng.random() < typical else rng.choice([d for d in DIRECTIONS if d != usual])
        r, c = start_cell(rng, direction)
        scene = (Thing(shape, pick_colour(rng, shape, typical), r, c, direction),)
    else:
        count = {"existence": rng.random() < 0.4, "count": rng.randint(1, 3 if typical else 2)}.get(kind, 1)
        usual_row = 0.5 if kind == "row" and typical == 0 else typical
        for _ in range(int(count)):
            scene = place(rng, scene, shape, typical, usual_row)
        if kind in ("existence", "count") and (typical == 0 or rng.random() < 0.9):
            scene = place(rng, scene, companion, typical)
        others = [s for s in PRIOR if s not in (shape, companion)]
        for _ in range(min(rng.randint(1, 2), GRID**2 - 1 - len(scene))):  # the last cell is for what is not there
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
    """The scene as the prior has it: what a model sees that looks at habits and not at the picture."""
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
    if expected and any(t.shape == companion for t in scene):  # its companion is there, so it must be there too
        taken = {(t.row, t.column) for t in scene}
        free = [cell for cell in itertools.product(range(GRID), range(GRID)) if cell not in taken]
        habit = sorted(free, key=lambda cell: cell[0] != ROWS.index(row))[:1]  # in its usual row, if there is room
        seen += [Thing(shape, colour, *cell) for cell in habit]
    return tuple(seen)


def solve(scene: Scene, query: dict) -> reasoning.Stages:
    """The four stages of a reader who sees `scene`: locate, describe only what was asked for, reason, answer."""
    kind, shape = query["kind"], query["shape"]
    found = of_shape(scene, shape)
    first = found[0] if found else None
    if kind == "existence":
        thought, answer = (f"a {shape} is there", "A") if found else (f"no {shape} is there", "B")
    elif kind == "count":
        thought, answer = f"{len(found)} in all", str(len(found))
    elif kind == "colour":
        thought, answer = f"it is a {first.name}", "ABCD"[list(COLOURS).index(first.colour)]
    elif kind == "row":
        thought, answer = f"the {shape} is in the {ROWS[first.row]} row", "AB"[first.row]
    else:
        thought, answer = f"the {shape} moves {first.direction}", "ABCD"[list(DIRECTIONS).index(first.direction)]
    return reasoning.Stages(locate(scene, shape), describe(scene, shape), thought, answer)


def of_shape(scene: Scene, shape: str) -> list[Thing]:
    """The objects of a shape, in reading order."""
    return sorted((t for t in scene if t.shape == shape), key=lambda t: (t.row, t.column))


def locate(scene: Scene, shape: str) -> str:
    """Where the objects of a shape are."""
    return " ".join([shape, *([t.cell for t in of_shape(scene, shape)] or ["nowhere"])])


def describe(scene: Scene, shape: str) -> str:
    """What the objects of a shape are."""
    return ", ".join(t.describe() for t in of_shape(scene, shape)) or f"no {shape}"


# --- pictures and clips ---------------------------------------------------------------------------------------------


def draw(rng: random.Random, scene: Scene, moved: float = 0.0) -> Image.Image:
    """One 56 x 56 frame; moving objects have covered `moved` cells."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL))
    pen = ImageDraw.Draw(image)
    for r, c in itertools.product(range(GRID), range(GRID)):  # tinted by row and column: a cell can be told by its look
        tint = (GROUND[0] + 40 * c - 20, GROUND[1], GROUND[2] + 40 * r - 20)
        pen.rectangle((c * CELL, r * CELL, (c + 1) * CELL, (r + 1) * CELL), fill=tint)
    for t in scene:
        dr, dc = DIRECTIONS.get(t.direction, (0, 0))
        x = (t.column + 0.5 + dc * moved) * CELL + rng.uniform(-1.5, 1.5)
        y = (t.row + 0.5 + dr * moved) * CELL + rng.uniform(-1.5, 1.5)
        _draw_shape(pen, t.shape, x, y, rng.uniform(11, 12.5), COLOURS[t.colour])
    return image


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple) -> None:
    def polygon(*corners):
        pen.polygon([(x + r * a, y + r * b) for a, b in corners], fill=fill, outline="white", width=2)

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
        turns = [quarter, [(-b, a) for a, b in quarter], [(-a, -b) for a, b in quarter], [(b, -a) for a, b in quarter]]
        polygon(*(corner for part in turns for corner in part))


def frames(rng: random.Random, scene: Scene) -> list[Image.Image]:
    return [draw(rng, scene, moved) for moved in (0.0, 0.15, 0.85, 1.0)]


def write_clip(path: Path, images: list[Image.Image], fps: int = 2) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


# --- the dataset folder ---------------------------------------------------------------------------------------------


def write_data(folder: Path, sizes: dict[str, int] = SIZES, seed: int = 0) -> None:
    """A dataset in the official schema: cold start, RL, and three test sets.

    The pictures and clips of a test set are its own. Their scenes are not always, and then differ by shifts of a pixel
    or two: clips have only 192 scenes. At SIZES and seed 0, cold start or RL ask the same of the same scene as 87 of
    400 rows of test (75 of them motion), 58 of 300 of test_prior_breaking (51 motion) and 7 of 300 of test_pairs.
    """
    for split, size in sizes.items():
        rng = random.Random(f"{seed}/{split}")
        media = folder / split
        media.mkdir(parents=True)
        rows = []
        for i in range(size):
            if split == "test_pairs":  # VideoHallucer's form: what is there, and its companion, which is not
                if i % 2 == 0:
                    scene, query = make_row(rng, "colour", TYPICAL)
                shape = query["shape"] if i % 2 == 0 else PRIOR[query["shape"]][3]
                query = {"kind": "existence", "shape": shape}
            else:
                typical = 0.0 if split == "test_prior_breaking" else TYPICAL
                scene, query = make_row(rng, KINDS[i % len(KINDS)], typical)
            rows.append(_write_row(rng, folder, split, i, scene, query))
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))


def _write_row(rng: random.Random, folder: Path, split: str, i: int, scene: Scene, query: dict) -> dict:
    is_clip = query["kind"] == "motion"
    path = f"{split}/{i:05d}." + ("mp4" if is_clip else "png")
    if is_clip:
        write_clip(folder / path, frames(rng, scene))
    else:
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
        seen = believe(scene, query) if rng.random() < FLAW else scene
        row["process"] = reasoning.render(solve(seen, query))
    if split == "test_pairs":
        row["pair"] = f"pair-{i // 2:05d}"
    if split.startswith("test"):
        row["objects"] = sorted({t.name for t in scene})
        row["relevant"] = sorted({t.name for t in scene if t.shape == query["shape"]})
    return row


# --- the tiny models ------------------------------------------------------------------------------------------------

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def make_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """Byte-level BPE trained on the world's own text: its words are single tokens, any other text falls to bytes."""
    rng, texts = random.Random(f"{seed}/text"), []
    for i in range(1500):
        scene, query = make_row(rng, KINDS[i % len(KINDS)])
        problem, options = ask(query)
        kind = "multiple choice" if options else "numerical"
        stages = solve(scene, query)
        texts += [reasoning.prompt(problem, options, kind, four) for four in (True, False)]
        texts += [stages.prethink, stages.caption, stages.think, stages.answer]
        texts += [caption_reward.judge_prompt(reasoning.question(problem, options), stages.caption)]
        texts += ["Find and describe.", "user\n", "assistant\n"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, 640, new_special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.add_tokens(list(reasoning.TAGS))
    tokenizer.add_tokens([f" {colour} {shape}" for colour in COLOURS for shape in PRIOR])  # one token an object: easier
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_policy(tokenizer: Qwen2Tokenizer) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The real classes, built small from config: hidden 128, 4 layers, vision depth 2."""
    token = tokenizer.convert_tokens_to_ids
    hidden = 128
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=hidden**-0.5,  # at the usual 0.02 a model this narrow sits on a plateau
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=None,
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_heads=4,
            out_hidden_size=hidden,
            fullatt_block_indexes=[1],
            initializer_range=hidden**-0.5,
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 401_408}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.visual.patch_embed.proj.weight, std=0.03)  # 1 / sqrt(fan-in of 1176)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model, processor


def fit(name: str, model: torch.nn.Module, loss_of_batch, steps: int, lr: float, quiet: bool) -> None:
    """AdamW with warm-up and cosine: all the training that the world's own models need."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 40, steps)
    bar = tqdm(range(steps), desc=name, unit="step", disable=True if quiet else None)
    for _ in bar:
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def random_scene(rng: random.Random) -> Scene:
    """A scene without any prior, for the base model: many objects a picture, or one that moves."""
    if rng.random() < 0.25:
        direction = rng.choice(list(DIRECTIONS))
        row, column = start_cell(rng, direction)
        return (Thing(rng.choice(list(PRIOR)), rng.choice(list(COLOURS)), row, column, direction),)
    cells = rng.sample(range(GRID**2), rng.randint(1, GRID**2))
    palette = rng.sample(list(PRIOR), 3)  # few shapes a scene, so that there are often several of one
    return tuple(Thing(rng.choice(palette), rng.choice(list(COLOURS)), c // GRID, c % GRID) for c in cells)


def train_vision(model: Qwen2_5_VLForConditionalGeneration, processor, rng: random.Random, quiet: bool) -> None:
    """Teach the vision tower what is where, in the language model's own words, as a pretrained tower knows it: the
    visual token of a cell comes to point along the input embeddings of the object, the shape and the cell in it."""
    tower, tokenizer, table = model.model.visual, processor.tokenizer, model.get_input_embeddings().weight.detach()

    def embed(*words: str) -> torch.Tensor:
        return torch.stack([table[tokenizer(f" {w}").input_ids + tokenizer(w).input_ids].mean(0) for w in words])

    names = [f"{colour} {shape}" for colour in COLOURS for shape in PRIOR]
    words = [embed("nowhere", *names), embed("nowhere", *PRIOR), embed(*itertools.chain(*CELLS))]

    def loss_of_batch() -> torch.Tensor:
        scenes = [tuple(t for t in random_scene(rng) if not t.direction) for _ in range(32)]
        pixels = processor.image_processor([draw(rng, scene) for scene in scenes], return_tensors="pt")
        seen = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output  # [32 * GRID^2, hidden]
        things = [{GRID * t.row + t.column: t for t in scene} for scene in scenes]
        cells = [here.get(cell) for here in things for cell in range(GRID**2)]
        targets = [
            torch.tensor([names.index(t.name) + 1 if t else 0 for t in cells]),
            torch.tensor([list(PRIOR).index(t.shape) + 1 if t else 0 for t in cells]),
            torch.arange(GRID**2).repeat(len(scenes)),
        ]
        return sum(torch.nn.functional.cross_entropy(seen @ w.T, y) for w, y in zip(words, targets))

    fit("vision tower", tower, loss_of_batch, 80, 2e-3, quiet)


def train_policy(folder: Path, steps: int = 300, seed: int = 0, quiet: bool = False) -> None:
    """The base policy: to find and to describe the objects of a shape, learned from true descriptions."""
    set_seed(seed)
    rng = random.Random(f"{seed}/base")
    model, processor = make_policy(make_tokenizer(seed))
    train_vision(model, processor, rng, quiet)
    policy = vlm.VLM(model, processor, 4 * CELL**2, 401_408)

    def loss_of_batch() -> torch.Tensor:
        chats, texts = [], []
        for _ in range(24):
            scene = random_scene(rng)
            if scene[0].direction:
                media = {"type": "video", "video": frames(rng, scene), "fps": 2.0}
            else:
                media = {"type": "image", "image": draw(rng, scene)}
            chats.append([{"role": "user", "content": [media, {"type": "text", "text": "Find and describe."}]}])
            here = sorted({t.shape for t in scene})
            absent = [shape for shape in PRIOR if shape not in here]
            asked = (rng.sample(here, min(3, len(here))) + rng.sample(absent, len(absent)) + here)[:4]
            texts += [f"{locate(scene, shape)}: {describe(scene, shape)}" for shape in asked]
        ids, mask = (x.view(24, 4, -1) for x in policy.encode_responses(texts))
        mask[..., 0] = False  # which shape is asked for is not for the model to guess
        return -(policy(policy.encode(chats), ids).logp * mask).sum() / mask.sum()

    fit("base policy", policy, loss_of_batch, steps, 3e-3, quiet)
    policy.save(folder)


def train_judge(folder: Path, steps: int = 320, seed: int = 0, quiet: bool = False) -> None:
    """The judge: to answer from a true caption that is not `held_out`; one in ten is empty, and teaches it the
    question-only floor."""
    set_seed(seed)
    rng = random.Random(f"{seed}/judge")
    cases = itertools.filterfalse(held_out, map(judge_case, itertools.repeat(rng)))
    tokenizer = make_tokenizer(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=96**-0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def loss_of_batch() -> torch.Tensor:
        chats, answers_ = [], []
        for question, caption, answer, _ in itertools.islice(cases, 64):
            caption = "" if rng.random() < 0.1 else caption
            chats.append([{"role": "user", "content": caption_reward.judge_prompt(question, caption)}])
            answers_.append(answer)
        text = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        text = [f"{a}{b}<|im_end|>" for a, b in zip(text, answers_, strict=True)]
        batch = tokenizer(text, padding=True, padding_side="left", return_tensors="pt")
        logits = model(**batch, logits_to_keep=3).logits[:, :-1]  # every answer is one token, then the end
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -2:].flatten())

    fit("judge", model, loss_of_batch, steps, 3e-3, quiet)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


Case = tuple[str, str, str, str]  # question, true caption, answer, problem type


def judge_case(rng: random.Random) -> Case:
    """The case of a random row, in half of the calls a prior-breaking one."""
    scene, query = make_row(rng, rng.choice(KINDS), rng.choice((0.0, 0.5)))
    problem, options = ask(query)
    stages = solve(scene, query)
    kind = "multiple choice" if options else "numerical"
    return reasoning.question(problem, options), stages.caption, stages.answer, kind


def held_out(case: Case) -> bool:
    """Is this caption kept from the judge's training, under any question? About one in five is."""
    return int(hashlib.sha256(case[1].encode()).hexdigest(), 16) % 5 == 0


def test_judge(folder: Path, cases: int = 500, seed: int = 1) -> dict[str, float]:
    """What the judge gets right, and what no caption would give:

    true: of `cases` cases whose captions are `held_out`; `different` counts them without repetitions.
    empty: of `cases` cases as they come, with no caption (their questions were in its training, as all are).
    floor: of those same cases by the best constant answer to each whole question, fitted on 5000 other draws.
    """
    dealt = map(judge_case, itertools.repeat(random.Random(f"{seed}/held out")))
    unseen = list(itertools.islice(filter(held_out, dealt), cases))
    anyhow, others = (list(itertools.islice(dealt, n)) for n in (cases, 5000))
    judge = vlm.LocalJudge(str(folder), max_new_tokens=4)
    right: dict[str, float] = {"different": len(set(unseen))}
    for name, asked, keep in (("true", unseen, True), ("empty", anyhow, False)):
        replies = judge([caption_reward.judge_prompt(q, c if keep else "") for q, c, _, _ in asked])
        verdicts = [answers.is_correct(r or "", a, k) for r, (_, _, a, k) in zip(replies, asked, strict=True)]
        right[name] = sum(verdicts) / cases
    constant: dict[str, Counter[str]] = defaultdict(Counter)
    for question, _, answer, _ in others:
        constant[question][answer] += 1
    right["floor"] = sum(constant[q].most_common(1)[0][0] == a for q, _, a, _ in anyhow) / cases
    return right


# --- all of it ------------------------------------------------------------------------------------------------------


def build(folder: Path, quiet: bool = False) -> Path:
    """Write data, policy and judge under `folder`, each once: a part that is there is whole, because it is written
    beside and renamed when it is finished."""
    parts = {"data": write_data, "judge": train_judge, "policy": train_policy}
    for number, (name, make) in enumerate(parts.items(), 1):
        if (folder / name).exists():
            continue
        if not quiet:
            print(
                f"building the embedded world in {folder}, once, in a few minutes: {name}, {number} of 3",
                flush=True,
            )
        unfinished = folder / f".{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished) if name == "data" else make(unfinished, quiet=quiet)
        if name == "judge":
            right = test_judge(unfinished)
            if not quiet:
                print(
                    f"judge: {right['true']:.1%} right on captions held out of its training ({right['different']} "
                    f"different), {right['empty']:.1%} without a caption (the best constant answer to each question: "
                    f"{right['floor']:.1%})"
                )
            if right["true"] < 0.97:
                raise RuntimeError(f"the judge answers only {right['true']:.1%} of new true captions; it needs 97 %")
        unfinished.rename(folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write data/, policy/ and judge/ to")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    print(f"wrote {build(args.out, args.quiet)}")


if __name__ == "__main__":
    main()
