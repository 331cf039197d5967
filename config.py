"""Every option of a run: its default, its bounds, what it does, and [where the value comes from].

Defaults fit the embedded world; configs/ has presets for real models. D-1 and the like are
explained in DEPARTURES.md.
"""

import dataclasses
import importlib.util
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

import corruption
import grpo
import ntk_infonce
import ovip
import variance_select
from caption_reward import KINDS, MAX_TOKENS
from engine import ConfigError
from engine.judges import is_url, url_problem
from engine.options import check_field, option, parse
from engine.run import COLLECTIVE_TIMEOUT

MECHANISMS = {  # what --method stands for; but for ovip each switch can be set by itself
    # fmt: off
    "ours": {"four_stage": True, "caption_reward": KINDS[0], "selection": True, "nce_weight": 0.01},
    "grpo": {"four_stage": False, "caption_reward": "", "selection": False, "nce_weight": 0.0},
    "sft": {"four_stage": True, "caption_reward": "", "selection": False, "nce_weight": 0.0},
    "ovip": {"four_stage": True, "caption_reward": "", "selection": False, "nce_weight": 0.0},
    # fmt: on
}
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2")
HEADINGS = {  # the first option of each group in `--help`
    "method": "the method",
    "model": "model, data, judge",
    "min_pixels": "pictures, clips, prompts",
    "dtype": "precision and memory",
    "sft_steps": "cold start",
    "responses": "selection",
    "rl_steps": "reinforcement learning, Eq. 1",
    "accuracy_weight": "rewards",
    "nce_feature": "conflict regulariser, Eq. 4",
    "negatives": "OViP (--method ovip)",
    "eval_batch": "evaluation, checkpoints, screen",
}
SHARED = (  # what decides a cold start and its responses: runs that share them agree on these
    "four_stage model data on_bad_row judge judge_model judge_max_tokens world seed min_pixels "
    "max_pixels fps max_frames max_prompt_tokens dtype attention lora_rank train_vision sft_steps "
    "sft_epochs sft_batch sft_lr warmup weight_decay max_grad_norm responses max_new_tokens "
    "lenient eval_responses"
).split()
# held_out_reward may ask four times while other ranks wait: twice, and with `gain` twice each
MAX_DEADLINE = COLLECTIVE_TIMEOUT.seconds // 4


@dataclass
class Config:
    """Every value of a run, in one flat block."""

    # fmt: off
    method: str = option("ours", choices=tuple(MECHANISMS), help=
        "ours, grpo (plain: two stages, two rewards, D-43), sft (cold start) or ovip [paper, Table "
        "1; OViP]")
    four_stage: bool | None = option(None, help=
        "planning and caption stages too; default by --method [paper, Table 2]")
    caption_reward: str | None = option(None, choices=("", *KINDS, "false"), help=
        "external, self, gain, shared or false; default by --method [paper, Table 2; Vision-SR1, "
        "CaR, CapRL]")
    selection: bool | None = option(None, help=
        "top half of the prompts by variance; default by --method [paper, Table 3]")
    nce_weight: float | None = option(None, low=0, help=
        "weight of Eq. 4, 0 = off; ours: 0.01, D-55 [official code, paper silent]")

    model: str = option("", help=
        "Qwen2.5-VL, folder or hub id; empty: the embedded world's tiny policy [choice]")
    data: str = option("", help=
        "dataset folder or file (see data.py); empty: the embedded world's [choice]")
    train_set: str = option("train", help="set of the data whose prompts RL learns from [choice]")
    on_bad_row: str = option("error", choices=("error", "skip"), help=
        "error: stop before any work; skip: leave bad rows out [choice]")
    judge: str = option("", help=
        "causal LM, or OpenAI-compatible URL; empty: the embedded world's [choice]")
    judge_model: str = option("", help=
        "model at the judge's URL; its key comes from OPENAI_API_KEY [choice]")
    judge_concurrency: int = option(16, low=1, resumable=True, help=
        "calls at a time to the judge's URL, on each rank [choice]")
    judge_deadline: float = option(600.0, above=0, below=MAX_DEADLINE, resumable=True, help=
        "seconds for a step's calls; what is not there by then is unknown, D-15 [choice]")
    judge_max_tokens: int = option(MAX_TOKENS, low=1, resumable=True, help=
        "longest reply, thought included; a longer one is unknown [choice]")
    corrupt_train: str = option("", choices=("", *corruption.KINDS), help=
        "corrupt RL's prompts, or a share of them [Hallucination-as-Cue: blank, random_media, "
        "remove_text]")
    corrupt_share: float = option(1.0, low=0, high=1, help=
        "share of RL's prompts that --corrupt_train corrupts [Hallucination-as-Cue: 1]")
    corrupt_eval: str = option("", choices=("", *corruption.KINDS), several=True, help=
        "evaluate on the test sets with these corruptions too [Hallucination-as-Cue]")
    world: str = option("shapes-world", help="where the embedded world is built, once [choice]")
    output_dir: str = option("", resumable=True, help=
        "run folder; empty: runs/METHOD-DATA-MODEL-seedSEED, those given [choice]")
    seed: int = option(0, help="seed of data order, sampling and LoRA [choice]")
    share: str = option("", help=
        "run folder whose cold start, its evaluation and scored responses are taken over [choice]")

    min_pixels: int = option(3136, low=1, help=
        "pictures and frames are enlarged to at least this [qwen-vl-utils: 4 tokens]")
    max_pixels: int = option(401408, low=1, help="and reduced to at most this [official code]")
    fps: float = option(2.0, above=0, help="frames a second taken from a clip [qwen-vl-utils]")
    max_frames: int = option(16, low=1, help="most frames taken from a clip [Video-R1]")
    max_prompt_tokens: int = option(0, low=0, help=
        "longer prompts are bad rows; 0: the model's own limit [choice]")
    media_workers: int = option(0, low=0, resumable=True, help=
        "processes on each rank that read the next update's media; 0: none, see speed.md [choice]")

    dtype: str = option("float32", choices=("float32", "bfloat16", "float64"), help=
        "float32, bfloat16 or float64 [official code: bfloat16]")
    attention: str = option("sdpa", choices=ATTENTION, help=
        f"{', '.join(ATTENTION)}; the last shares no prompt in scoring [choice]")
    static_decoding: bool = option(False, resumable=True, help=
        "decode in steps of one shape, which a GPU records once and replays [choice]")
    lora_rank: int = option(0, low=0, help=
        "rank of LoRA on the language model's linears; 0: full fine-tuning [official code]")
    merge: bool = option(False, help=
        "with LoRA: write merged weights at the end, not the adapter alone [choice]")
    train_vision: bool = option(False, help="train the vision tower as well [choice]")
    gradient_checkpointing: bool = option(False, resumable=True, help=
        "recompute activations, saves memory [official code: true]")
    reference: str = option("copy", choices=("copy", "cpu"), resumable=True, help=
        "full fine-tuning's frozen model: on each device, or in host memory (cpu) [choice]")

    sft_steps: int = option(250, low=0, help=
        "cold-start updates; 0: none [choice; official code: 2 epochs]")
    sft_epochs: float = option(0.0, low=0, help=
        "above 0: this many passes over the rows in place of sft_steps [official code: 2]")
    sft_batch: int = option(32, low=1, help=
        "rows per cold-start update, over all ranks [choice; official code: 8]")
    sft_lr: float = option(2e-3, above=0, help=
        "cold-start learning rate [choice for a 1.5 M model; official code: 1e-6]")

    responses: int = option(64, low=2, help=
        "responses per prompt scored for selection; one has no variance [paper]")
    keep: float = option(0.5, above=0, high=1, help="share of the prompts kept [paper]")
    select_within: str = option("", choices=("", "category"), help=
        "category: at most that share of each category; empty: of all prompts [paper]")
    select_class: str = option("", choices=("", *variance_select.CLASSES), help=
        "keep that share of this class only; empty: of all prompts [paper, Table 3]")
    select_batch: int = option(16, low=1, resumable=True, help=
        "prompts scored at a time on each rank, by memory [choice]")

    rl_steps: int = option(60, low=0, help=
        "updates of reinforcement learning [choice; official code: 1 epoch]")
    rl_epochs: float = option(0.0, low=0, help=
        "above 0: this many passes over the prompts in place of rl_steps [official code: 1]")
    prompts_per_step: int = option(24, low=1, help=
        "prompts per update, over all ranks [choice; official code: 8]")
    prompts_per_pass: int = option(0, low=0, resumable=True, help=
        "rows per micro-batch of an update (not of sampling), to save memory; 0: all [choice]")
    completions_per_pass: int = option(0, low=0, resumable=True, help=
        "responses per pass of an update behind a prompt that runs once, to save memory; 0: all "
        "[choice]")
    group_size: int = option(8, low=2, help=
        "G, responses per prompt; one has no advantage [official code; paper silent]")
    max_new_tokens: int = option(40, low=1, help="longest response [choice; official code: 768]")
    rl_lr: float = option(3e-4, above=0, help=
        "learning rate, cosine [choice for a 1.5 M model; official code: 1e-6]")
    warmup: float = option(0.05, low=0, below=1, help=
        "share of a stage's updates with rising rate [choice; official code: 0]")
    weight_decay: float = option(0.01, help=
        "AdamW's, on matrices: norms and biases have none [official code]")
    max_grad_norm: float = option(1.0, above=0, help="gradient clipping [choice; official code: 5]")
    beta: float = option(0.04, low=0, help=
        "weight of the KL in Eq. 1; 0: no reference model [official code, paper silent]")
    kl_kind: str = option("k3", choices=grpo.KL_KINDS, help="k1, k2, k3 or rho_k3 [official code]")
    eps_low: float = option(0.2, low=0, help=
        "clip(rho, 1 - eps_low, 1 + eps_high) in Eq. 1 [GRPO, paper silent]")
    eps_high: float = option(0.2, low=0, help="see eps_low [GRPO, paper silent]")
    loss_norm: str = option("sequence", choices=("sequence", "token", "constant"), help=
        "sequence (Eq. 1), token (DAPO) or constant (Dr. GRPO) [paper]")
    iterations: int = option(1, low=1, help=
        "updates per batch of responses; above 1 the clip acts, D-3 [official code]")

    accuracy_weight: float = option(1.0, help="weight of the accuracy reward [official code]")
    format_weight: float = option(0.1, help="weight of the format reward [official code]")
    caption_weight: float = option(1.0, help="weight of the Caption Reward [official code]")
    leak_penalty: float = option(0.0, low=0, help=
        "taken off where a caption only states the answer, D-14; 0: counted [choice]")
    reward: str = option("", help=
        "FILE.py:NAME, a reward function of your own beside these (docs/neighbours.md) [choice]")
    lenient: bool = option(False, help=
        "accuracy reward by the lenient rule of answers.py [official code: strict]")

    nce_feature: str = option("reference", choices=tuple(ntk_infonce.FEATURES), help=
        f"y_i of Eq. 4, D-51: {', '.join(ntk_infonce.FEATURES)} [choice; official: hidden_mean]")
    tau: float = option(0.54, low=-1, high=1, help=
        "cosine threshold of Eq. 4, D-54 [paper, Figure 5a]")
    tau_quantile: float = option(0.0, low=0, below=1, help=
        "above 0: tau is this quantile of the batch's cosines instead [choice]")
    nce_temperature: float = option(1.0, above=0, help="temperature of Eq. 4, D-53 [paper: none]")
    nce_control: bool = option(False, help=
        "control: cosines of other pairs decide which pairs of Eq. 4 are positives [choice]")
    nce_sketch: int = option(0, low=0, help=
        "above 0: f_i as a TensorSketch of so many numbers, for a y_i of many tokens [choice]")

    negatives: str = option("", choices=("", "draw", "diffusion", "crop", "blur", "random"), help=
        "draw (default in the embedded world), diffusion (default), crop, blur or random [OViP]")
    pairs: int = option(16, low=1, help="pairs per update, over all ranks [OViP]")
    pair_rule: str = option("paper", choices=("paper", "code"), help=
        "which responses make a pair: paper (Algorithm 1) or code (as released), D-81 [OViP]")
    buffer: str = option("random", choices=("random", "fifo"), help=
        "pairs leave the buffer by chance (random) [OViP] or in order (fifo) [its code]")
    dpo_beta: float = option(0.1, above=0, help="beta, beta1 and beta2 of its losses [OViP]")
    image_loss: str = option("two_sigmoids", choices=("", *ovip.FORMS), help=
        "two_sigmoids, printed or base, D-80; empty: none, which is online DPO [its code]")
    image_weight: float = option(1.0, low=0, help=
        "weight of the image loss [OViP; its code by default: 0.5]")
    temperature: float = option(1.0, above=0, help="OViP's sampling; its code: 1.2 [choice]")
    top_p: float = option(1.0, above=0, high=1, help="OViP's sampling; its code: 0.8 [choice]")
    diffusion: str = option("black-forest-labs/FLUX.1-dev", help=
        "text-to-image model of diffusers, folder or hub id [OViP]")
    diffusion_size: int = option(384, low=8, help="its pictures' sides, in pixels [OViP]")
    diffusion_steps: int = option(40, low=1, help="its steps of denoising [OViP]")
    diffusion_guidance: float = option(7.5, low=0, help="its guidance scale [OViP]")

    eval_batch: int = option(64, low=1, resumable=True, help=
        "rows per evaluation batch on each rank [choice]")
    eval_responses: int = option(4, low=0, help=
        "responses sampled to each test row with a judge, for the slope; 0: none [choice]")
    held_out_rows: int = option(64, low=0, help=
        "rows (validation, or first test set) that compare RL's checkpoints; 0: no [choice]")
    save_every: int = option(20, low=1, resumable=True, help=
        "checkpoint every so many updates [choice; official code: 100]")
    keep_last: int = option(1, low=1, resumable=True, help=
        "checkpoints kept while a stage runs [choice]")
    max_skipped: int = option(5, low=1, resumable=True, help=
        "stop after so many updates in a row with a loss or gradient not finite [choice]")
    max_truncated: float = option(0.25, resumable=True, help=
        "warn where a greater share of responses is cut at max_new_tokens [choice]")
    show_every: int = option(10, low=0, resumable=True, help=
        "print a sampled response every so many updates, 0: never [choice]")
    tracker: str = option("", choices=("", "tensorboard", "wandb"), resumable=True, help=
        "also log to tensorboard or wandb, through accelerate [choice]")
    quiet: bool = option(False, resumable=True, help="print only the result [choice]")
    dry_run: bool = option(False, resumable=True, help=
        "say what will happen, try an update of one layer, write nothing [choice]")
    # fmt: on

    def __post_init__(self) -> None:
        """Resolve what --method leaves open; refuse what cannot work, before anything is loaded."""
        vars(self).update(self.in_words(vars(self)))
        for f in dataclasses.fields(self):
            check_field(f, getattr(self, f.name))
        for name, value in MECHANISMS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels: {self.min_pixels} is more than max_pixels, {self.max_pixels}"
            )
        if wrong := url_problem(self.judge):
            raise ConfigError(f"judge: {wrong}")
        if is_url(self.judge) and not self.judge_model:
            raise ConfigError("judge_model: name the model that the judge's URL serves")
        if self.model and self.caption_reward not in ("", "self") and not self.judge:
            raise ConfigError(
                "judge: --model needs a judge of its own; give --judge, --caption_reward self (the "
                "policy judges), or --caption_reward false"
            )
        if self.caption_reward and not self.four_stage:
            raise ConfigError(
                "caption_reward: there is no caption without four_stage; set --caption_reward false"
            )
        if self.reward and self.select_class:
            raise ConfigError(
                "select_class: with --reward it is unknown what is easy; leave one of the two out"
            )
        if self.lora_rank and self.train_vision:
            raise ConfigError("train_vision: LoRA leaves it frozen; set --lora_rank 0")
        if self.attention == "flex_attention" and not torch.cuda.is_available():
            raise ConfigError("attention: flex_attention has no backward pass on a CPU; give sdpa")
        has_flash = self.dtype == "bfloat16" and is_flash_attn_2_available()
        if self.attention == "flash_attention_2" and not has_flash:
            raise ConfigError(
                "attention: flash_attention_2 needs a GPU, flash-attn and --dtype bfloat16"
            )
        forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        if self.media_workers and not forks:
            raise ConfigError("media_workers: they are forked, which is safe on Linux only; give 0")
        if self.tracker and importlib.util.find_spec(self.tracker) is None:
            raise ConfigError(
                f"tracker: {self.tracker} is not installed; pip install {self.tracker}"
            )
        if self.method != "sft" and self.nce_weight and self.prompts_per_step < 3:
            raise ConfigError(
                "prompts_per_step: Eq. 4 needs a positive and a negative beside a prompt; give at "
                "least 3, or --nce_weight 0"
            )
        if self.corrupt_train and self.method == "sft":
            raise ConfigError("corrupt_train: --method sft has no RL whose prompts to corrupt")
        if self.corrupt_share < 1 and not self.corrupt_train:
            raise ConfigError("corrupt_share: say how with --corrupt_train")
        if self.completions_per_pass and not self.splits:
            raise ConfigError(
                "completions_per_pass: give 0 with --method ovip, with --nce_feature best or "
                "advantage, which are of all responses, and with another --attention than sdpa"
            )
        self._check_ovip()
        given = (Path(self.data).stem, Path(self.model).name, f"seed{self.seed}")
        default = "runs/" + "-".join(filter(None, (self.method, *given)))
        self.output_dir = self.output_dir or default

    def _check_ovip(self) -> None:
        """What --method ovip needs, and what only it has."""
        if self.method != "ovip":
            if (self.temperature, self.top_p) != (1, 1):
                raise ConfigError(
                    "temperature, top_p: GRPO samples what it scores (D-8); only OViP does not"
                )
            return
        for name in ("caption_reward", "selection", "nce_weight", "corrupt_train", "reward"):
            if getattr(self, name):
                raise ConfigError(f"{name}: OViP has none; leave it out, or give another --method")
        if self.iterations > 1:
            raise ConfigError("iterations: OViP takes each pair once; leave it out")
        if not (self.image_loss and self.image_weight):
            self.negatives = ""  # online DPO, which needs no images
            return
        self.negatives = self.negatives or ("diffusion" if self.data else "draw")
        if self.negatives == "draw" and (self.data or not self.four_stage):
            raise ConfigError(
                "negatives: draw shows what a caption says of the embedded world's scenes. Without "
                "captions, or with --data, give diffusion, crop, blur or random"
            )
        if self.negatives == "diffusion" and not self.judge:
            raise ConfigError(
                "judge: --negatives diffusion (default with --data) needs one, which says what to "
                "paint. Give --judge, or --negatives crop, blur or random"
            )

    @staticmethod
    def in_words(values: dict[str, Any]) -> dict[str, Any]:
        """The values as a run keeps them: --caption_reward true or false by its kind, and folders
        without a slash at their end."""
        said = values.get("caption_reward")
        kinds = {"true": "external", "false": ""}
        folders = [k for k in ("model", "data", "judge", "world", "share") if values.get(k)]
        values = values | {k: str(values[k]).rstrip("/") or "/" for k in folders}
        return values | {"caption_reward": kinds.get(str(said).lower(), said)}

    @property
    def start(self) -> str:
        """The model before the cold start."""
        return self.model or str(Path(self.world) / "policy")

    @property
    def splits(self) -> bool:
        """Can the update take the responses in passes?"""
        whole = self.nce_weight and self.nce_feature in ntk_infonce.OF_ALL_RESPONSES
        return self.method != "ovip" and self.attention == "sdpa" and not whole

    @property
    def staged(self) -> set[str]:
        """The sets whose reference responses are learnt from and need all four stages."""
        taught = {"cold_start"} if self.sft_steps or self.sft_epochs else set()
        taught |= {self.train_set} if self.method == "ovip" else set()
        return taught if self.four_stage else set()

    @property
    def reward_weights(self) -> dict[str, float]:
        weights = {"accuracy": self.accuracy_weight, "format": self.format_weight}
        if self.caption_reward:
            weights |= {"caption": self.caption_weight, "leak": self.leak_penalty}
        return weights

    @property
    def grpo_options(self) -> dict[str, Any]:
        names = ("beta", "eps_low", "eps_high", "kl_kind", "loss_norm")
        return {name: getattr(self, name) for name in names} | {"max_tokens": self.max_new_tokens}

    @property
    def resumable(self) -> set[str]:
        """The options that may differ between a run and its resumption."""
        return {f.name for f in dataclasses.fields(self) if f.metadata["resumable"]}


def parse_config(argv: list[str]) -> Config:
    """Command line -> Config. The command line wins over `--config file.yaml`."""
    return parse(
        Config,
        argv,
        HEADINGS,
        prog="train.py",
        usage="accelerate launch train.py [--config FILE] [--option VALUE ...]",
        description="Ground What You See: cold start, selection, GRPO with caption reward and "
        "InfoNCE, evaluation, report. D-1 and the like are explained in DEPARTURES.md.",
    )
