"""Many processes: the update of one, as many collectives in each, launch files; and a run that is
killed goes on.

`pytest -m soak` kills a run at random moments a hundred times (see `test_a_run_that_is_killed...`).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import train
from engine import run

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "configs" / "accelerate"
TINY = (
    "--dtype float64 --selection false --sft_steps 0 --sft_batch 8 --rl_steps 3 --prompts_per_step "
    "8 --group_size 4 "
    "--max_new_tokens 8 --rl_lr 1e-2 --warmup 0 --held_out_rows 6 --nce_weight 2 --tau_quantile "
    "0.5 --beta 0.2 "
    "--quiet true"
).split()
VARIANTS = {
    "plain": ["--sft_steps", "2"],
    "passes": "--prompts_per_pass 1 --iterations 2 --nce_feature advantage --nce_sketch 64".split(),
    # `plain`, but one process runs out of memory: in the cold start, before Eq. 4 is communicated,
    # and in the second backward pass of an update
    "short": "--sft_steps 2 FORWARD=5 BACKWARD=2,8".split(),
    "memory": "--prompts_per_pass 4 --nce_feature best MEMORY=1".split(),
    # pictures here and clips there, one of them with tied rewards only, and an odd number of
    # prompts
    "unlike": "--prompts_per_step 4 --train_vision true --completions_per_pass 3 UNSHUFFLED=1 TIED=video".split(),
    "lora": "--lora_rank 4 --gradient_checkpointing true --prompts_per_pass 4 --sft_steps 1 "
    "--completions_per_pass 2".split(),
    "half": "--dtype bfloat16 --prompts_per_pass 1 --rl_lr 1e-4".split(),
    "judge": "--nce_weight 0 --prompts_per_step 4 JUDGE=dies REWARD=real".split(),
    # pairs whose images some ranks lack; three forward passes before each backward pass
    "ovip": "--method ovip --nce_weight 0 --tau_quantile 0 --pairs 4 --negatives crop "
    "--prompts_per_pass 1 --rl_steps 2 SCORES=made".split(),
}
WHICH = {  # launch -> variants
    "one": ("plain", "passes", "memory", "unlike", "lora", "half", "ovip"),
    "two": ("plain", "short", "passes", "memory", "unlike", "judge", "ovip"),
    "four": ("plain",),  # slow
    "sharded": ("plain", "passes", "memory", "unlike", "lora", "half", "ovip"),
}
CASES = [
    pytest.param(launch, variant, marks=pytest.mark.slow if launch == "four" else [])
    for launch, variants in WHICH.items()
    for variant in variants
    if launch != "one"
]
LAUNCHES = {"one": (1, "gpu1"), "two": (2, "cpu2"), "four": (4, "cpu2"), "sharded": (2, "fsdp2")}


def accelerate(file, processes, *command, kept=os.environ["HF_ASSETS_CACHE"], **options):
    line = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        LAUNCH / f"{file}.yaml",
    ]
    line += [
        "--num_processes",
        processes,
        "--main_process_port",
        "0",
        *command,
    ]  # 0: one that is free
    environment = os.environ | {"HF_ASSETS_CACHE": str(kept)}
    return subprocess.run(
        list(map(str, line)),
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """Seven prompts, pictures and clips in turn."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [
        row | {"path": str(world / "data" / row["path"])}
        for row in json.loads((world / "data/train.json").read_text())
    ]
    images, videos = (
        [row for row in rows if row["data_type"] == kind] for kind in ("image", "video")
    )
    turns = [
        (videos if i % 2 else images)[i // 2 % len(videos if i % 2 else images)] for i in range(7)
    ]
    (folder / "train.json").write_text(
        json.dumps([row | {"problem_id": str(i)} for i, row in enumerate(turns)])
    )
    shutil.copytree(world / "data" / "test", folder / "test")
    shutil.copy(world / "data" / "test.json", folder)
    return folder


@pytest.fixture(scope="module")
def launched(world, mixed, tmp_path_factory):
    """(what each launch saw, its tensors, its run folders): every variant, by the number of
    processes, when it is asked for."""

    @cache
    def of(name):
        processes, file = LAUNCHES[name]
        folder = tmp_path_factory.mktemp(name)
        variants = {}
        for variant in WHICH[name]:
            options = VARIANTS[variant]
            data = ["--data", str(mixed)] if variant == "unlike" else []
            where = ["--world", str(world), "--output_dir", str(folder / variant)]
            variants[variant] = [*TINY, *where, *data, *options]
        (folder / "variants.json").write_text(json.dumps(variants))
        command = [ROOT / "tests/worker.py", folder / "out.json", folder / "variants.json"]
        done = accelerate(file, processes, *command, kept=folder / "kept")
        assert done.returncode == 0, done.stderr[-5000:]
        tensors = {
            variant: load_file(f"{folder}/out.json.{variant}.safetensors") for variant in variants
        }
        return json.loads((folder / "out.json").read_text()), tensors, folder

    return of


def metrics(folder):
    return [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("launch", "variant"), [case for case in CASES if case.values[1] not in ("judge", "half")]
)
def test_several_processes_make_the_update_of_one(launched, launch, variant):
    """The same loss, gradients and weights, with three rewards some of which are unknown, the KL
    and Eq. 4."""
    (_, one, folder), (seen, several, other) = launched("one"), launched(launch)
    as_one = "plain" if variant == "short" else variant
    if variant == "short":
        assert [u["passes"] for u in seen[variant]["updates"]] == [1, 2, 2, 4, 4]
    assert seen[variant]["processes"] == LAUNCHES[launch][0] and seen[variant]["sharded"] == (
        launch == "sharded"
    )
    assert len(seen[variant]["updates"]) >= 3 and one[as_one].keys() == several[variant].keys()
    for name, value in one[as_one].items():
        torch.testing.assert_close(
            several[variant][name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    gradients = torch.stack(
        [value.abs().max() for name, value in one[as_one].items() if name.startswith("gradient/")]
    )
    assert gradients.max() > 1e-2
    for a, b in zip(metrics(folder / as_one), metrics(other / variant), strict=True):
        assert b == pytest.approx(a, abs=1e-6)
        if variant == "ovip":
            assert a["updates"] > 1 and 0 < a["lost"] < 0.6 and a["pairs"] > 0.5
        else:
            assert a["nce/active"] > 0 and a["nce"] > 1e-3 and a["unknown"] > 0
    last = metrics(folder / as_one)[-1]
    assert abs(last["text_margin"]) > 1e-3 if variant == "ovip" else last["kl"] > 1e-3


def test_each_process_holds_only_its_share_of_a_sharded_policy(launched):
    """Weights, gradients and the optimiser's, in the middle of RL, in half precision as well."""
    seen = launched("sharded")[0]
    for variant in WHICH["sharded"]:
        shares = [update["share"] for update in seen[variant]["updates"]]
        assert max(shares) <= (1.0 if variant == "unlike" else 0.75), variant
    assert {update["share"] for update in launched("two")[0]["plain"]["updates"]} == {1.0}


def test_shards_of_half_precision_weights_learn_as_copies_do(launched):
    """Gathered in bfloat16, kept in float32: the gradients of one process but for bfloat16's
    rounding."""
    (_, one, _), (_, sharded, folder) = launched("one"), launched("sharded")
    assert len(metrics(folder / "half")) == 3
    for name, value in one["half"].items():
        if name.startswith("gradient/0/") and value.abs().max() > 1e-3:
            a, b = value.float().flatten(), sharded["half"][name].float().flatten()
            assert torch.cosine_similarity(a, b, dim=0) > 0.98, name
    assert all(
        value.dtype == torch.float32
        for name, value in sharded["half"].items()
        if name.startswith("weight/")
    )


def test_what_is_compared_is_not_constant(launched):
    """The three updates differ, so do the variants; and half of the prompts in `unlike` are
    tied."""
    _, tensors, folder = launched("one")
    for values in tensors.values():
        names = [name.partition("/0/")[2] for name in values if name.startswith("weight/0/")]
        assert any(
            not torch.equal(values[f"weight/0/{name}"], values[f"weight/1/{name}"])
            for name in names
        )
    assert {0.5, 0.25} & {line["tied"] for line in metrics(folder / "unlike")}


@pytest.mark.parametrize(("launch", "variant"), CASES)
def test_every_process_takes_part_in_as_many_collectives(launched, launch, variant):
    seen = launched(launch)[0][variant]
    assert len(set(seen["collectives"])) == 1 and seen["collectives"][0] > 20


def test_one_process_opens_the_media_once_for_all(launched):
    """One process opens the media once for all of them and for later runs."""
    for name in ("one", "two", "sharded"):
        processes = LAUNCHES[name][0]
        first, *later = (
            launched(name)[0][variant]["opened"] for variant in WHICH[name] if variant != "unlike"
        )
        assert first[0] > 20 and first[1:] == [0] * (processes - 1)
        assert all(opened == [0] * processes for opened in later)


def test_a_judge_dying_in_one_process_leaves_rewards_unknown(launched):
    """It answers when it is tried and once more; then half of each batch's captions are unknown,
    and none is wrong."""
    lines = [
        json.loads(line)
        for line in (launched("two")[2] / "judge/rl/rollouts.jsonl").read_text().splitlines()
    ]
    assert len(metrics(launched("two")[2] / "judge")) == 3
    for step in (2, 3):
        unknown = [line["caption"].count(None) for line in lines if line["step"] == step]
        assert sorted(unknown) == [0, 0, 4, 4]
    assert all(line["judge"] == [None] * 4 for line in lines if None in line["caption"])


def test_checkpoints_are_compared_on_validation(mixed, tmp_path):
    """Checkpoints are compared on the validation split where there is one."""
    cfg = train.Config(output_dir=str(tmp_path / "run"), quiet=True, held_out_rows=2)
    shutil.copytree(mixed, tmp_path / "data")
    shutil.copy(mixed / "train.json", tmp_path / "data/validation.json")
    for folder, rows in ((mixed, "test"), (tmp_path / "data", "validation")):
        sets = train.data.load(folder)
        asked = train.held_out(sets, None, cfg, run.Run(cfg)).args[0]
        assert len(asked) == 2 and {s.id for s in asked} <= {s.id for s in sets[rows]}
    cfg.held_out_rows = 0
    assert train.held_out(sets, None, cfg, run.Run(cfg)) is None


# --- launch files and refusals --------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_launch_file_is_one_to_accelerate(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == yaml.safe_load(file.read_text())["num_processes"]
    lines = file.read_text().splitlines()
    command = next(line for line in lines if line.startswith("# accelerate launch"))
    assert f"--config_file configs/accelerate/{file.name}" in command and "train.py" in command


@pytest.mark.parametrize(
    ("environment", "gpus", "cores", "says"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 2, 64, "8 processes on a machine with 2 GPUs"),
        ({"LOCAL_WORLD_SIZE": "8"}, 0, 2, "8 processes on a machine with no GPU and 2 CPU cores"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, 8, 64, "fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 8, 64, "DEEPSPEED is not supported"),
    ],
)
def test_a_launch_file_that_does_not_fit_is_refused(environment, gpus, cores, says):
    run.check_launch({}, gpus, cores)
    run.check_launch({"LOCAL_WORLD_SIZE": "2"}, gpus, cores)
    with pytest.raises(run.ConfigError, match=says):
        run.check_launch(environment, gpus, cores)


def test_what_is_refused_is_said_once_and_ends_every_process(world, tmp_path):
    begun, says = time.time(), "/nowhere does not exist"
    options = ["--world", world, "--output_dir", tmp_path / "run", "--data", "/nowhere"]
    done = accelerate("cpu2", 2, ROOT / "train.py", *options)
    assert done.returncode != 0 and done.stderr.count(says) == 1 and time.time() - begun < 120
    assert f"error: {says}" in done.stderr or "error: data" in done.stderr
