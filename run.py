"""One run: its processes, its folder and its screen. The only file that knows about ranks, launch files and sharding.

`accelerate launch` (configs/accelerate/) decides how the processes share the work; the code of a step is the same:

    one process, or DDP     each holds the policy. Gradients are averaged over processes in an update's last pass
    FSDP2                   each holds 1/P of the policy, its gradient and its optimiser; weights are gathered layer by
                            layer for the update, and whole while responses are sampled (`Run.whole`)

A loss is a sum over the rows of one process, divided by a count of the global batch, times P, because gradients are
averaged: P processes make the update of one. Every process takes part in the same collectives in the same order,
whatever its rows are: what may differ between processes (how long responses get, clips or pictures, memory that does
not suffice) happens where nothing is communicated, or is agreed on first (`Run.parts`).
"""

import json
import math
import os
import random
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data

PATIENCE = timedelta(hours=2)  # after which processes that wait for another give up; twice any deadline of the judge
FREE_TO_CHANGE = (
    "output_dir",
    "judge_concurrency",
    "judge_deadline",
    "judge_max_tokens",
    "quiet",
    "tracker",
    "show_every",
    "save_every",
    "keep_last",
    "max_skipped",
    "max_truncated",
    "eval_batch",
    "select_batch",
    "prompts_per_pass",
    "gradient_checkpointing",
)  # between a run and its resumption


class ConfigError(ValueError):
    """A setting that cannot work, in one line."""


class Run:
    """One run. `cfg`: a flat object of plain values, among them output_dir, seed, dtype, quiet and tracker."""

    def __init__(self, cfg):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        check_launch(dict(os.environ), torch.cuda.device_count(), os.cpu_count() or 1)
        on_cpu = not torch.cuda.is_available()  # also where Apple's GPU is, which knows no float64: sampling needs it
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        plugin = _fsdp2(cfg.dtype) if sharded else None
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",  # --dtype decides: under autocast the policy would differ from its reference
            log_with=cfg.tracker or None,
            project_dir=cfg.output_dir,
            step_scheduler_with_optimizer=False,
            fsdp_plugin=plugin if not on_cpu else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        if plugin and on_cpu and self.accelerator.num_processes > 1:  # accelerate shards on GPUs only; torch does here
            PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
        if self.accelerator.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 in float32 products; softmax and sums stay in float32
        self.cfg, self.processes, self.rank = cfg, self.accelerator.num_processes, self.accelerator.process_index
        self.is_main, self.folder = self.accelerator.is_main_process, Path(cfg.output_dir)
        self.device = self.accelerator.device
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        for name in ("prompts_per_step", "sft_batch"):
            if getattr(cfg, name, 0) % self.processes:
                raise ConfigError(f"{name}: {getattr(cfg, name)} does not split over {self.processes} processes")
        self._claim_folder()
        if cfg.tracker:
            self.accelerator.init_trackers("ground-what-you-see", config=dict(vars(cfg)))
        self._orders: dict[tuple, list[int]] = {}
        self.most = sys.maxsize  # prompts at a time for which memory has sufficed, in every process
        self.tracked = 0  # updates of the stages before this one
        self.began = time.time()
        how = " (FSDP2)" if self.sharded else ""
        what, where = getattr(cfg, "method", "evaluation"), self.accelerator.device
        folder = f"; folder {self.folder}" if self.folder else ""
        self.say(f"{what} on {self.processes} process(es){how}, {where}{folder}")
        if on_cpu and self.processes > 1 and torch.get_num_threads() * self.processes > (os.cpu_count() or 1):
            self.say(f"warning: {self.processes} processes share {os.cpu_count()} CPU cores")

    def _claim_folder(self) -> None:
        """Start or go on in the run folder; refuse one that was made with another configuration."""
        file, now = self.folder / "config.yaml", dict(vars(self.cfg))
        claims = (".", "config.yaml", "data.json")  # a run that was stopped before its first result binds no one
        here = self.folder.iterdir() if self.folder.exists() else ()
        self.begun = begun = any(not path.name.startswith(claims) for path in here)
        if file.exists() and begun:
            then = yaml.safe_load(file.read_text())
            free = set(FREE_TO_CHANGE)
            if all(str(cfg.get("judge")).startswith("http") for cfg in (then, now)):
                free.add("judge")  # the same --judge_model at another address
            differ = [k for k in now if k not in free and then.get(k) != now[k]]
            if differ:
                changes = "; ".join(f"{k}: {then.get(k)!r} there, {now[k]!r} now" for k in differ)
                raise ConfigError(
                    f"output_dir: {self.folder} belongs to a run with another configuration ({changes}). "
                    "Give another --output_dir, or the same options to go on, or delete the folder to start again"
                )
        elif begun:
            raise ConfigError(f"output_dir: {self.folder} is not empty and not a run folder. Give another --output_dir")
        self.accelerator.wait_for_everyone()
        if self.is_main:  # what a process that was killed was writing, or deleting
            for ending in ("unfinished", "gone"):
                for left in self.folder.rglob(f".*.{ending}"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.write(file, now)
        patience = time.time() + 60  # a shared disk may be slow to show what is new
        while not file.exists() and time.time() < patience:
            time.sleep(1)
        if not file.exists():
            raise ConfigError(
                f"output_dir: {socket.gethostname()} does not see {self.folder}, which the first machine has written. "
                "Give a folder on a disk that all machines share"
            )

    def claim_data(self, rows: str) -> None:
        """Refuse to go on with other rows than the run began with: its results would be of neither."""
        file = self.folder / "data.json"
        then = self.first(lambda: json.loads(file.read_text())["rows"] if self.begun and file.exists() else rows)
        if then != rows:
            raise ConfigError(
                f"data: the rows or their media have changed since the run in {self.folder} began ({then} there, "
                f"{rows} now; files are known by path, size and time of change). Give another --output_dir, or the "
                "data as they were"
            )
        self.write(file, {"rows": rows})

    # models
    def widen(self, trained: list[nn.Parameter]) -> None:
        """Shards of half-precision weights are kept in float32; what is gathered from them is in --dtype."""
        for p in trained if self.sharded else ():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    def prepare(self, policy: nn.Module, *others) -> tuple:
        """The policy as this launch wraps it, its optimiser and its schedule."""
        if self.sharded:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(policy._no_split_modules)
        prepared = self.accelerator.prepare(policy, *others)
        if self.sharded:
            # parts of a tensor are returned, and not changed in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            for name in ("encode", "generate"):  # they use weights of the outermost shard, as `forward` does
                register_fsdp_forward_method(policy, name)
        return prepared

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """In here every process holds all weights and using them communicates nothing: so one may sample longer than
        another, or try again with less memory."""
        units = [module for module in policy.modules() if isinstance(module, FSDPModule)] if policy else []
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(unit is not policy, recurse=False)

    def passes(self, model: nn.Module, parts: list) -> Iterator[tuple[int, Any]]:
        """The parts of an update with their numbers. Gradients of processes meet in the last one only, but in every one
        where they are sharded, or each process would hold the whole gradient between them. The context spans forward
        and backward, because DDP looks at it in forward."""
        for i, part in enumerate(parts):
            meet = self.sharded or part is parts[-1]
            with nullcontext() if meet else self.accelerator.no_sync(model):
                yield i, part

    def clip(self, model: nn.Module, most: float) -> float:
        """Clip the gradients in place. Returns their norm before."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def parts(self, batch: list, size: int, work: Callable, *args) -> list:
        """work(rows, *args) on `size` rows of the batch at a time (0: all), prompts of a length together. Where memory
        does not suffice on half as many, with the same results up to rounding; all processes then take as few, so
        that an update has as many passes in each."""
        while True:
            agreed = self.most = min(self.gather([self.most]))
            found = self.pieces(batch, size, work, *args)
            if self.processes == 1 or min(self.gather([self.most])) == agreed:
                return found

    def pieces(self, batch: list, size: int, work: Callable, *args) -> list:
        """`parts` without agreement, where nothing is communicated."""
        size = min(size or len(batch), self.most)
        if 0 < size < len(batch):
            even = sorted(batch, key=data.length)
            return [part for i in range(0, len(even), size) for part in self.pieces(even[i : i + size], 0, work, *args)]
        try:
            return [work(batch, *args)] if batch else []
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        # not inside `except`: the error holds on to what the failed attempt allocated
        clear_device_cache(garbage_collection=True)
        self.most = (len(batch) + 1) // 2  # from now on
        tqdm.write(
            f"process {self.rank}: memory does not suffice for {len(batch)} prompts at a time: trying {self.most}"
        )
        return self.pieces(batch, 0, work, *args)

    def each(self, file: Path, items: list, size: int, work: Callable[[list], list[dict]], name: str) -> list[dict]:
        """A line of `file` for every item, by its `id`: work(some items) makes theirs, `size` items at a time in each
        process. Lines are appended as they come: what is interrupted goes on where it was, in any number of processes.
        """
        lines = read_jsonl(file, mend=self.is_main)
        done = {line["id"] for line in lines}
        self.accelerator.wait_for_everyone()  # all have read before one writes
        even, size = sorted(items, key=data.length), size * self.processes  # alike in length: little padding
        bar = self.bar(len(items), name, "row", len(lines))
        for chunk in (even[i : i + size] for i in range(0, len(even), size)):
            if done.issuperset(item.id for item in chunk):
                continue
            found = self.gather(work(self.mine(chunk)))  # a whole chunk again, so that its padding is the same
            place = {item.id: i for i, item in enumerate(chunk)}
            new = sorted((line for line in found if line["id"] not in done), key=lambda line: place[line["id"]])
            self.append(file, new)
            lines += new
            bar.update(len(new))
        bar.close()
        return lines

    # randomness
    def reseed(self, *where) -> None:
        """Every random number follows from (seed, stage, step), in every process the same, and a response's from its
        prompt as well: there is no state to store, resuming is exact, and the number of processes does not matter."""
        set_seed(random.Random(f"{self.cfg.seed}/{where}").randrange(2**31))

    def order(self, stage: str, epoch: int, n: int) -> list[int]:
        """The rows' order in an epoch, the same on every process."""
        key = (stage, epoch, n)
        if key not in self._orders:
            self._orders[key] = random.Random(f"{self.cfg.seed}/{key}").sample(range(n), n)
        return self._orders[key]

    # processes
    def mine(self, items: list) -> list:
        return items[self.rank :: self.processes]

    def gather(self, items: list) -> list:
        return gather_object(items) if self.processes > 1 else items

    def first(self, value: Callable[[], Any]) -> Any:
        """What the main process finds: on a shared disk another may still see what was there before."""
        return self.gather([value() if self.is_main else None])[0]

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """One process of each machine is in here before its others, which find what it has kept (`media.Checked`)."""
        first = self.accelerator.is_local_main_process
        try:
            if not first:
                self.accelerator.wait_for_everyone()
            yield
        finally:
            if first:  # also where it fails: the others then meet the same error, instead of waiting for it
                self.accelerator.wait_for_everyone()

    def total(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.double(), "sum")

    def exchange(self, rows: Tensor) -> list[Tensor]:
        """The rows [N_r, d] of every process, without gradient, by process; N_r may differ."""
        rows = rows.detach()
        if self.processes == 1:
            return [rows]
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        longest = max(1, *counts)
        table = self.accelerator.gather(nn.functional.pad(rows, (0, 0, 0, longest - len(rows))))
        return [part[:count] for part, count in zip(table.split(longest), counts, strict=True)]

    def average(self, numbers: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Sums and counts by name -> sum / count over all processes. Nothing counted, no value; `loss` is a sum."""
        names = sorted(numbers)
        table = self.total(torch.tensor([numbers[name] for name in names], device=self.accelerator.device))
        sums = dict(zip(names, table.tolist(), strict=True))
        return {name: value / (count or 1) for name, (value, count) in sums.items() if count or name == "loss"}

    # files: written beside and renamed, so that what is there is whole
    def write(self, file: Path, value: Any) -> None:
        if self.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(value, sort_keys=False) if file.suffix == ".yaml" else json.dumps(value, indent=1)
            rewrite(file, text)
        self.accelerator.wait_for_everyone()

    def write_folder(self, folder: Path, save: Callable[[Path], None]) -> None:
        """A folder that `save` fills, on the main process; what a failed attempt has written goes."""
        if self.is_main:
            beside = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                beside.mkdir(parents=True)
                save(beside)
                for file in filter(Path.is_file, beside.rglob("*")):  # on the disk, not in its cache, before older goes
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed before it counted
            os.replace(beside, folder)
        self.accelerator.wait_for_everyone()

    def remove(self, folder: Path) -> None:
        if self.is_main and folder.exists():
            gone = folder.with_name(f".{folder.name}.gone")  # half a folder must not look like a whole one
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def append(self, file: Path, lines: list[dict]) -> None:
        if self.is_main and lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write(to_jsonl(lines))

    def keep_lines(self, file: Path, wanted: Callable[[dict], bool]) -> None:
        """Drop the other lines: what they stand for is done again."""
        if self.is_main and file.exists():
            rewrite(file, to_jsonl([line for line in read_jsonl(file) if wanted(line)]))
        self.accelerator.wait_for_everyone()

    # screen
    def say(self, text: str) -> None:
        if self.is_main and not self.cfg.quiet:
            tqdm.write(text)

    def bar(self, total: int, name: str, unit: str, done: int = 0) -> tqdm:
        hidden = True if self.cfg.quiet or not self.is_main else None  # None: shown on a terminal only
        return tqdm(total=total, initial=done, desc=name, unit=unit, disable=hidden, dynamic_ncols=True)

    def track(self, stage: str, metrics: dict[str, float], step: int) -> None:
        if self.cfg.tracker:
            self.accelerator.log(
                {f"{stage}/{name}": value for name, value in metrics.items()},
                step=self.tracked + step,
            )

    # checkpoints: safetensors and JSON, the same whatever the number of processes
    def save_checkpoint(self, folder: Path, state: dict, tensors: dict[str, Tensor]) -> None:
        whole = self.gathered(tensors)

        def save(beside: Path) -> None:
            save_file(whole, beside / "state.safetensors")
            rewrite(beside / "state.json", json.dumps(state | {"processes": self.processes}, indent=1))

        self.write_folder(folder, save)

    def load_checkpoint(
        self, folder: Path, like: dict[str, Tensor], needed: Iterable[str] = ()
    ) -> tuple[dict, dict[str, Tensor]]:
        """What `save_checkpoint` was given, tensors in the dtype of the file and laid out as their weight in `like` is:
        "moment/NAME" as like["NAME"]."""
        again = f"Delete {folder} to go on from the one before it, or from the start of the stage"
        try:
            state = json.loads((folder / "state.json").read_text())
            if lacking := {"step", "processes", *needed} - set(state):
                raise ValueError(f"state.json lacks {', '.join(sorted(lacking))}")
            with safe_open(folder / "state.safetensors", "pt") as file:
                there = {key.partition("/")[2] for key in file.keys()}  # noqa: SIM118, it is no dict
                if there != set(like):
                    odd = sorted(there ^ set(like))
                    raise ConfigError(
                        f"checkpoint: {folder} is of another model ({len(odd)} weights, as {odd[0]}). {again}"
                    )
                tensors = {}
                for key in file.keys():  # noqa: SIM118
                    weight, value = like[key.partition("/")[2]], file.get_tensor(key)
                    if value.ndim and value.shape != weight.shape:
                        raise ConfigError(
                            f"checkpoint: {folder} is of another model ({key} is {list(value.shape)}). {again}"
                        )
                    value = value.to(weight.device)
                    if isinstance(weight, DTensor) and value.ndim:
                        value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
                    tensors[key] = value
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"checkpoint: {folder} is not whole ({error}). {again}") from error
        if state["processes"] != self.processes:
            self.say(
                f"note: {folder.name} is of {state['processes']} process(es), now {self.processes}: rows and responses "
                "stay the same, sums over processes differ by rounding"
            )
        return state, tensors

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors whole, on the CPU of the main process; nothing elsewhere."""
        found = {}
        for name, value in tensors.items():
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_main:
                found[name] = value.cpu().contiguous()
        return found


def stop(message: str, everyone: bool = False) -> NoReturn:
    """Exit with a message: once, where all processes meet the same error (everyone: as they certainly do)."""
    rank = int(os.environ.get("RANK", 0))
    if rank and everyone:
        sys.exit(1)
    if rank:
        time.sleep(10)  # then the first one has said it, and the launcher has ended this process
        message = f"process {rank}: {message}"
    sys.exit(message)


def check_launch(env: dict[str, str], gpus: int, cores: int) -> None:
    """What `accelerate launch` was told against what this machine has, before the processes try to meet."""
    here = int(env.get("LOCAL_WORLD_SIZE", 1))
    if gpus and here > gpus or not gpus and here > max(4, cores):
        has = f"{gpus} GPUs" if gpus else f"no GPU and {cores} CPU cores"
        raise ConfigError(f"launch file: {here} processes on a machine with {has}. Give num_processes: {gpus or cores}")
    if env.get("ACCELERATE_USE_FSDP") == "true":
        if env.get("FSDP_VERSION") != "2":
            raise ConfigError("launch file: give fsdp_version: 2, see configs/accelerate/fsdp2.yaml")
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if env.get(f"ACCELERATE_USE_{name}") == "true":
            raise ConfigError(f"launch file: {name} is not supported. Shard with FSDP2: configs/accelerate/fsdp2.yaml")


def _fsdp2(dtype: str) -> FullyShardedDataParallelPlugin:
    """Shards of decoder layers (`VLM._no_split_modules`), and one of all the rest: the vision tower among it, so that
    pictures and clips cost the same collectives. Half precision: float32 shards and sums, as AdamW's copies do."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_offload=False,
        activation_checkpointing=False,  # --gradient_checkpointing does it
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=half if dtype == "bfloat16" else None,
    )


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """Without what is not: JSON has no NaN."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class Journal(dict):
    """(question, caption) -> the judge's reply, also on disk: one line a reply, in a file of this process; lines of all
    processes are read at the start."""

    def __init__(self, file: Path, judge: str):
        lines = [line for one in sorted(file.parent.glob("*.jsonl")) for line in read_jsonl(one, mend=one == file)]
        super().__init__({(x["question"], x["caption"]): x["reply"] for x in lines if x["judge"] == judge})
        self.file, self.judge = file, judge

    def __setitem__(self, key: tuple[str, str], reply: str) -> None:
        super().__setitem__(key, reply)
        line = {"judge": self.judge, "question": key[0], "caption": key[1], "reply": reply}
        self.file.parent.mkdir(parents=True, exist_ok=True)  # not before: a start that fails leaves nothing behind
        with self.file.open("a", encoding="utf-8") as out:
            out.write(to_jsonl([line]))


def rewrite(file: Path, text: str) -> None:
    """Replace a file's content, whole or not at all."""
    beside = file.with_name(f".{file.name}.unfinished")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def to_jsonl(lines: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_jsonl(file: Path, mend: bool = True) -> list[dict]:
    """The whole lines of a file that grows; a last line that a crash cut off is dropped; mend: from the file too."""
    if not file.exists():
        return []
    # bytes, because the cut may go through a character; not splitlines, because a response may hold U+2028
    *whole, rest = file.read_bytes().split(b"\n")
    if rest and mend:
        rewrite(file, "".join(line.decode() + "\n" for line in whole))
    return [json.loads(line) for line in whole]
