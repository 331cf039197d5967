"""Checkpoints in safetensors and JSON: complete or absent, the same for any number of processes."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from engine import ConfigError, counted
from engine.files import rewrite
from engine.run import Run


def save(run: Run, folder: Path, state: dict, tensors: dict[str, Tensor]) -> None:
    """Write `state` and the unsharded `tensors` to a folder, complete or not at all."""
    full = full_tensors(run, tensors)

    def fill(temporary: Path) -> None:
        save_file(full, temporary / "state.safetensors")
        rewrite(
            temporary / "state.json", json.dumps(state | {"processes": run.processes}, indent=1)
        )

    run.write_folder(folder, fill)


def load(
    run: Run, folder: Path, like: dict[str, Tensor], needed: Iterable[str] = ()
) -> tuple[dict, dict[str, Tensor]]:
    """What `save` was given. Tensors have the dtype of the file and the sharding of
    their weight in `like`: "moment/NAME" that of like["NAME"]."""
    again = f"Delete {folder}; the same command then resumes from the checkpoint before it"
    try:
        state = json.loads((folder / "state.json").read_text())
        if lacking := {"step", "processes", *needed} - set(state):
            raise ValueError(f"state.json lacks {', '.join(sorted(lacking))}")
        with safe_open(folder / "state.safetensors", "pt") as file:
            there = {key.partition("/")[2] for key in file.keys()}  # noqa: SIM118, it is no dict
            if there != set(like):
                odd = sorted(there ^ set(like))
                raise ConfigError(
                    f"checkpoint: {folder} is of another model ({counted(len(odd), 'weight')}, as "
                    f"{odd[0]}). {again}"
                )
            tensors = {}
            for key in file.keys():  # noqa: SIM118
                weight, value = like[key.partition("/")[2]], file.get_tensor(key)
                if value.ndim and value.shape != weight.shape:
                    raise ConfigError(
                        f"checkpoint: {folder} is of another model ({key} is "
                        f"{list(value.shape)}). {again}"
                    )
                value = value.to(weight.device)
                if isinstance(weight, DTensor) and value.ndim:
                    value = distribute_tensor(
                        value, weight.device_mesh, weight.placements, src_data_rank=None
                    )
                tensors[key] = value
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"checkpoint: {folder} is incomplete ({error}). {again}") from error
    if state["processes"] != run.processes:
        run.say(
            f"note: {folder.name} was written on {state['processes']} process(es) and is resumed "
            f"on {run.processes}: rows and responses stay the same, sums over ranks differ by "
            "rounding"
        )
    return state, tensors


def full_tensors(run: Run, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors unsharded, on the CPU of the main process; nothing on other ranks."""
    found = {}
    for name, value in tensors.items():
        value = value.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if run.is_main:
            found[name] = value.cpu().contiguous()
    return found
