"""The released checkpoints' vocabulary, files and shapes: every place where text meets tokens.

pytest -m slow tests/test_real_vocabulary.py      # the shape of 7B too, trained in full
"""

import json
import re
import unicodedata
from pathlib import Path

import av
import commands
import numpy as np
import pytest
import qwen
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs

import data
import reasoning
from engine import pretrained

ROOT = Path(__file__).parent.parent
TEXT = reasoning.render(reasoning.Stages("left", "A red cup", "it is red", "B"))


@pytest.fixture(scope="module", params=["3b", pytest.param("7b", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return qwen.write(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def policy(folder):
    return pretrained.load(str(folder), trainable=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Photographs and a clip of them, as a dataset."""
    place = tmp_path_factory.mktemp("photographs")
    names = ("astronaut", "coffee", "chelsea", "rocket")
    pictures = {name: Image.fromarray(getattr(photographs, name)()) for name in names}
    found = []
    for i in range(8):
        name = names[i % 4]
        file = f"{name}.jpg"
        pictures[name].resize((168, 112)).save(place / file)
        found.append(
            {
                "data_type": "image", "problem_type": "multiple choice", "path": file,
                "problem": "What is in the picture?", "options": [f"{x}. {n}" for x, n in zip("ABCD", names)],
                "solution": f"<answer>{'ABCD'[i % 4]}</answer>", "problem_id": str(i),
                "process": TEXT,
            }
        )  # fmt: skip
    with av.open(str(place / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 168, 112, "yuv420p"
        for shift in range(4):
            frame = np.roll(np.asarray(pictures["coffee"].resize((168, 112))), 20 * shift, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    found[3] |= {"data_type": "video", "path": "clip.mp4"}
    (place / "train.json").write_text(json.dumps(found))
    (place / "test.json").write_text(
        json.dumps([r | {"problem_id": f"t{r['problem_id']}"} for r in found[:4]])
    )
    return place


def pieces(text):
    tokenizer = qwen.tokenizer()
    return [tokenizer.decode([i]) for i in tokenizer(text).input_ids]


def test_the_vocabulary_is_the_released_one():
    """Its ids are facts of the released checkpoints."""
    tokenizer = qwen.tokenizer()
    assert len(qwen.tokens()) == 151_643 and len(tokenizer) == 151_665
    wanted = {
        "<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645,
        "<|vision_start|>": 151_652, "<|vision_end|>": 151_653, "<|image_pad|>": 151_655,
        "<|video_pad|>": 151_656, "<tool_call>": 151_657, "<|file_sep|>": 151_664,
    }  # fmt: skip
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in wanted} == wanted
    assert tokenizer("Hello, world!").input_ids == [9707, 11, 1879, 0]
    assert pieces("12 cups") == ["1", "2", " cups"], "digits stand alone"
    for text in (TEXT, "añ\n\n  x\t<answer>7</answer>", "😀 e\u0301"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_what_the_docs_say_of_stage_tags():
    """docs/data.md: the pieces of each tag, alone and with what follows it."""
    text = (ROOT / "docs/data.md").read_text()
    table = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text[text.index("## Stage tags") :], re.M)
    assert len(table) >= 12
    for tag, said in table:
        want = [x.replace("␤", "\n") for x in re.findall(r"`([^`]+)`", said)]
        assert pieces(tag.replace("␤", "\n")) == want, tag


def test_special_tokens_and_padded_rows_are_never_sampled(policy, folder):
    size = "7b" if "7b" in str(folder) else "3b"
    rows, tied = qwen.SIZES[size]
    assert policy.core.lm_head.weight.shape[0] == rows
    assert (policy.core.lm_head.weight is policy.core.get_input_embeddings().weight) == tied
    assert policy.end_ids == [151_645], "the padding token, which is listed as an end, is none"
    special = set(range(151_643, 151_657)) - {151_645}
    assert set(policy.banned_ids) == special | set(range(151_665, rows))


def test_a_beginning_and_what_follows_are_one_text(policy):
    """As a model writes it: the tokens of the whole, and in the mask every token that reaches into
    what follows."""
    tokenizer = policy.processor.tokenizer
    cases = [
        (TEXT.split("<answer>")[0], "<answer>B</answer>"),
        ("<think>x</think>\n", "<answer>7</answer>"),
        ("", "<answer>A</answer>"),
        ("naïve 北京", "ï <answer>京</answer>"),
    ]
    ids, mask = policy.encode_responses([b for _, b in cases], after=[a for a, _ in cases])
    for row, on, (begin, text) in zip(ids[:, 0], mask[:, 0], cases):
        whole = tokenizer(begin + text).input_ids + [151_645]
        assert row[: len(whole)].tolist() == whole and not on[len(whole) :].any()
        scored = row[on].tolist()
        assert whole[-len(scored) :] == scored
        said = tokenizer.decode(scored[:-1])
        assert said.endswith(text) and len(said) <= len(text) + 1
        assert not tokenizer.decode(whole[: -len(scored)]).endswith(text)
    assert tokenizer.decode(ids[0, 0][mask[0, 0]].tolist()[:2]) == "><answer"
    apart = tokenizer(cases[0][0]).input_ids + tokenizer(cases[0][1]).input_ids
    assert apart != tokenizer("".join(cases[0])).input_ids, "in two pieces it is another text"


def test_samples_ignore_the_checkpoint_s_generation_config(policy, rows):
    """Greedily, each token is the largest of plain logits: no repetition penalty; and samples at
    T = 1, not 1e-6, differ."""
    samples = data.load(rows)["train"][:4]
    inputs = policy.encode(data.prompts(samples, True, 2.0, 4))
    said = policy.generate(inputs, 1, 6, sample=False)
    scores = policy(inputs, said.ids)
    logits = scores.hidden @ policy.core.lm_head.weight.T
    logits[..., policy.banned_ids] = -torch.inf
    assert (logits.argmax(-1) == said.ids)[said.mask.bool()].all()
    logp = F.log_softmax(logits.float(), -1).gather(-1, said.ids[..., None])[..., 0]
    torch.testing.assert_close(
        scores.logp[said.mask.bool()], logp[said.mask.bool()], atol=1e-4, rtol=1e-4
    )
    drawn = policy.generate(inputs, 4, 6)
    assert len({tuple(row.tolist()) for row in drawn.ids[0]}) == 4


def test_the_pipeline_on_a_checkpoint_like_the_released(folder, rows, world, tmp_path):
    """Cold start, RL with all rewards and Eq. 4, and both evaluations, on photographs and a clip,
    the small one with LoRA; what is written has the files of what was read."""
    rank = 0 if folder.parent.name.startswith("7b") else 2
    options = {
        "model": folder, "data": rows, "judge": world / "judge", "dtype": "bfloat16",
        "lora_rank": rank, "sft_steps": 1, "sft_batch": 2, "rl_steps": 1, "prompts_per_step": 3,
        "group_size": 2, "max_new_tokens": 8, "selection": False, "held_out_rows": 0,
        "eval_responses": 1, "nce_feature": "own_prefix", "max_pixels": 18_816, "merge": True,
        "gradient_checkpointing": True,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    commands.launch(*words, "--output_dir", tmp_path / "run")
    before, after = folder, tmp_path / "run/rl/policy"
    old, new = (load_file(place / "model.safetensors") for place in (before, after))
    assert {k.split("model.")[-1] for k in old} == {k.split("model.")[-1] for k in new}
    kept = json.loads((after / "generation_config.json").read_text())
    assert (kept["repetition_penalty"], kept["temperature"]) == (1.05, 1e-6)
    again = pretrained.load(str(after), trainable=False)
    assert again.processor.tokenizer(TEXT).input_ids == qwen.tokenizer()(TEXT).input_ids
    lines = [(tmp_path / f"run/{s}/metrics.jsonl").read_text() for s in ("sft", "rl")]
    cold, rl = map(json.loads, lines)  # one update each
    assert cold["grad_norm"] > 0 and "nce" in rl and rl["entropy"] > 5
