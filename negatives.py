"""Negative images: what is shown with A+ in its place, by OViP and by those before it.

    draw       the scene that A- describes, by the embedded world's own renderer
    diffusion  a text-to-image model's, of the judge's description of the difference (the paper's)
    crop       80 to 100 % of the picture (mDPO's), blur: Gaussian; random: another row's picture

A user turn is a list of one message, and its media are parts of the content, {"type": "image",
"image": PIL} or {"type": "video", "video": frames, "fps": ...}. Where no image can be made there
is None, and that pair is not trained on.
"""

import importlib.util
import random
from typing import Any

import torch
from PIL import Image

import corruption
import data
import ovip
import reasoning
from caption_reward import Judge
from engine import ConfigError, DataError, reason
from engine.run import Run
from world import scenes

DESCRIBER = {"temperature": 0.1, "top_p": 0.9, "max_tokens": 128}  # of G_diff [paper, App. B.2]
WHY = {"draw": "no scene could be read from the caption", "diffusion": "no description"}
DRAWN = ("draw", "diffusion")  # of what a response says: one picture, in place of one


def check(prompts: list[data.Sample], cfg) -> None:
    """Raises DataError for rows that --negatives has no image for, before anything is loaded."""
    if cfg.negatives == "diffusion" and importlib.util.find_spec("diffusers") is None:
        raise ConfigError(
            "negatives: diffusion needs pip install 'ground-what-you-see[ovip]'; or give "
            "--negatives crop, blur or random"
        )
    for sample in prompts if cfg.negatives in DRAWN else ():
        clip = sample.data_type == "video" and cfg.negatives == "diffusion"
        if clip or len(sample.media) != 1:
            raise DataError(
                f"negatives: {cfg.negatives} makes one picture, and row {sample.id} has "
                f"{'a clip' if clip else f'{len(sample.media)} pictures'}. Give --negatives crop, "
                "blur or random"
            )
    if cfg.negatives == "random" and not others_of(prompts, cfg)[0]:
        raise DataError("negatives: random needs rows with other pictures; give crop or blur")


def media_of(chat: list[dict]) -> list[dict]:
    """The pictures of a user turn, or its clip, as parts of its content."""
    return [part for part in chat[0]["content"] if part["type"] != "text"]


def without_media(chat: list[dict]) -> list[dict]:
    """The turn with its pictures cut out, not blanked."""
    return [{**chat[0], "content": [p for p in chat[0]["content"] if p["type"] == "text"]}]


def with_media(chat: list[dict], media: list[dict] | None) -> list[dict]:
    """The turn with other pictures in the same places; None: with its own."""
    left = iter(media_of(chat) if media is None else media)
    content = [p if p["type"] == "text" else next(left) for p in chat[0]["content"]]
    return [{**chat[0], "content": content}]


def others_of(prompts: list[data.Sample], cfg) -> tuple[list[data.Sample], list[str]]:
    """Each row with the media of another one, and notes on those that have none."""
    return corruption.corrupt(prompts, "random_media", cfg.seed, 1.0, data.picture_of)


class Negatives:
    """The negative images of pairs, by --negatives."""

    def __init__(self, prompts: list[data.Sample], judge: Judge | None, cfg, run: Run):
        self.kind, self.cfg, self.run = cfg.negatives, cfg, run
        self.why = WHY.get(self.kind, "its row has none")  # there may be no image
        self.others: dict[str, data.Sample] = {}
        if self.kind == "random":
            found, notes = others_of(prompts, cfg)
            # another row's picture may be larger
            found = data.fit_to_model({"random": found}, cfg.start, cfg, "skip", run.say)["random"]
            self.others = {s.id: s for s in found}
            for note in notes:
                run.say(f"negatives: {note}")
        if self.kind == "diffusion":
            self.paint = Diffusion(cfg, run.device)
            self.describe = judge.sampling(**DESCRIBER)

    @property
    def last_error(self) -> str:
        """Of the model that paints, or of the judge that describes."""
        if self.kind != "diffusion":
            return ""
        return self.paint.last_error or self.describe.last_error

    def __call__(
        self, pairs: list, samples: list[data.Sample], chats: list[list[dict]]
    ) -> list[list[dict] | None]:
        """For each pair the media in place of its own, or None, if there is none."""
        texts: list[Any] = [p.negative_text for p in pairs]
        if self.kind == "diffusion":
            texts = self._described(pairs, samples)
        return [self._one(*four) for four in zip(pairs, samples, chats, texts, strict=True)]

    def _described(self, pairs: list, samples: list[data.Sample]) -> list[str | None]:
        asked = [
            ovip.difference_prompt(s.question, p.positive_text, p.negative_text)
            for p, s in zip(pairs, samples)
        ]
        if hasattr(self.describe, "concurrency"):  # a server, asked for all at once
            return self.describe(asked)
        found = []
        for pair, prompt in zip(pairs, asked):  # a draw of its own, whatever rank it is on
            self.run.reseed("description", pair.id, pair.step)
            found += self.describe([prompt])
        return found

    def _one(
        self, pair, sample: data.Sample, chat: list[dict], text: str | None
    ) -> list[dict] | None:
        seed, shown = self.cfg.seed, media_of(chat)
        if self.kind == "random":
            other = self.others.get(pair.id)
            if other is None:
                return None
            return media_of(data.messages(other, "", self.cfg.fps, self.cfg.max_frames))
        if self.kind in ("crop", "blur"):
            cut, name = self.kind == "crop", f"{pair.id}/{pair.step}"
            old = [part[part["type"]] for part in shown]
            new = [
                corruption.crop(m, seed, name) if cut else corruption.change(m, "blur", seed, name)
                for m in old
            ]
        elif self.kind == "draw":
            scene = scenes.read_description(reasoning.parse(text).caption or "")
            if scene is None:
                return None
            rng = random.Random(f"{seed}/{pair.id}/{pair.step}")
            is_clip = shown[0]["type"] == "video"
            new = [scenes.frames(rng, scene) if is_clip else scenes.draw(rng, scene)]
        else:
            new = [self.paint(text) if text else None]
        if new[0] is None:
            return None
        return [{**part, part["type"]: m} for part, m in zip(shown, new, strict=True)]


class Diffusion:
    """Text -> picture by any text-to-image pipeline of diffusers (extra `ovip`)."""

    def __init__(self, cfg, device):
        from diffusers import DiffusionPipeline

        half = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            self.pipe = DiffusionPipeline.from_pretrained(cfg.diffusion, torch_dtype=half)
        except Exception as error:  # of many kinds
            raise ConfigError(f"diffusion: cannot load {cfg.diffusion}: {reason(error)}") from error
        self.pipe.to(device).set_progress_bar_config(disable=True)
        side = cfg.diffusion_size
        self.options = {"height": side, "width": side, "guidance_scale": cfg.diffusion_guidance}
        self.options["num_inference_steps"] = cfg.diffusion_steps
        self.last_error = ""

    def __call__(self, text: str) -> Image.Image | None:
        """One picture, from the same noise for every text, as released; None: the call failed."""
        noise = torch.Generator("cpu").manual_seed(0)
        try:
            return self.pipe(text, generator=noise, **self.options).images[0].convert("RGB")
        except Exception as error:  # whatever it is, it costs this pair alone
            self.last_error = reason(error)
            return None
