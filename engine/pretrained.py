"""A checkpoint (folder, hub id, or adapter of one): checked before anything heavy is loaded, then
loaded."""

import json
import re
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from engine import ConfigError, counted, is_out_of_memory, reason
from engine.vlm import REFERENCE, VLM

# the language model's linears, never the vision's
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
# --attention of the language model, not of the tower
OURS = {"sdpa": "shared_prefix", "flex_attention": "flex_attention"}


def load(
    path: str,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    lora_rank: int | None = None,
    trainable: bool = True,
    **options,
) -> VLM:
    """A Qwen2.5-VL checkpoint (folder or hub id), or an adapter of one (folder). options: those of
    `as_policy`.

    Merged into half-precision weights, a small change is rounded away. So an adapter as `as_policy`
    makes it stays one, if its rank is `lora_rank`. Others are merged in first, and with lora_rank 0
    all are. None: any rank, and full fine-tuning where it is trainable.

    Raises ValueError or OSError for what `context` refuses, and where a weight has no place or a
    place no weight.
    """
    base, adapter, _, processor = opened(path)
    # what a new adapter will remember
    base = str(Path(base).resolve()) if Path(base).exists() else base
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        base,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa" if attention in OURS else attention,
        ignore_mismatched_sizes=True,  # `refuse_part` does not, and names them
        output_loading_info=True,
    )
    refuse_part(loaded)
    if adapter:
        model = with_adapter(model, adapter)
        model.peft_config["default"].base_model_name_or_path = base
        full = lora_rank == 0 or trainable and lora_rank is None
        if full or not stays(model, lora_rank):
            if dtype != "float32":
                warnings.warn(
                    f"{path} is merged into {dtype} weights, which rounds small changes away. "
                    "Give its rank as --lora_rank, or --dtype float32",
                    stacklevel=2,
                )
            model = model.merge_and_unload()
    options |= {"lora_rank": lora_rank or 0, "trainable": trainable}
    return as_policy(model, processor, attention=attention, **options)


def stays(model: PeftModel, rank: int | None) -> bool:
    """Is the adapter LoRA on the language model's linears alone, of this rank if any? The head
    and the embedding are used by their weights, which an adapter of theirs would not reach."""
    for name, weight in get_peft_model_state_dict(model).items():
        found = re.fullmatch(LORA_TARGETS + r"\.lora_(A|B)\.weight", name)
        if not found or rank not in (None, weight.shape["AB".index(found[2])]):
            return False
    return True


def as_policy(
    model: nn.Module | PeftModel,
    processor: ProcessorMixin,
    *,
    attention: str = "sdpa",
    lora_rank: int = 0,
    train_vision: bool = False,
    gradient_checkpointing: bool = False,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 401_408,
    static_decoding: bool = False,
    trainable: bool = True,
) -> VLM:
    """The policy that a model is.

    Full fine-tuning of the language model, or LoRA on its linears. The vision tower is frozen
    unless `train_vision`. `trainable=False` freezes everything: reference, evaluation. A model that
    has an adapter goes on with it, and keeps it as it is now as the reference (`VLM.base`).
    """
    adapted = isinstance(model, PeftModel)
    core = model.get_base_model() if adapted else model
    core.config.text_config._attn_implementation = OURS.get(attention, attention)
    _without_dropout(core)
    core.requires_grad_(trainable)
    if not train_vision:
        core.model.visual.requires_grad_(False)
    if gradient_checkpointing and trainable:
        # its name from transformers 5.x on
        new = getattr(core, "activation_checkpointing_enable", None)
        (new or core.gradient_checkpointing_enable)({"use_reentrant": False})
        core.enable_input_require_grads()
    if lora_rank and trainable:
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS)
        with quiet_peft():
            if adapted:
                core.requires_grad_(False)
                # some ways of beginning an adapter change the weights below it
                plain = {"init_lora_weights": True, "lora_dropout": 0.0}
                model.add_adapter(REFERENCE, replace(model.peft_config["default"], **plain))
                weights = dict(model.named_parameters())
                for name, p in weights.items():
                    if f".{REFERENCE}." in name:
                        p.data = weights[name.replace(REFERENCE, "default")].detach().clone()
                model.base_model.set_adapter("default")  # which makes it trainable
            else:
                model = get_peft_model(model, config)
    policy = VLM(model, processor, min_pixels, max_pixels)
    policy.static_decoding = static_decoding
    return policy.train(trainable)


def open_policy(model: str | VLM, cfg, device: str | torch.device, trainable: bool = False) -> VLM:
    """`load` with the options of the same names in `cfg`, on `device`. Raises ConfigError where it
    cannot be loaded. One that is open (a dry run's) is returned as it is."""
    if isinstance(model, VLM):
        return model
    names = ("dtype", "attention", "static_decoding", "min_pixels", "max_pixels")
    names += ("lora_rank", "train_vision", "gradient_checkpointing")
    options = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
    try:
        return load(model, **options, trainable=trainable).to(device)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise  # out of memory says nothing about the checkpoint
        raise ConfigError(f"model: cannot load {model}: {reason(error)}") from error


def _without_dropout(model: nn.Module) -> None:
    """No dropout anywhere, although training mode stays on for gradient checkpointing: policy,
    reference and sampler are one distribution. With it the ratios of Eq. 1 are off before anything
    has been learned."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # probabilities that are handed to functions
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def context(path: str) -> tuple[int, PreTrainedTokenizerBase]:
    """The most tokens that a checkpoint takes, and its tokenizer; nothing heavy is loaded.

    Raises ValueError for a model of another family, quantised, in part there or without a chat
    template that can be used, OSError where there is none."""
    _, _, config, processor = opened(path)
    _check_template(processor)
    return config.text_config.max_position_embeddings, processor.tokenizer


def opened(
    path: str, only_here: bool = False
) -> tuple[str, str | None, PreTrainedConfig, ProcessorMixin]:
    """(model, adapter to put on it, the model's configuration, processor): what a folder or hub id
    holds. only_here: nothing is fetched, and the weights may be missing."""
    base, adapter = _base_of(path)
    it = f"its base {base}" if adapter else "it"
    here = Path(base)
    if not here.exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {base}")
    if here.is_dir() and not (here / "config.json").exists():
        policies = [each for stage in ("rl", "sft") if (each := here / stage / "policy").is_dir()]
        run = f", it is a run folder. Give {policies[0]}" if policies else ""
        raise ValueError(f"{it} holds no model (config.json){run}")
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=only_here)
    except OSError as error:
        if here.exists() or here.parent == Path() or not here.parent.is_dir():
            raise
        why = f"there is no folder {base}, and the hub gave no model of that name"
        raise FileNotFoundError(why) from error
    if config.model_type != "qwen2_5_vl":
        raise ValueError(
            f"{it} is a {config.model_type} model, and only Qwen2.5-VL (qwen2_5_vl) is supported"
        )
    for part in (config, config.text_config):
        if how := getattr(part, "quantization_config", None):
            # whose older checkpoints do not say it
            method = how.get("quant_method", "bitsandbytes")
            raise ValueError(f"{it} is quantised ({method}); give the unquantised checkpoint")
    if not only_here:
        _check_files(base, "model", "pytorch_model")
    processor = _processor_of(path, base, only_here)
    tokenizer = processor.tokenizer
    for kind in ("image", "video"):
        token, number = getattr(processor, f"{kind}_token"), getattr(config, f"{kind}_token_id")
        if tokenizer.convert_tokens_to_ids(token) != number or not tokenizer("red").input_ids:
            raise ValueError(
                f"its tokenizer lacks words, or the {kind} token of its config.json ({token}, "
                f"{number}); give a folder that holds the tokenizer's files (tokenizer.json, "
                "tokenizer_config.json)"
            )
    # some checkpoints give it to one of the two alone
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    return base, adapter, config, processor


def _base_of(path: str) -> tuple[str, str | None]:
    """(model, adapter to put on it): what a folder or hub id holds."""
    file = Path(path) / "adapter_config.json"
    if not file.exists():
        return path, None
    try:
        config = PeftConfig.from_pretrained(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{file} names no base_model_name_or_path; write the model there that it is an "
            "adapter of"
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"{path} is a {config.peft_type.value} adapter, which cannot be merged into weights; "
            "give a LoRA"
        )
    if (Path(base).is_absolute() or base.count("/") > 1) and not Path(base).exists():
        raise FileNotFoundError(
            f"{path} is an adapter of {base}, which is not there. Put it back, or train with "
            "--merge"
        )
    _check_files(path, "adapter_model", "adapter_model")
    return base, path


def _check_files(folder: str, name: str, older: str) -> None:
    """Are a folder's files of weights there, and as long as they say? Their heads tell, so this is
    cheap."""
    here = Path(folder)
    if not here.is_dir():  # on the hub
        return
    files = [here / f"{name}.safetensors", *here.glob(f"{name}.safetensors.index.json")]
    files += [here / f"{older}.bin", *here.glob(f"{older}.bin.index.json")]
    # in the order in which they are looked for
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} holds no weights ({name}.safetensors)")
    try:
        whole = (
            json.loads(file.read_text())["weight_map"]
            if file.suffix == ".json"
            else {"": file.name}
        )
        for file in sorted({here / each for each in whole.values()}):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif not zipfile.is_zipfile(file):
                raise ValueError("its end is missing" if file.exists() else "No such file")
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise ValueError(f"{file} is incomplete ({error}); copy or download it again") from error


def _processor_of(path: str, base: str, only_here: bool) -> ProcessorMixin:
    """The checkpoint's own processor. An adapter saved without one gets its base's processor, with
    the adapter's own tokenizer if it has one."""
    if path == base or any(
        (Path(path) / f"{name}_config.json").exists() for name in ("processor", "preprocessor")
    ):
        return AutoProcessor.from_pretrained(path, local_files_only=only_here)
    processor = AutoProcessor.from_pretrained(base, local_files_only=only_here)
    if not (Path(path) / "tokenizer_config.json").exists():
        return processor
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = tokenizer.chat_template or processor.chat_template
    return type(processor)(
        processor.image_processor, tokenizer, processor.video_processor, chat_template=template
    )


def _check_template(processor: ProcessorMixin) -> None:
    """Does the chat template write what it is given, pictures too? Asked as `VLM.encode` and `data`
    ask it."""
    if not processor.chat_template:
        raise ValueError("it has no chat template; give an Instruct checkpoint")
    seen = [{"type": "image"}, {"type": "text", "text": "red"}]
    try:
        with_picture, plain = (
            of.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            for of, content in ((processor, seen), (processor.tokenizer, "red"))
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"its chat template cannot be used ({error}); give an Instruct checkpoint's"
        ) from error
    if processor.image_token not in with_picture or not all(
        "red" in text for text in (with_picture, plain)
    ):
        raise ValueError(
            "its chat template leaves out pictures or words; give an Instruct checkpoint's"
        )


def refuse_part(loaded: dict) -> None:
    """ValueError where a checkpoint's weights and a model's places are not one to one, sizes
    included. A head that is the embedding (tied) is not missed."""
    missing, unexpected = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    told = [f"lack {counted(len(missing), 'weight')} ({missing[0]})"] if missing else []
    told += (
        [f"hold {len(unexpected)} that the model has no place for ({unexpected[0]})"]
        if unexpected
        else []
    )
    if sizes := sorted(loaded["mismatched_keys"]):
        name, there, wanted = sizes[0]
        told += [
            f"hold {len(sizes)} of another size than its config.json says ({name}: {[*there]}, "
            f"not {[*wanted]})"
        ]
    if told:
        raise ValueError(
            f"its files {' and '.join(told)}; give a whole checkpoint, with any LoRA merged"
        )


def with_adapter(model: nn.Module, adapter: str) -> PeftModel:
    """The model with all weights of a LoRA adapter on it; ValueError where one finds no place, or a
    place no weight."""
    names = {  # as transformers before 4.52 called them
        r"^model\.(?=layers|norm|embed_tokens)": "model.language_model.",
        r"^visual\.": "model.visual.",
    }
    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            found = PeftModel.from_pretrained(model, adapter, key_mapping=names)
        except UserWarning as error:
            raise ValueError(
                f"{adapter} lacks weights that its adapter_config.json describes"
            ) from error
        except RuntimeError as error:
            if not (sizes := re.search("size mismatch for .*", str(error))):
                raise
            raise ValueError(f"{adapter} and its adapter_config.json differ: {sizes[0]}") from error
    there = len(load_peft_weights(adapter, device="cpu"))
    taken = len(get_peft_model_state_dict(found))
    if there != taken:
        raise ValueError(
            f"{adapter} holds {there} weights, of which its adapter_config.json has places for "
            f"{taken}"
        )
    return found


@contextmanager
def quiet_peft():
    """Without the warning about a name in transformers that peft has not followed yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        yield
