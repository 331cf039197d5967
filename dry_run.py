"""A dry run: what a configuration will do, said and tried before a GPU is rented.

    python train.py --config configs/qwen2.5-vl-7b.yaml --data DIR --dry_run true

It needs no weights, calls no judge and leaves nothing behind. Options, rows and launch file are
checked as at a real start, stages are counted, and memory is computed (engine/memory.py). The
stages of train.py make an update each, on rows of the embedded world, with a model of the real
widths and vocabulary that has one decoder layer, one vision block and random weights.
"""

import copy
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from textwrap import fill

import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, ProcessorMixin

import data
import preference
import train
from caption_reward import CaptionReward
from config import Config
from engine import ConfigError, memory, reason
from engine.files import read_jsonl
from engine.judges import is_url
from engine.learner import batch_size, readable, updates
from engine.media_check import Checked
from engine.pretrained import OURS, as_policy, opened
from engine.run import Run, check_batches, check_launch, has_begun
from engine.vlm import VLM
from rewards import custom_reward
from selection import shared_options
from variance_select import share_of
from world import models, scenes

CARDS = (24, 48, 80)  # GB, where no GPU is here
ASSUMED = 1000  # rows, where the data are not here
CUT = {  # in place of the real numbers
    "rl_steps": 1, "rl_epochs": 0.0, "sft_epochs": 0.0, "sft_batch": 1, "prompts_per_step": 3,
    "group_size": 2, "max_new_tokens": 2, "pairs": 1, "min_pixels": 3136, "max_pixels": 12_544,
    "max_frames": 2, "media_workers": 0, "reference": "copy", "held_out_rows": 0,
    "select_class": "", "tracker": "", "quiet": True,
}  # fmt: skip
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP")


def dry_run(cfg: Config) -> None:
    """Print all of it. What a real start refuses before it loads a model is refused here too."""
    if int(os.environ.get("RANK", 0)):
        return  # the first process speaks for all
    begun = time.time()
    processes, sharded, of_launch = launch_of(cfg)
    resumes = has_begun(Path(cfg.output_dir), cfg)
    if cfg.share and not resumes:
        shared_options(cfg)
    config, processor, of_model = model_of(cfg)
    sizes, prompt, of_data = rows_of(cfg, config, processor, processes)
    how = ", which it resumes" if resumes else ""
    tell("dry run", [f"method {cfg.method}, in {cfg.output_dir}{how}. Every option is valid"])
    tell("launch", of_launch)
    tell("model", [of_model])
    tell("data", [of_data])
    for name, line in stages(cfg, sizes, processes).items():
        tell(name, [line])
    tell("memory", memory_lines(cfg, memory.shape_of(config), prompt, processes, sharded))
    tell("missing here", lacking(cfg) or ["nothing"])
    tell("not known", unknown(cfg, processor))
    processor = processor or models.make_policy(models.make_tokenizer())[1]
    tell("one layer", one_update(cfg, config, processor))
    here = cfg.data and Path(cfg.data).exists()
    but = " but, in Hugging Face's cache, which media of --data are good" if here else ""
    print(f"{time.time() - begun:.0f} s. Nothing was written{but}.")


def tell(name: str, lines: Iterable[str]) -> None:
    """Lines beside a name in the margin."""
    for line in lines:
        print(fill(line, 100, initial_indent=f"{name:<13}", subsequent_indent=" " * 15), flush=True)
        name = ""


# --- before a model is loaded ---------------------------------------------------------------------


def launch_of(cfg: Config) -> tuple[int, bool, list[str]]:
    """Processes, whether they share the policy (FSDP2), and what to say. Checked as on a machine
    with a GPU for each process; that this machine is another one is only said."""
    env, gpus, cores = dict(os.environ), torch.cuda.device_count(), os.cpu_count() or 1
    processes, here = (int(env.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    check_launch(env, here, cores)
    check_batches(cfg, processes)
    sharded = env.get("ACCELERATE_USE_FSDP") == "true"
    lines = [f"{processes} process(es){' that share the policy (FSDP2)' if sharded else ''}"]
    try:
        check_launch(env, gpus, cores)
    except ConfigError as error:
        lines.append(f"but not on this machine: {error}")
    return processes, sharded, lines


def model_of(cfg: Config) -> tuple[PreTrainedConfig, ProcessorMixin | None, str]:
    """Configuration and processor of what is on this disk, or the published shapes alone."""
    if not cfg.model:
        policy, processor = models.make_policy(models.make_tokenizer())
        return policy.config, processor, "the embedded world's tiny policy"
    try:
        _, _, config, processor = opened(cfg.model, only_here=True)
        return config, processor, f"{cfg.model}: shapes and tokenizer as on this disk"
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or Path(cfg.model).exists():
            raise ConfigError(f"model: cannot load {cfg.model}: {reason(error)}") from error
        try:
            said = f"{cfg.model} is not on this disk: shapes as published, the world's tokenizer"
            return memory.published(cfg.model), None, said
        except KeyError:
            raise ConfigError(
                f"model: {cfg.model} is not on this disk, and its shapes are not known here. For a "
                "dry run the *.json files of its folder, or of its hub id (`hf download ID "
                "--include '*.json'`), are enough"
            ) from error


def rows_of(
    cfg: Config, config: PreTrainedConfig, processor: ProcessorMixin | None, processes: int = 1
) -> tuple[dict[str, int], int, str]:
    """Rows by set, those that the cold start learns from as `taught`; tokens of the longest prompt;
    and what to say."""
    if cfg.reward:
        custom_reward(cfg.reward)
    longest = memory.prompt_tokens(cfg)
    there = cfg.data and Path(cfg.data).exists()
    if not there:
        sizes = {"cold_start": ASSUMED, cfg.train_set: ASSUMED} if cfg.data else dict(scenes.SIZES)
        train.check_train_set(sizes, cfg)
        built = Path(cfg.world).exists()
        said = f"{cfg.data} is not on this disk: {ASSUMED:,} rows are assumed below"
        if not cfg.data:
            said = f"the embedded world{'' if built else ', which is built first, in minutes'}: "
            said += listed(sizes)
        taught = sizes.get("cold_start", 0) * bool(cfg.sft_steps or cfg.sft_epochs)
        return sizes | {"taught": taught}, longest, said
    sets = data.load(cfg.data, cfg.on_bad_row, staged=cfg.staged)
    if processor:
        most = config.text_config.max_position_embeddings
        sets = data.fit(sets, most, processor.tokenizer, cfg, cfg.on_bad_row)
    sizes = {name: len(rows) for name, rows in sets.items()}
    taught = len(train.taught(train.learnable(sets, cfg, processes), cfg))
    longest = data.most_visual_tokens(sets, cfg) + memory.QUESTION
    return sizes | {"taught": taught}, longest, f"{cfg.data}: {listed(sizes)}"


def listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sizes.items())


def stages(cfg: Config, sizes: dict[str, int], processes: int = 1) -> dict[str, str]:
    """Updates, responses and judge calls, by stage. They are upper bounds: selection drops prompts
    whose responses all earn the same, and equal captions are judged once."""
    taught, prompts, found = sizes["taught"], sizes[cfg.train_set], {}
    n = updates(cfg.sft_steps, cfg.sft_epochs, taught, cfg.sft_batch, processes)
    size = batch_size(taught, cfg.sft_batch, processes)
    why = "no row has a reference response in `process`"
    why = why if cfg.sft_steps or cfg.sft_epochs else "--sft_steps 0"
    found["cold start"] = (
        f"{n:,} update{'s' * (n != 1)} of {size} of {taught:,} rows" if taught else f"none: {why}"
    )
    scored = drawn = steps = 0
    if cfg.selection:
        scored = prompts * cfg.responses
        each = f"{cfg.responses} to each of {prompts:,} prompts; the top {cfg.keep:.0%} stay"
        found["selection"] = f"{scored:,} responses: {each}"
        prompts = share_of(prompts, cfg.keep)
    if cfg.method != "sft":
        steps = updates(cfg.rl_steps, cfg.rl_epochs, prompts, cfg.prompts_per_step, processes)
        size = batch_size(prompts, cfg.prompts_per_step, processes)
        drawn = steps * size * cfg.group_size
        found["RL"] = (
            f"{steps:,} {'rounds' if cfg.method == 'ovip' else 'updates'} of {size} of {prompts:,} "
            f"prompts with {cfg.group_size} responses each: {drawn:,} responses of at most "
            f"{cfg.max_new_tokens} tokens"
        )
    each_test = [rows for name, rows in sizes.items() if name.startswith("test")]
    tests = sum(each_test) * (1 + len(cfg.corrupt_eval.split()))
    times = 1 if cfg.method == "sft" else 2
    when = "after the cold start" if cfg.method == "sft" else "before and after RL"
    found["evaluation"] = f"{tests:,} test rows, {when}" if tests else "none: no test*.json"
    calls = times * tests * (1 + cfg.eval_responses) * cfg.four_stage
    if cfg.caption_reward not in ("", "self"):
        scored_on = sizes.get("validation") or next(iter(each_test), 0)
        held_out = min(cfg.held_out_rows, scored_on)
        calls += scored + drawn + held_out * (steps // cfg.save_every + 1)
        calls += sizes[cfg.train_set] * (cfg.caption_reward == "gain")
    if cfg.method == "ovip" and cfg.judge:  # scores, and descriptions of the pairs
        calls += 4 + drawn + drawn // 2 * (cfg.negatives == "diffusion")
    judge = cfg.judge or ("" if cfg.model else "the embedded world's")
    also = {"gain": ", and for each question", "shared": ", and as many for each other question"}
    each = f"one for each different caption{also.get(cfg.caption_reward, '')}"
    some = f"{judge}: up to {calls + train.JUDGE_TRIAL:,} calls, {each}"
    found["judge"] = some if judge and calls else "none"
    return found


def memory_lines(
    cfg: Config, shape: memory.Shape, prompt: int, processes: int, sharded: bool
) -> list[str]:
    """Memory by part, the cards that are large enough, and what machine and disk hold."""
    need = memory.needs(cfg, shape, prompt, processes, sharded)
    cards = {f"{n} GB": n * 1e9 for n in CARDS}
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        cards = {f"{here.name}, {here.total_memory / 1e9:.0f} GB": here.total_memory}
    whole = (shape.text + shape.vision) * getattr(torch, cfg.dtype).itemsize / 1e9
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (1 + (cfg.reference == "cpu"))
    begun = cfg.model and Path(cfg.model, "adapter_config.json").exists()
    is_adapter = cfg.lora_rank and not (cfg.merge or begun)
    policy = need["trained"] * 4 / 1e9 if is_adapter else whole
    left_out = [name for name in (cfg.judge, cfg.diffusion) if memory.beside(name) is None]
    return [
        f"of each GPU, computed and not measured, for prompts of up to {prompt:,} tokens: "
        f"{need['training'] / 1e9:.1f} GB in training ({memory.listed(need['parts'])}), "
        f"{need['generation'] / 1e9:.1f} GB or more while sampling, which takes as many prompts at "
        "a time as fit",
        *(f"{name} is not counted: its size is not known here" for name in left_out),
        *(
            f"{name}: {memory.advice(cfg, shape, prompt, size, processes, sharded)}"
            for name, size in cards.items()
        ),
        f"of the machine: {local * whole:.1f} GB, through which weights are loaded, and on the "
        f"first {need['trained'] * 12 / 1e9:.1f} GB while a checkpoint is written",
        f"on disk: {cfg.keep_last + 1} checkpoints of {need['trained'] * 12 / 1e9:.1f} GB, and "
        f"policies of up to {policy:.1f} GB",
    ]


def lacking(cfg: Config) -> list[str]:
    """A line for each thing that the options ask for and this machine does not have."""
    lines = []
    if is_url(cfg.judge) and importlib.util.find_spec("openai") is None:
        lines.append("openai: pip install 'ground-what-you-see[judge]'")
    if is_url(cfg.judge) and not os.environ.get("OPENAI_API_KEY"):
        lines.append("OPENAI_API_KEY, which the judge's server may ask for")
    if cfg.negatives == "diffusion" and importlib.util.find_spec("diffusers") is None:
        lines.append("diffusers: pip install 'ground-what-you-see[ovip]'")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}: see nvidia-smi" if torch.version.cuda else "CPUs"
        lines.append(f"a GPU that torch sees. torch {torch.__version__} is built for {built}")
    elif cfg.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        lines.append("a GPU with bfloat16: give --dtype float32")
    there = {d.name.lower(): d for d in metadata.distributions() if d.name}
    own = there.get("ground-what-you-see")
    for need in map(Requirement, own.requires or [] if own else []):
        version = getattr(there.get(need.name), "version", "")
        fits = version and need.specifier.contains(version, prereleases=True)
        if need.marker is None and not fits:
            lines.append(f"{need} ({version or 'nothing'} is installed): pip install -e .")
    return lines


def unknown(cfg: Config, processor: ProcessorMixin | None) -> list[str]:
    """What only a real start tells."""
    lines = [
        "whether the weights are there and whole; a real start looks before it loads them",
        "how much memory the allocator takes on top",
        "how long responses are, and how fast: the numbers above are upper bounds",
        "whether this configuration learns: the weights of the update below are random",
    ]
    if processor is None:
        lines.append(
            "whether the model takes every prompt: its tokenizer is not here (`hf download "
            f"{cfg.model} --include '*.json'` brings it)"
        )
    if cfg.train_vision:
        lines.append("the activations of the vision tower that is trained: memory is without them")
    return lines + [f"whether {cfg.judge} answers: it was not asked"] * bool(cfg.judge)


# --- one update of each stage ---------------------------------------------------------------------


class DryRun(Run):
    """A run of one process in a folder that goes. No policy is written."""

    def write_folder(self, folder: Path, save) -> None:
        pass


def one_update(cfg: Config, config: PreTrainedConfig, processor: ProcessorMixin) -> Iterator[str]:
    """What an update of the cold start and one of RL did, as they are done."""
    for name in LAUNCHED:
        os.environ.pop(name, None)
    cut = CUT | {"sft_steps": int(bool(cfg.sft_steps or cfg.sft_epochs))}
    if not (torch.cuda.is_available() or bfloat16_is_fast()) and cfg.dtype == "bfloat16":
        yield "in float32: this CPU is slow in bfloat16"
        cut |= {"dtype": "float32"}
    # with random weights all rewards would be equal, and the gradient 0
    made = {"reward": f"{__file__}:made_up"}
    cut |= {"negatives": "crop", "group_size": 4} if cfg.method == "ovip" else made
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "data")
        scenes.write_data(rows, {"cold_start": 1, "train": 3})
        sets = data.load(rows)
        if file := Checked(rows).file:  # what was good in a folder that goes
            file.unlink(missing_ok=True)
        small = replace(cfg, **cut, output_dir=f"{folder}/run")
        run = DryRun(small)
        for stage in ("sft", "rl"):
            begun = time.time()
            policy = small.model = one_layer(config, processor, small).to(run.device)
            if stage == "sft":
                yield describe(policy, small)
                train.cold_start(sets, small, run)
            elif cfg.method == "ovip":
                preference.prefer(policy, sets["train"], in_turn, small, run)
            elif cfg.method != "sft":
                silent = CaptionReward(lambda prompts: [None] * len(prompts))
                train.reinforce(policy, sets["train"], {}, silent, small, run)
            for line in read_jsonl(run.folder / stage / "metrics.jsonl"):
                yield f"{stage}: {readable(line)}  {time.time() - begun:.0f} s"
            policy = small.model = None  # before the next is made


def describe(policy: VLM, cfg: Config) -> str:
    """What an update takes: weights, and where they are trained moments, gradient and copy."""
    bytes_of = sum(p.numel() * (16 if p.requires_grad else 4) for p in policy.parameters())
    count = sum(p.numel() for p in policy.parameters()) / 1e6
    return (
        f"{count:,.0f} million random parameters on {policy.device}, about "
        f"{bytes_of / 1e9 + 1:.0f} GB and up to two minutes; 3 small pictures or clips, "
        f"{cfg.group_size} responses of {cfg.max_new_tokens} tokens to each; embedding and head "
        "are one table, not trained; rewards are made up"
    )


def made_up(samples: list, responses: list[list[str]], media: list) -> dict[str, list]:
    """A reward that tells responses apart."""
    return {"made_up": [[float(i % 2) for i in range(len(texts))] for texts in responses]}


def in_turn(prompts: list[str]) -> list[str]:
    """OViP's judge: of four responses one is good, and one bad, enough for a pair."""
    return [f"Score: {(9, 5, 5, 1)[i % 4]}" for i in range(len(prompts))]


def bfloat16_is_fast() -> bool:
    """Does this CPU multiply in bfloat16? Without, it takes six times as long as float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def one_layer(config: PreTrainedConfig, processor: ProcessorMixin, cfg: Config) -> VLM:
    """A policy of these widths with one decoder layer, one vision block and random weights."""
    config, number = copy.deepcopy(config), processor.tokenizer.convert_tokens_to_ids
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.layer_types = 1, text.layer_types[:1]
    vision.depth, vision.fullatt_block_indexes = 1, [0]
    config.image_token_id, config.video_token_id = number(["<|image_pad|>", "<|video_pad|>"])
    ends = number(["<|vision_start|>", "<|vision_end|>"])
    config.vision_start_token_id, config.vision_end_token_id = ends
    # the vocabulary comes after: to draw so many numbers takes longer than an update
    rows, text.vocab_size, text.pad_token_id = text.vocab_size, 8, None
    dtype = getattr(torch, cfg.dtype)
    attention = "sdpa" if cfg.attention in OURS else cfg.attention
    model = AutoModelForImageTextToText.from_config(
        config, dtype=dtype, attn_implementation=attention
    )
    some = 0.02 * torch.randn(1000, text.hidden_size, dtype=dtype)
    table = nn.Parameter(some.repeat(-(-rows // 1000), 1)[:rows])
    model.get_input_embeddings().weight = model.lm_head.weight = table
    names = ("attention", "lora_rank", "train_vision", "gradient_checkpointing", "static_decoding")
    names += ("min_pixels", "max_pixels")
    policy = as_policy(model, processor, **{name: getattr(cfg, name) for name in names})
    table.requires_grad_(False)  # its optimiser would not fit on a laptop
    return policy
