"""One run: its processes, its folder and its screen. What a launch file says is read here.

`accelerate launch` (configs/accelerate/) decides how the processes share the work. A step is the
same code everywhere:

    one process, DDP   each rank holds the policy; gradients are averaged once all have theirs
                       (`Run.average_gradients`; torch's wrapper would average in backward, where a
                       rank that runs out of memory leaves the others waiting)
    FSDP2              each rank holds 1/P of the policy, its gradient and its optimiser; weights
                       are gathered layer by layer for the update, and all at once while responses
                       are sampled (`Run.unsharded`)

Batch sizes and loss denominators are global, so 1, 2 or 4 processes make the same update: a loss is
a sum over a rank's rows, divided by a count of the global batch, times P, because gradients are
averaged. Every rank takes part in the same collectives in the same order, whatever its rows are.
What may differ between ranks (response lengths, clips or pictures, an out-of-memory error) happens
where nothing is communicated, or is agreed on (`Run.micro_batches`, `Run.attempt`).
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
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    gather_object,
    set_seed,
)
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from engine import ConfigError, is_out_of_memory, reason
from engine.files import lock, read_jsonl, rewrite, to_jsonl
from engine.judges import is_url

# other ranks wait for one that asks a judge: held_out_reward for up to four deadlines
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class OutOfMemoryElsewhere(RuntimeError):
    """Another process has run out of memory."""


class Run:
    """One run. `cfg`: a flat object of plain values, among them output_dir, seed, dtype, quiet and
    tracker, and `resumable`, the names of those that may differ when the run is resumed."""

    def __init__(self, cfg):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        check_launch(dict(os.environ), torch.cuda.device_count(), os.cpu_count() or 1)
        # also where Apple's GPU is, which knows no float64: sampling needs it
        on_cpu = not torch.cuda.is_available()
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        plugin = _fsdp2(cfg.dtype) if sharded else None
        self.accelerator = Accelerator(
            cpu=on_cpu,
            # --dtype decides: under autocast the policy would differ from its reference
            mixed_precision="no",
            log_with=cfg.tracker or None,
            project_dir=cfg.output_dir,
            step_scheduler_with_optimizer=False,
            fsdp_plugin=plugin if not on_cpu else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
        # accelerate shards on GPUs only; torch does here
        if plugin and on_cpu and torch.distributed.is_initialized():
            PartialState().distributed_type = self.accelerator.state.distributed_type = (
                DistributedType.FSDP
            )
            self.accelerator.state.fsdp_plugin = plugin
        if self.accelerator.device.type == "cuda":
            # TF32 in float32 products; softmax and sums stay in float32
            torch.set_float32_matmul_precision("high")
        self.cfg = cfg
        self.processes = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.is_main, self.folder = self.accelerator.is_main_process, Path(cfg.output_dir)
        self.device = self.accelerator.device
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        check_batches(cfg, self.processes)
        self._claim_folder()
        if cfg.tracker:
            self.accelerator.init_trackers("ground-what-you-see", config=dict(vars(cfg)))
        self._permutations: dict[tuple, list[int]] = {}
        self.micro_batch_limit = sys.maxsize  # prompts at a time that fit in memory, on every rank
        self.tracked = 0  # updates of the stages before this one
        self.began = time.time()
        how = " (FSDP2)" if self.sharded else ""
        what, where = getattr(cfg, "method", "evaluation"), self.accelerator.device
        folder = f"; folder {self.folder}" if self.folder else ""
        self.say(f"{what} on {self.processes} process(es){how}, {where}{folder}")
        if (
            on_cpu
            and self.processes > 1
            and torch.get_num_threads() * self.processes > (os.cpu_count() or 1)
        ):
            cores = os.cpu_count() or 1
            self.say(
                f"warning: {self.processes} processes of {torch.get_num_threads()} threads share "
                f"{cores} CPU cores, which is slow. Set OMP_NUM_THREADS="
                f"{max(1, cores // self.processes)}"
            )

    def _claim_folder(self) -> None:
        """Start or resume the run in its folder; refuse a folder of another configuration."""
        file, now = self.folder / "config.yaml", dict(vars(self.cfg))
        self.begun = has_begun(self.folder, self.cfg)
        if refused := self.from_main(self._lock):
            raise ConfigError(f"output_dir: {refused}")
        if self.is_main:  # what a process that was killed was writing, or deleting
            for ending in ("unfinished", "gone"):
                for left in self.folder.rglob(f".*.{ending}"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.write(file, now)
        deadline = time.time() + 60  # a shared disk may be slow to show what is new
        while not file.exists() and time.time() < deadline:
            time.sleep(1)
        if not file.exists():
            raise ConfigError(
                f"output_dir: {socket.gethostname()} does not see {self.folder}, which the first "
                "machine has written. Give a folder on a disk that all machines share"
            )

    def _lock(self) -> str:
        """Two processes in one folder would mix their lines. Returns why it cannot be had."""
        try:
            self.lock = lock(self.folder)
        except ConfigError as error:
            return str(error)
        return ""

    def claim_data(self, rows: str) -> None:
        """Refuse to resume with other rows than the run began with."""
        file = self.folder / "data.json"
        then = self.from_main(
            lambda: json.loads(file.read_text())["rows"] if self.begun and file.exists() else rows
        )
        if then != rows:
            raise ConfigError(
                "data: the rows, their media or the file of --reward have changed since the run "
                f"in {self.folder} began ({then} there, {rows} now; files are known by path, size "
                "and time of change). "
                "Give another --output_dir, or the data as they were"
            )
        self.write(file, {"rows": rows})

    # models
    def upcast_shards(self, trained: list[nn.Parameter]) -> None:
        """Keep the shards of half-precision weights in float32; weights gathered from them are in
        --dtype."""
        for p in trained if self.sharded else ():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    def prepare(self, policy: nn.Module, *others) -> tuple:
        """The policy as this launch shards it, its optimiser and its schedule."""
        if not self.sharded:
            return policy, *self.accelerator.prepare(*others)
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(
            policy._no_split_modules
        )
        prepared = self.accelerator.prepare(policy, *others)
        # the model never changes these views in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # these use weights of the outermost unit, as `forward` does
        for name in ("encode", "generate", "prefix"):
            register_fsdp_forward_method(policy, name)
        return prepared

    @contextmanager
    def unsharded(self, policy: nn.Module) -> Iterator[None]:
        """Every rank holds all weights in here, and a forward pass communicates nothing: one rank
        may sample longer than another, or try again with less memory."""
        units = (
            [module for module in policy.modules() if isinstance(module, FSDPModule)]
            if policy
            else []
        )
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(unit is not policy, recurse=False)

    def attempt(self, work: Callable, *args) -> str:
        """Call work(*args), part of an update, on every rank. Returns why it is to be done again:
        the first line of an out-of-memory error, on all ranks if one of them met it, else "".

        The others are told in their next `exchange`: one in `work` (`all_gather`), or the last.
        """
        try:
            work(*args)
            self.exchange(0)
            return ""
        except OutOfMemoryElsewhere as error:
            return str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = reason(error)
        if self.sharded:
            raise RuntimeError(
                f"{why} Under FSDP2 every pass gathers weights, so one process cannot try again "
                "with less"
            )
        # not inside `except`: the error holds on to what the failed attempt allocated
        clear_device_cache(garbage_collection=True)
        with suppress(OutOfMemoryElsewhere):
            self.exchange(-1)
        return why

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Average gradients over ranks, each with all of its own. FSDP2 has done so in backward."""
        if self.sharded or self.processes == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], device=self.device)
        for p, ranks in zip(parameters, self.all_reduce(has).tolist(), strict=True):
            if ranks:  # a part of the model may have no gradient on this rank
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.processes

    def clip_grad_norm(self, parameters: list[Tensor], max_norm: float) -> float:
        """Clip the gradients in place. Returns their norm before."""
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def micro_batches(self, batch: list, size: int, work: Callable, *args) -> list:
        """[work(rows, *args), ...] for micro-batches of `size` rows (0: all), prompts of a length
        together. Out of memory, half as many rows are tried, with the same results up to rounding.
        All ranks then take as few, so that an update has as many micro-batches on each."""
        while True:
            agreed = self.micro_batch_limit = min(self.gather_object([self.micro_batch_limit]))
            results = self.local_micro_batches(batch, size, work, *args)
            if self.processes == 1 or min(self.gather_object([self.micro_batch_limit])) == agreed:
                return results

    def local_micro_batches(self, batch: list, size: int, work: Callable, *args) -> list:
        """`micro_batches` without agreement between ranks, where nothing is communicated."""
        size = min(size or len(batch), self.micro_batch_limit)
        if 0 < size < len(batch):
            by_length = sorted(batch, key=lambda row: row.length)
            chunks = [by_length[i : i + size] for i in range(0, len(batch), size)]
            return [
                result
                for chunk in chunks
                for result in self.local_micro_batches(chunk, 0, work, *args)
            ]
        try:
            return [work(batch, *args)] if batch else []
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        # not inside `except`: the error holds on to what the failed attempt allocated
        clear_device_cache(garbage_collection=True)
        self.micro_batch_limit = (len(batch) + 1) // 2  # from now on
        tqdm.write(
            f"rank {self.rank}: out of memory with {len(batch)} prompts at a time; trying "
            f"{self.micro_batch_limit}"
        )
        return self.local_micro_batches(batch, 0, work, *args)

    def resumable_map(
        self,
        file: Path,
        items: list,
        size: int,
        work: Callable[[list], list[dict]],
        name: str,
        read: Callable[[list[list]], Iterable[list]] = iter,
    ) -> list[dict]:
        """One line of `file` for every item, by its `id`: work(items) makes theirs, `size` items at
        a time on each rank.

        Lines are appended as they come, so an interrupted map is resumed where it stopped, on any
        number of processes. read: gives this rank's items to `work`, chunk by chunk.
        """
        lines = read_jsonl(file, repair=self.is_main)
        done = {line["id"] for line in lines}
        self.accelerator.wait_for_everyone()  # all have read before one writes
        # rows of a length together need little padding
        by_length, size = sorted(items, key=lambda item: item.length), size * self.processes
        bar = self.progress_bar(len(items), name, "row", len(lines))
        chunks = [by_length[i : i + size] for i in range(0, len(items), size)]
        # a whole chunk again: its padding is then the same
        chunks = [c for c in chunks if not done.issuperset(item.id for item in c)]
        for chunk, shard in zip(chunks, read([self.shard(chunk) for chunk in chunks])):
            found = self.gather_object(work(shard))
            place = {item.id: i for i, item in enumerate(chunk)}
            new = sorted(
                (line for line in found if line["id"] not in done),
                key=lambda line: place[line["id"]],
            )
            self.append(file, new)
            lines += new
            bar.update(len(new))
        bar.close()
        return lines

    # randomness
    def reseed(self, *where) -> None:
        """Every random draw is a function of (seed, stage, step), and a response's of its prompt
        too, the same on every rank. So there is no RNG state to checkpoint, and the number of
        processes does not matter."""
        set_seed(random.Random(f"{self.cfg.seed}/{where}").randrange(2**31))

    def permutation(self, stage: str, epoch: int, n: int) -> list[int]:
        """The order of n rows in an epoch, the same on every rank."""
        key = (stage, epoch, n)
        if key not in self._permutations:
            self._permutations[key] = random.Random(f"{self.cfg.seed}/{key}").sample(range(n), n)
        return self._permutations[key]

    # collectives
    def shard(self, items: list) -> list:
        """This rank's share of the items."""
        return items[self.rank :: self.processes]

    def gather_object(self, items: list) -> list:
        """The items of all ranks, on all ranks."""
        return gather_object(items) if self.processes > 1 else items

    def from_main(self, value: Callable[[], Any]) -> Any:
        """What the main process finds: on a shared disk another may still see an older state."""
        return self.gather_object([value() if self.is_main else None])[0]

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One process of each machine runs this block before its others, which find what it has
        kept."""
        first = self.accelerator.is_local_main_process
        try:
            if not first:
                self.accelerator.wait_for_everyone()
            yield
        finally:
            # also after an error (accelerate's own waits for ever): the others then meet the same
            # one
            if first:
                self.accelerator.wait_for_everyone()

    def exchange(self, n: int) -> list[int]:
        """n of every rank. Raises OutOfMemoryElsewhere if one is below 0 (`attempt`)."""
        counts = self.accelerator.gather(torch.tensor([n], device=self.device)).tolist()
        if min(counts) < 0:
            raise OutOfMemoryElsewhere("another process ran out of memory.")
        return counts

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over ranks, in double precision."""
        return self.accelerator.reduce(value.double(), "sum")

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """The rows [N_r, d] of every rank r, in order of rank and without gradient; N_r may
        differ."""
        rows = rows.detach()
        if self.processes == 1:
            return [rows]
        counts = self.exchange(len(rows))
        rows = nn.functional.pad(rows, (0, 0, 0, max(1, *counts) - len(rows)))
        rows.new_empty(self.processes, *rows.shape)  # memory ends here, while no rank waits for it
        self.exchange(0)
        table = self.accelerator.gather(rows)
        return [some[:n] for some, n in zip(table.split(len(rows)), counts, strict=True)]

    def average(self, numbers: dict[str, tuple[float, float]]) -> dict[str, float]:
        """(sum, count) by name -> sum / count over all ranks. What nothing was counted for is left
        out; `loss` is a sum."""
        names = sorted(numbers)
        table = self.all_reduce(
            torch.tensor([numbers[name] for name in names], device=self.accelerator.device)
        )
        sums = dict(zip(names, table.tolist(), strict=True))
        return {
            name: value / (count or 1)
            for name, (value, count) in sums.items()
            if count or name == "loss"
        }

    # files: written beside and renamed, so a file that is there is complete
    def write(self, file: Path, value: Any) -> None:
        if self.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (
                yaml.safe_dump(value, sort_keys=False)
                if file.suffix == ".yaml"
                else json.dumps(value, indent=1)
            )
            rewrite(file, text)
        self.accelerator.wait_for_everyone()

    def write_folder(self, folder: Path, save: Callable[[Path], None]) -> None:
        """A folder that `save` fills, on the main process; a failed attempt leaves nothing
        behind."""
        if self.is_main:
            temporary = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
                save(temporary)
                # on the disk before an older one is deleted
                for file in filter(Path.is_file, temporary.rglob("*")):
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            # of an attempt that was killed before it counted
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        self.accelerator.wait_for_everyone()

    def remove(self, folder: Path) -> None:
        if self.is_main and folder.exists():
            # a folder that is half deleted must not look complete
            gone = folder.with_name(f".{folder.name}.gone")
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def append(self, file: Path, lines: list[dict]) -> None:
        if self.is_main and lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write(to_jsonl(lines))

    def keep_lines(self, file: Path, wanted: Callable[[dict], bool]) -> None:
        """Drop the other lines; their work is done again."""
        if self.is_main and file.exists():
            rewrite(file, to_jsonl([line for line in read_jsonl(file) if wanted(line)]))
        self.accelerator.wait_for_everyone()

    # screen
    def say(self, text: str) -> None:
        if self.is_main and not self.cfg.quiet:
            tqdm.write(text)

    def progress_bar(self, total: int, name: str, unit: str, done: int = 0) -> tqdm:
        # None: shown on a terminal only
        hidden = True if self.cfg.quiet or not self.is_main else None
        return tqdm(
            total=total, initial=done, desc=name, unit=unit, disable=hidden, dynamic_ncols=True
        )

    def track(self, stage: str, metrics: dict[str, float], step: int) -> None:
        if self.cfg.tracker:
            self.accelerator.log(
                {f"{stage}/{name}": value for name, value in metrics.items()},
                step=self.tracked + step,
            )


def stop(message: str, everyone: bool = False) -> NoReturn:
    """Exit with a message, printed once where all ranks meet the same error. everyone: they
    certainly do."""
    rank = int(os.environ.get("RANK", 0))
    if rank and everyone:
        sys.exit(1)
    if rank:
        time.sleep(10)  # then the first one has said it, and the launcher has ended this process
        message = f"rank {rank}: {message}"
    sys.exit(message)


def check_launch(env: dict[str, str], gpus: int, cores: int) -> None:
    """Compare the launch file with the machine, before the processes try to connect."""
    here = int(env.get("LOCAL_WORLD_SIZE", 1))
    if gpus and here > gpus or not gpus and here > max(4, cores):
        has = f"{gpus} GPUs" if gpus else f"no GPU and {cores} CPU cores"
        raise ConfigError(
            f"launch file: {here} processes on a machine with {has}. Give num_processes: "
            f"{gpus or cores}"
        )
    if env.get("ACCELERATE_USE_FSDP") == "true":
        if env.get("FSDP_VERSION") != "2":
            raise ConfigError(
                "launch file: give fsdp_version: 2, see configs/accelerate/fsdp2.yaml"
            )
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if env.get(f"ACCELERATE_USE_{name}") == "true":
            raise ConfigError(
                f"launch file: {name} is not supported. Shard with FSDP2: "
                "configs/accelerate/fsdp2.yaml"
            )


def has_begun(folder: Path, cfg) -> bool:
    """Does the folder hold results of this run? Raises ConfigError where they are of another
    configuration, or no run's."""
    file, now = folder / "config.yaml", dict(vars(cfg))
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"output_dir: cannot write in {there}. Give another --output_dir")
    # a run that was stopped before its first result may be replaced
    claims = (".", "config.yaml", "data.json")
    here = folder.iterdir() if folder.is_dir() else ()
    begun = any(not path.name.startswith(claims) for path in here)
    if file.exists() and begun:
        then = yaml.safe_load(file.read_text())
        free = set(cfg.resumable)
        if all(is_url(each.get("judge") or "") for each in (then, now)):
            free.add("judge")  # the same --judge_model at another address
        then = getattr(type(cfg), "in_words", dict)(then)
        # an option that was not there yet had its default
        then = {k: getattr(type(cfg), k, None) for k in now} | then
        differ = [k for k in now if k not in free and then[k] != now[k]]
        if differ:
            changes = "; ".join(f"{k}: {then[k]!r} there, {now[k]!r} now" for k in differ)
            raise ConfigError(
                f"output_dir: {folder} belongs to a run with another configuration ({changes}). "
                "Give another --output_dir, or the same options to resume it, or delete the "
                "folder to start again"
            )
    elif begun:
        raise ConfigError(
            f"output_dir: {folder} is not empty and not a run folder. Give another --output_dir"
        )
    return begun


def check_batches(cfg, processes: int) -> None:
    """Raises ConfigError for a global batch that the processes cannot share evenly."""
    of_ovip = ("pairs",) if getattr(cfg, "method", "") == "ovip" else ()
    for name in ("prompts_per_step", "sft_batch", *of_ovip):
        if getattr(cfg, name, 0) % processes:
            raise ConfigError(
                f"{name}: {getattr(cfg, name)} is not a multiple of the {processes} "
                "processes. Give a multiple, or another number of processes"
            )


def _fsdp2(dtype: str) -> FullyShardedDataParallelPlugin:
    """One unit per decoder layer (`VLM._no_split_modules`), and one of all the rest, with the
    vision tower in it, so that pictures and clips cost the same collectives. Half precision:
    float32 shards and reductions, as AdamW's copies."""
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
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
    """Without NaN and infinity, which JSON does not have."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
