"""The engine: what the concepts run on. It deals with ranks, files and the quirks of transformers.

run             one run: its processes, its folder, its screen
learner         a policy under training: optimiser, schedule, metrics, reference model
checkpoint      the state of a stage, complete or absent
vlm             Qwen2.5-VL: encode, generate, score
pretrained      what a model folder or hub id holds, checked and loaded
shared_prefix   the prompt once for all its responses, exactly
static_decode   decoding in steps of one shape, which a GPU can record
judges          a text-only LLM: local, or behind a URL
media, video    pictures and clips, read as they are seen
memory          what a run needs of each GPU, computed
media_check     every file opened once, before any model is loaded
loader          the media of rows, read ahead by worker processes
rows            one row of a dataset, checked
options         a dataclass as a command line
files           tables, JSON lines, atomic writes
"""

import re


class ConfigError(ValueError):
    """A setting that cannot work, in one line: which option, what is wrong, what to do."""


class DataError(ValueError):
    """Bad data, in one line: which file, row and field, what is wrong, what to do."""


def counted(n: int, what: str) -> str:
    """ "1 row", "2 rows" """
    return f"{n} {what}{'' if n == 1 else 's'}"


def reason(error: BaseException) -> str:
    """The first line of an error that has words: nltk's errors begin with a line of stars, some
    have no text."""
    return next(
        (line.strip() for line in str(error).splitlines() if re.search(r"\w", line)),
        type(error).__name__,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Of torch's allocator, of CUDA itself or of cuBLAS."""
    # here: what needs the classes above alone need not wait seconds for torch
    from accelerate.utils.memory import should_reduce_batch_size

    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or any(word in str(error) for word in words)
    )
