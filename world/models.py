"""The embedded world's models: a tiny Qwen2.5-VL that can see, a tiny text-only judge, and their
training.

Both are the real classes built small from config, and saved in Hugging Face format: they are loaded
as real ones are.
"""

import hashlib
import itertools
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import torch
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

import answers
import caption_reward
import reasoning
from engine import judges, vlm
from world.scenes import (
    CELL,
    CELLS,
    COLOURS,
    DIRECTIONS,
    GRID,
    KINDS,
    PRIOR,
    TYPICAL,
    Scene,
    Thing,
    ask,
    describe,
    draw,
    frames,
    locate,
    make_row,
    solve,
    start_cell,
)

DIRECT_KINDS = (*KINDS, *KINDS[:-1])  # motion, which is learned soon, comes once
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
    """Byte-level BPE trained on the world's own text: its words are single tokens, any other text
    falls to bytes."""
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
    # one token an object: easier; and one for what every prompt of a kind ends with: half of it
    tokenizer.add_tokens([f" {colour} {shape}" for colour in COLOURS for shape in PRIOR])
    kinds = itertools.product(("multiple choice", "numerical"), (True, False))
    tokenizer.add_tokens([reasoning.prompt("", (), kind, four) for kind, four in kinds])
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_policy(
    tokenizer: Qwen2Tokenizer,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
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
            # at the usual 0.02 a model this narrow sits on a plateau
            initializer_range=hidden**-0.5,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
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
    # 1 / sqrt(fan-in of 1176)
    torch.nn.init.normal_(model.model.visual.patch_embed.proj.weight, std=0.03)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model, processor


def fit(
    name: str, model: torch.nn.Module, loss_of_batch, steps: int, lr: float, quiet: bool
) -> None:
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
    # few shapes a scene, so that there are often several of one
    palette = rng.sample(list(PRIOR), 3)
    return tuple(
        Thing(rng.choice(palette), rng.choice(list(COLOURS)), c // GRID, c % GRID) for c in cells
    )


def train_vision(
    model: Qwen2_5_VLForConditionalGeneration, processor, rng: random.Random, quiet: bool
) -> None:
    """Teach the vision tower what is where, in the language model's own words, as a pretrained
    tower knows it: the visual token of a cell comes to point along the input embeddings of the
    object, the shape and the cell in it. Then it is frozen, as in the stages of train.py."""
    tower = model.model.visual
    tokenizer = processor.tokenizer
    table = model.get_input_embeddings().weight.detach()

    def embed(*words: str) -> torch.Tensor:
        return torch.stack(
            [table[tokenizer(f" {w}").input_ids + tokenizer(w).input_ids].mean(0) for w in words]
        )

    names = [f"{colour} {shape}" for colour in COLOURS for shape in PRIOR]
    words = [embed("nowhere", *names), embed("nowhere", *PRIOR), embed(*itertools.chain(*CELLS))]

    def loss_of_batch() -> torch.Tensor:
        scenes = [tuple(t for t in random_scene(rng) if not t.direction) for _ in range(32)]
        pixels = processor.image_processor(
            [draw(rng, scene) for scene in scenes], return_tensors="pt"
        )
        # [32 * GRID^2, hidden]
        seen = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        things = [{GRID * t.row + t.column: t for t in scene} for scene in scenes]
        cells = [here.get(cell) for here in things for cell in range(GRID**2)]
        targets = [
            torch.tensor([names.index(t.name) + 1 if t else 0 for t in cells]),
            torch.tensor([list(PRIOR).index(t.shape) + 1 if t else 0 for t in cells]),
            torch.arange(GRID**2).repeat(len(scenes)),
        ]
        return sum(torch.nn.functional.cross_entropy(seen @ w.T, y) for w, y in zip(words, targets))

    fit("vision tower", tower, loss_of_batch, 160, 2e-3, quiet)
    tower.requires_grad_(False)


def train_policy(folder: Path, steps: int = 500, seed: int = 0, quiet: bool = False) -> None:
    """The base policy, in one run on two tasks: to find and to describe the objects of a shape, and
    to answer without a description (`direct_case`)."""
    set_seed(seed)
    rng = random.Random(f"{seed}/base")
    model, processor = make_policy(make_tokenizer(seed))
    train_vision(model, processor, rng, quiet)
    policy = vlm.VLM(model, processor, 4 * CELL**2, 401_408)

    def loss_of_batch() -> torch.Tensor:
        chats, texts = [], []
        for _ in range(12):
            scene = random_scene(rng)
            chats.append(_chat(rng, scene, "Find and describe."))
            here = sorted({t.shape for t in scene})
            absent = [shape for shape in PRIOR if shape not in here]
            asked = rng.sample(here, min(3, len(here))) + rng.sample(absent, len(absent)) + here
            texts += [f"{locate(scene, shape)}: {describe(scene, shape)}" for shape in asked[:4]]
        ids, mask = (x.view(12, 4, -1) for x in policy.encode_responses(texts))
        mask[..., 0] = False  # which shape is asked for is not for the model to guess
        described = -(policy(policy.encode(chats), ids).logp * mask).sum() / mask.sum()
        chats, texts = zip(*(direct_case(rng) for _ in range(32)))
        ids, mask = policy.encode_responses(list(texts))
        answered = -(policy(policy.encode(list(chats)), ids).logp * mask).sum() / mask.sum()
        return described + answered

    fit("base policy", policy, loss_of_batch, steps, 3e-3, quiet)
    policy.save(folder)


def direct_case(rng: random.Random) -> tuple[list[dict], str]:
    """A question, and the response that reasons and answers without a description: the chat and the
    text. In half of the calls its scene is a prior-breaking one."""
    scene, query = make_row(rng, rng.choice(DIRECT_KINDS), rng.choice((0.0, TYPICAL)))
    problem, options = ask(query)
    kind = "multiple choice" if options else "numerical"
    said = replace(solve(scene, query), prethink=None, caption=None)
    text = reasoning.prompt(problem, options, kind, four_stage=False)
    return _chat(rng, scene, text), reasoning.render(said)


def _chat(rng: random.Random, scene: Scene, text: str) -> list[dict]:
    """One user turn: the scene as a picture, or as a clip where something moves, and the text."""
    if scene[0].direction:
        media = {"type": "video", "video": frames(rng, scene), "fps": 2.0}
    else:
        media = {"type": "image", "image": draw(rng, scene)}
    return [{"role": "user", "content": [media, {"type": "text", "text": text}]}]


def train_judge(
    folder: Path, steps: int, seed: int = 0, quiet: bool = False, start: int = 0
) -> None:
    """The judge: to answer from a true caption that is not `held_out`; one in ten is empty, and
    teaches it the question-only floor. start: which of the seed's initialisations and draws."""
    set_seed(seed + 1000 * start)
    rng = random.Random(f"{seed}/judge/{start}")
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
            chats.append(
                [{"role": "user", "content": caption_reward.judge_prompt(question, caption)}]
            )
            answers_.append(answer)
        text = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        text = [f"{a}{b}<|im_end|>" for a, b in zip(text, answers_, strict=True)]
        batch = tokenizer(text, padding=True, padding_side="left", return_tensors="pt")
        # every answer is one token, then the end
        logits = model(**batch, logits_to_keep=3).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, -2:].flatten()
        )

    fit("judge", model, loss_of_batch, steps, 2e-3, quiet)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


Case = tuple[str, str, str, str]  # question, true caption, answer, problem type


def judge_case(rng: random.Random) -> Case:
    """The case of a random row, in half of the calls a prior-breaking one."""
    scene, query = make_row(rng, rng.choice(KINDS), rng.choice((0.0, TYPICAL)))
    problem, options = ask(query)
    stages = solve(scene, query)
    kind = "multiple choice" if options else "numerical"
    return reasoning.question(problem, options), stages.caption, stages.answer, kind


def held_out(case: Case) -> bool:
    """Is this caption kept from the judge's training, under any question? About one in five is."""
    return int(hashlib.sha256(case[1].encode()).hexdigest(), 16) % 5 == 0


def judge_accuracy(folder: Path, cases: int = 500, seed: int = 1) -> dict[str, float]:
    """What the judge gets right, and what no caption would give:

    true: of `cases` cases whose captions are `held_out`; `different` counts them without
    repetitions. empty: of `cases` cases as they come, with no caption (their questions were in its
    training, as all are). floor: of those same cases by the best constant answer to each whole
    question, fitted on 5000 other draws.
    """
    dealt = map(judge_case, itertools.repeat(random.Random(f"{seed}/held out")))
    unseen = list(itertools.islice(filter(held_out, dealt), cases))
    anyhow, others = (list(itertools.islice(dealt, n)) for n in (cases, 5000))
    judge = judges.LocalJudge(str(folder), max_new_tokens=4)
    right: dict[str, float] = {"different": len(set(unseen))}
    for name, asked, keep in (("true", unseen, True), ("empty", anyhow, False)):
        replies = judge([caption_reward.judge_prompt(q, c if keep else "") for q, c, _, _ in asked])
        verdicts = [
            answers.is_correct(r or "", a, k)
            for r, (_, _, a, k) in zip(replies, asked, strict=True)
        ]
        right[name] = sum(verdicts) / cases
    constant: dict[str, Counter[str]] = defaultdict(Counter)
    for question, _, answer, _ in others:
        constant[question][answer] += 1
    right["floor"] = sum(constant[q].most_common(1)[0][0] == a for q, _, a, _ in anyhow) / cases
    return right
