"""--dry_run: what it says is what a real start does; it needs no weights and leaves nothing."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import launch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

import dry_run
import train
from config import parse_config
from engine import ConfigError, DataError, media_check, memory, pretrained
from engine.files import read_jsonl

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
SAID = ("launch", "model", "data", "cold start", "RL", "judge", "memory", "one layer", "not known")
REAL = dry_run.one_update


def preset(name, *words):
    return parse_config(["--config", str(ROOT / f"configs/{name}.yaml"), *words])


def start(*words):
    """As `train.cli`, whose errors are lines."""
    cfg = parse_config(list(words))
    (dry_run.dry_run if cfg.dry_run else train.main)(cfg)


def shape_of(cfg):
    return memory.shape_of(memory.published(cfg.model))


def shrunk(cfg, config, processor):
    """`one_update` with small widths."""
    text, vision = config.text_config, config.vision_config
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    for name, value in (small | {"num_key_value_heads": 2, "vocab_size": 1000}).items():
        setattr(text, name, value)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [2, 3, 3]}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
    for name, value in small.items():
        setattr(vision, name, value)
    return REAL(cfg, config, processor)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to start in, where nothing may appear, and small widths."""
    monkeypatch.setattr(dry_run, "one_update", shrunk)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "millions", "updates"),
    [
        ("qwen2.5-vl-3b-lora", 447, 125),
        pytest.param("qwen2.5-vl-7b", 844, 250, marks=pytest.mark.slow),
    ],
)
def test_a_preset_of_real_widths_dry_runs(name, millions, updates, tmp_path):
    """As a user gives it: 40 s and 3 GB for 3B, twice as much for 7B, on one core."""
    words = ("--config", ROOT / f"configs/{name}.yaml", "--data", "mine", "--dry_run")
    said = launch(*words, cwd=tmp_path).stdout
    assert not list(tmp_path.iterdir())
    for line in SAID:
        assert re.search(f"^{line} ", said, re.M), line
    for words in (
        f"{millions} million random parameters",
        "mine is not on this disk: 1,000 rows are assumed",
        f"cold start   {updates} updates of 8 of 1,000 rows",
        "64,000 responses: 64 to each of 1,000 prompts",
    ):
        assert words in said
    norms = re.findall(r"(sft|rl): .*?gradient ([\d.]+)", said, re.S)
    assert [stage for stage, _ in norms] == ["sft", "rl"] and all(float(n) > 0 for _, n in norms)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_dry_runs(file, here, capsys):
    start("--config", str(file), "--data", "mine", "--dry_run")
    said, given = capsys.readouterr().out, yaml.safe_load(file.read_text())
    assert not list(here.iterdir()) and all(f"\n{line} " in said for line in SAID)
    norms = re.findall(r"^ +(sft|rl): .*?gradient (\S+)", said, re.M | re.S)
    assert [stage for stage, _ in norms] == ["sft", "rl"][given.get("sft_steps") == 0 :]
    assert all(float(norm) > 0 for _, norm in norms)
    assert f"whether {given['judge']} answers: it was not asked" in said


def test_a_folder_without_weights_will_do(here, world, monkeypatch, capsys):
    """Its shapes, its tokenizer and its limits are used; here in half precision."""
    model = here / "model"
    shutil.copytree(world / "policy", model, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(OSError, match="no weights"):
        pretrained.opened(str(model))
    monkeypatch.setattr(dry_run, "bfloat16_is_fast", lambda: True)
    monkeypatch.setattr(dry_run, "one_update", REAL)
    words = ["--model", str(model), "--data", str(world / "data"), "--judge", "somebody"]
    words += ["--dry_run", "--dtype", "bfloat16"]
    start(*words)
    said = " ".join(capsys.readouterr().out.split())
    assert "float32" not in said and "shapes and tokenizer as on this disk" in said
    assert "60 cold_start, 10 test, 4 test_pairs, 12 train" in said
    assert "RL 60 updates of 6 of 6 prompts with 8 responses each: 2,880 responses" in said
    assert re.search(r"rl: .*made_up 0.50 .*gradient 0*[.\d]*[1-9]", said)
    with pytest.raises(DataError, match="the limit is 9"):
        start(*words, "--max_prompt_tokens", "9")
    assert [path.name for path in here.iterdir()] == ["model"]


def test_a_run_does_what_its_dry_run_says(world, tmp_path):
    words = "--sft_epochs 0.3 --sft_batch 8 --responses 3 --rl_epochs 2 --prompts_per_step 4 "
    words += "--group_size 2 --max_new_tokens 3 --quiet --eval_responses 1 --keep 1"
    given = {"data": world / "data", "model": world / "policy", "judge": world / "judge"}
    given |= {"output_dir": tmp_path / "run", "reward": f"{ROOT / 'dry_run.py'}:made_up"}
    cfg = parse_config([*words.split(), *(f"--{name}={value}" for name, value in given.items())])
    config, processor, _ = dry_run.model_of(cfg)
    sizes, prompt, _ = dry_run.rows_of(cfg, config, processor)
    said = dry_run.stages(cfg, sizes)
    assert 1 < prompt - memory.QUESTION < 20  # of the clips there
    train.main(cfg)
    files = ("sft/metrics", "select/scores", "rl/metrics", "rl/rollouts", "judge/0")
    lines = {name: len(read_jsonl(tmp_path / "run" / f"{name}.jsonl")) for name in files}
    numbers = {name: list(map(int, re.findall(r"\d+", line))) for name, line in said.items()}
    assert lines["sft/metrics"] == numbers["cold start"][0] == 3
    assert lines["select/scores"] * 3 == numbers["selection"][0] == 36
    assert lines["rl/metrics"] == numbers["RL"][0] == 6
    assert lines["rl/rollouts"] * 2 == numbers["RL"][4] == 48
    assert numbers["evaluation"] == [14]
    [most] = re.findall(r"up to (\d+) calls", said["judge"])
    assert lines["judge/0"] <= int(most) == 14 * 2 * 2 + 36 + 48 + 10 * 1 + 64


def test_what_a_real_start_refuses_is_refused(here, world, monkeypatch):
    def refused(says, *words, **launched):
        with monkeypatch.context() as patch, pytest.raises((ConfigError, DataError), match=says):
            for name, value in launched.items():
                patch.setenv(name, value)
            start("--dry_run", *words)

    refused("sft_batch: must be at least 1", "--sft_batch", "0")
    refused("32 is not a multiple of the 3 processes", WORLD_SIZE="3")
    refused("fsdp_version: 2", ACCELERATE_USE_FSDP="true")
    refused("DEEPSPEED is not supported", ACCELERATE_USE_DEEPSPEED="true")
    refused("holds no data file", "--data", str(here))
    refused("has no train_other.json", "--train_set", "train_other")
    refused("has no function nothing", "--reward", f"{ROOT / 'dry_run.py'}:nothing")
    refused("its shapes are not known", "--model", "some/model", "--judge", "x")
    (here / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    refused("only Qwen2.5-VL", "--model", str(here), "--judge", "x")
    shutil.copytree(world / "data", here / "data")
    rows = json.loads((here / "data/train.json").read_text())
    (here / "data" / rows[0]["path"]).write_bytes(b"no picture")
    refused("train.json row 0", "--data", str(here / "data"))


def test_rows_that_no_stage_can_learn_from_are_refused(here, world, tmp_path):
    """By a real start too, before it loads a model."""
    shutil.copytree(world / "data", here / "data")

    def refused(says, rows, *words):
        (here / "data/train.json").write_text(json.dumps(rows))
        for more in (["--dry_run"], ["--output_dir", str(tmp_path / "run")]):
            words = [*words, "--data", str(here / "data"), "--world", str(world), *more]
            with pytest.raises(DataError, match=says):
                start(*words)
        assert not (tmp_path / "run/judge").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    rows = json.loads((here / "data/train.json").read_text())
    (here / "data/cold_start.json").unlink()
    refused("rl: too few rows .1.. .* at least 2", rows[:2])
    refused("no two rows of train share theirs", rows[:6], "--caption_reward", "shared")
    bad = rows[0] | {"process": "<think>red</think><answer>red</answer>"}
    refused("lacks a stage", [bad, *rows[1:]])


def test_a_folder_and_a_share_are_checked_and_no_cache_is_left(here, world, monkeypatch, capsys):
    (here / "full").mkdir()
    (here / "full/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="full is not empty and not a run folder"):
        start("--dry_run", "--output_dir", "full")
    with pytest.raises(ConfigError, match="share: nothing is not a run folder"):
        start("--dry_run", "--share", "nothing")
    kept = media_check.Checked(here).file.parent
    before = set(kept.iterdir())
    start("--dry_run", "--method", "grpo", "--reference", "cpu")
    said = capsys.readouterr().out
    assert set(kept.iterdir()) == before and said.endswith("Nothing was written.\n")
    assert float(re.findall(r"rl: .*?gradient ([\d.]+)", said, re.S)[0]) > 0


def test_what_will_not_happen_is_said(here):
    sizes = {"train": 8, "taught": 0}
    said = dry_run.stages(parse_config(["--method", "sft"]), sizes)
    assert said["cold start"] == "none: no row has a reference response in `process`"
    assert said["evaluation"].startswith("none") and "RL" not in said
    said = dry_run.stages(parse_config(["--sft_steps", "0"]), sizes | {"test": 5})
    assert said["cold start"] == "none: --sft_steps 0" and said["evaluation"].startswith("5 test")


def test_one_process_speaks_and_another_machine_is_said(here, monkeypatch, capsys):
    cfg = parse_config(["--dry_run", "--prompts_per_step", "32"])
    monkeypatch.setenv("RANK", "1")
    dry_run.dry_run(cfg)
    assert not capsys.readouterr().out
    launched = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "16", "ACCELERATE_USE_FSDP": "true"}
    for name, value in (launched | {"FSDP_VERSION": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dry_run.os, "cpu_count", lambda: 8)
    processes, sharded, lines = dry_run.launch_of(cfg)
    assert (processes, sharded) == (16, True)
    assert lines[1].startswith("but not on this machine: launch file: 16 processes")


def test_what_this_machine_lacks_is_one_line_each(monkeypatch):
    cfg = preset("ovip-paper", "--judge", "http://127.0.0.1:9/v1", "--judge_model", "m")
    monkeypatch.setattr(dry_run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    needs = ["torch>=2.9", "av>=15", "numpy>=1", "openai>=1; extra == 'judge'"]
    installed = [
        SimpleNamespace(name="ground-what-you-see", version="1", requires=needs),
        SimpleNamespace(name="torch", version="2.0.1", requires=[]),
        SimpleNamespace(name="numpy", version="2.9.0.dev1", requires=[]),
    ]
    monkeypatch.setattr(dry_run.metadata, "distributions", lambda: installed)
    lines = dry_run.lacking(cfg)
    words = ("openai:", "OPENAI_API_KEY", "diffusers:", "a GPU that", "torch>=2.9 (2.0.1", "av>=15")
    assert len(lines) == len(words) and all(map(str.startswith, lines, words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert "a GPU with bfloat16: give --dtype float32" in dry_run.lacking(cfg)


# --- memory ---------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_released_models(policy):
    """3.75 and 8.29 billion, as their repositories say; and of a model that is here, its own."""
    for size, billions in (("3B", 3.75), ("7B", 8.29)):
        shape = memory.shape_of(memory.published(f"Qwen/Qwen2.5-VL-{size}-Instruct"))
        assert round((shape.text + shape.vision) / 1e9, 2) == billions
    shape = memory.shape_of(policy.core.config)
    assert shape.text + shape.vision == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_what_would_fit_does(file):
    """Each way that is proposed, given as it is said, fits on that card."""
    cfg, ways = parse_config(["--config", str(file)]), 0
    shape, prompt = shape_of(cfg), memory.prompt_tokens(cfg)
    for card in (10e9, 16e9, 24e9, 48e9, 80e9, 141e9, 999e9):
        said = memory.advice(cfg, shape, prompt, card)
        assert (said == "fits") == (memory.most(cfg, shape, prompt) <= 0.9 * card)
        for way in said.partition("Would fit: ")[2].split("; or "):
            flags = re.findall(r"--(\w+) (\w+)", way)
            gpus = int((re.findall(r"FSDP2 on (\d)", way) or [1])[0])
            if flags or gpus > 1:
                given = dataclasses.replace(cfg, **{k: yaml.safe_load(v) for k, v in flags})
                assert memory.most(given, shape, prompt, gpus, gpus > 1) <= 0.9 * card
                assert not cfg.prompts_per_step % gpus and not cfg.sft_batch % gpus
                ways += 1
    assert ways


def test_a_gpu_that_is_too_small_is_told_what_would_fit():
    cfg = preset("qwen2.5-vl-7b")
    of = shape_of(cfg), memory.prompt_tokens(cfg)
    said = [memory.advice(cfg, *of, card * 1e9) for card in (10, 80)]
    small = "too small: 164 GB are needed, and {} can be used. Would fit: "
    assert said[0] == small.format(9) + "nothing that is known here"
    assert said[1] == small.format(72) + "FSDP2 on 4 GPUs; or --lora_rank 16"
    assert memory.advice(cfg, *of, 80e9, 8, True) == "fits"
    odd = dataclasses.replace(cfg, prompts_per_step=6)
    assert "FSDP2" not in memory.advice(odd, *of, 80e9)
    cfg = dataclasses.replace(cfg, lora_rank=16, gradient_checkpointing=False, prompts_per_pass=0)
    assert "--gradient_checkpointing true" in memory.advice(cfg, *of, 40e9)


def test_a_clip_takes_more_than_a_picture():
    """16 frames in pairs, and max_pixels of each."""
    cfg = preset("qwen2.5-vl-3b-lora")
    assert [memory.prompt_tokens(cfg, clips) for clips in (False, True)] == [612, 4196]
    shape = shape_of(cfg)
    few, many = (memory.most(cfg, shape, n) for n in (612, 4196))
    assert 1e9 < many - few < 4e9


def test_a_judge_beside_the_policy_is_counted(world, tmp_path):
    """By its name, else by its files; one that is elsewhere is named."""
    size = (world / "judge/model.safetensors").stat().st_size
    assert memory.beside(str(world / "judge")) == size > 1e5
    assert memory.beside("/models/Qwen2.5-7B-Instruct/") == 2 * 7.61e9
    assert memory.beside("https://some.where/v1") == memory.beside("") == 0
    cfg = preset("qwen2.5-vl-3b-lora", "--judge", "some/judge")
    lines = dry_run.memory_lines(cfg, shape_of(cfg), 612, 1, False)
    assert "some/judge is not counted: its size is not known here" in lines


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_those_that_autograd_saves(lora):
    """Of a decoder layer in bfloat16, for each token: within 8 %."""
    cfg = preset("qwen2.5-vl-3b-lora")
    text = {"hidden_size": 256, "intermediate_size": 1376, "vocab_size": 160}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = memory.published(cfg.model, text, {"depth": 1, "fullatt_block_indexes": [0]})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=pretrained.LORA_TARGETS))
    held, mine = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(tokens):
        held.clear()
        ids = torch.randint(100, (1, tokens))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(input_ids=ids, logits_to_keep=1)
        return sum(held.values())

    def keep(x):
        place = x.untyped_storage()
        if place.data_ptr() not in mine:
            held[place.data_ptr()] = place.nbytes()
        return x

    found = (saved(600) - saved(300)) / 300 / 2  # a layer, without what does not grow
    given = dataclasses.replace(
        cfg,
        **{"lora_rank": 2 * lora, "gradient_checkpointing": False, "sft_steps": 0, "sft_epochs": 0},
        **{"group_size": 2, "max_new_tokens": 1},
    )
    shape = memory.shape_of(config)
    many, few = (memory.needs(given, shape, n)["parts"]["activations"] for n in (600, 300))
    assert (many - few) / 300 / 2 == pytest.approx(found, rel=0.08)


def test_a_real_start_warns_before_it_loads(world, monkeypatch):
    """Where the GPU is too small, and only there."""
    card = SimpleNamespace(total_memory=99e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    cfg, said = parse_config([f"--world={world}"]), []
    run = SimpleNamespace(device=torch.device("cuda"), processes=1, sharded=False, is_main=True)
    run.say = said.append
    memory.check(cfg, run, 100)
    assert not said
    card.total_memory = 1e9
    memory.check(cfg, run, 100)
    run.device = torch.device("cpu")
    memory.check(cfg, run, 100)
    assert len(said) == 1 and said[0].startswith("warning: this GPU of 1 GB is too small: 2 GB are")


def test_the_documented_memory_is_what_is_computed():
    table = [line for line in (ROOT / "docs/speed.md").read_text().splitlines() if "|" in line]
    for name, row, processes in (
        ("qwen2.5-vl-3b-lora", "3b-lora.yaml", 1),
        ("qwen2.5-vl-7b", "7b.yaml", 1),
        ("qwen2.5-vl-7b", "the same, each of 8", 8),
        ("official", "official.yaml", 1),
        ("official", "official.yaml", 8),
        ("ovip-paper", "ovip-paper.yaml", 1),
        ("ovip-code", "ovip-code.yaml", 8),
    ):
        cfg = preset(name)
        prompt = memory.prompt_tokens(cfg)
        found = memory.needs(cfg, shape_of(cfg), prompt, processes, processes > 1)
        cells = next(line for line in table if row in line).split("|")
        at = -1 if processes > 1 else 0
        numbers = [int(re.findall(r"\d+(?![.\d]|P)", cells[k])[at]) for k in (2, 4)]
        assert numbers == [round(found[k] / 1e9) for k in ("training", "generation")], row
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "16 GB for the first preset and 46 GB on each of eight GPUs" in readme
