"""Judges of the Caption Reward: a local causal LM, or any OpenAI-compatible endpoint.

Each is a callable from a list of prompts to a list of replies, None where it failed; `last_error`
says why.
"""

import asyncio
import copy
import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchFeature, GenerationConfig

from caption_reward import MAX_TOKENS, after_thought
from engine import ConfigError, counted, reason
from engine.files import read_jsonl, to_jsonl
from engine.vlm import VLM, end_token_ids

LONGEST_RESPONSE = 2**22  # bytes that are read of an endpoint's response [choice]
# finish reasons of a complete reply
COMPLETE = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "none", ""}


class LocalJudge:
    """A text-only causal LM that answers prompts greedily: the judge of the Caption Reward
    (`caption_reward.Judge`).

    What its tokenizer calls special is taken out of prompts and replies: no caption can write a
    turn. A reply that is empty, that max_new_tokens cuts off, or that ends inside its thought or
    right after it, is None. Raises ValueError, or what transformers raises, for a checkpoint that
    cannot be asked.
    """

    def __init__(
        self,
        path: str,
        device: str | torch.device = "cpu",
        batch: int = 64,
        max_new_tokens: int = MAX_TOKENS,
    ):
        self.path = path
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.last_error = ""
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if not self.tokenizer.chat_template:
            raise ValueError(
                "it has no chat template; give a model that is tuned to follow instructions"
            )
        turns = [[{"role": "user", "content": word}] for word in ("red", "blue")]
        if len(set(self.tokenizer.apply_chat_template(turns, tokenize=False))) < 2:
            raise ValueError("its chat template leaves out what is asked")
        named = {
            str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        named |= {*self.tokenizer.all_special_tokens} - {""}
        self.special = re.compile(
            "|".join(map(re.escape, sorted(named, key=len, reverse=True))) or "(?!)"
        )
        try:
            self.model, loaded = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", output_loading_info=True
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError("it is no text-only causal LM") from error
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"its files lack {counted(len(missing), 'weight')} ({missing[0]})")
        self.model.to(device).eval()
        ends = {*end_token_ids(self.model, self.tokenizer), self.tokenizer.pad_token_id}
        self.model.generation_config = GenerationConfig(  # in place of what the checkpoint ships
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.generation = self.model.generation_config

    def sampling(self, temperature: float, top_p: float, max_tokens: int) -> "LocalJudge":
        """The same model, sampled from with torch's generator."""
        other = copy.copy(self)
        other.generation, other.max_new_tokens = copy.deepcopy(self.generation), max_tokens
        other.generation.update(
            do_sample=True, temperature=temperature, top_p=top_p, max_new_tokens=max_tokens
        )
        return other

    def __str__(self) -> str:
        return self.path

    def _encode(self, prompts: list[str]) -> BatchFeature:
        turns = [[{"role": "user", "content": self.special.sub(" ", text)}] for text in prompts]
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[str | None]:
        replies = []
        for i in range(0, len(prompts), self.batch):
            inputs = self._encode(prompts[i : i + self.batch]).to(self.model.device)
            out = self.model.generate(**inputs, generation_config=self.generation)
            replies += map(self._read, out[:, inputs["input_ids"].shape[1] :].tolist())
        return replies

    def _read(self, ids: list[int]) -> str | None:
        """The reply up to its end; the marks of its thought may be special tokens as well, so these
        go last."""
        end = next((k for k, i in enumerate(ids) if i in self.generation.eos_token_id), None)
        text = None if end is None else after_thought(self.tokenizer.decode(ids[:end]))
        if text is None:
            inside = "ends inside its thought or right after it"
            what = f"was cut off at {self.max_new_tokens} tokens" if end is None else inside
            self.last_error = f"its reply {what}: raise --judge_max_tokens"
            return None
        if not (text := self.special.sub(" ", text).strip()):
            self.last_error = "its reply is empty"
        return text or None


class PolicyJudge:
    """A policy as the judge of its own captions: it is asked what any judge is asked, without a
    picture, and answers greedily with the weights of now. A reply that is cut off, or that ends
    inside its thought, is '', which is wrong: the same weights would say the same again."""

    def __init__(self, policy: VLM, max_new_tokens: int, batch: int = 64):
        self.policy, self.max_new_tokens, self.batch = policy, max_new_tokens, batch

    def __call__(self, prompts: list[str]) -> list[str | None]:
        chats = [[{"role": "user", "content": [{"type": "text", "text": x}]}] for x in prompts]
        replies: list[str | None] = []
        for i in range(0, len(chats), self.batch):
            inputs = self.policy.encode(chats[i : i + self.batch])
            said = self.policy.generate(inputs, 1, self.max_new_tokens, sample=False)
            for [text], ended in zip(said.text, said.ended[:, 0].tolist(), strict=True):
                replies.append((after_thought(text) if ended else None) or "")
        return replies


def url_problem(url: str) -> str:
    """What is wrong with a judge's URL, "" where nothing is. Never quotes the URL, which may hold a
    key."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"its URL cannot be read ({error})"
    if parts.username or parts.password:
        return (
            "its URL holds a key or password, and the run folder records the URL. Remove it, and "
            "set OPENAI_API_KEY"
        )
    if parts.query:
        return (
            "its URL has a query. Remove the ? and what follows it (Azure: .../openai/v1 needs no "
            "api-version). If it held a key, set OPENAI_API_KEY instead: the run folder records "
            "the URL"
        )
    return ""


class EndpointJudge:
    """A judge behind any OpenAI-compatible API (extra `judge`). Greedy; the key comes from
    OPENAI_API_KEY only.

    At most `concurrency` calls at a time. The client tries a failed one again, `retries` times with
    back-off; `timeout` seconds bound each silence of the server, `deadline` seconds all calls of a
    batch together: what is not there by then is None, like a call that failed every time, and is
    given up. A reply that ends otherwise than by itself (max_tokens, a filter, an error) is None,
    and so is an empty one.
    max_tokens, temperature or seed, where the server refuses it by name, is left out from then on
    (max_tokens: under its newer name); without temperature or seed replies may differ from call to
    call.

    Raises ValueError for a URL or model that cannot be asked, and without a key.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int = 16,
        timeout: float = 60.0,
        deadline: float = 600.0,
        max_tokens: int = MAX_TOKENS,
        retries: int = 3,
    ):
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError as error:
            raise ValueError(
                "a judge behind a URL needs pip install 'ground-what-you-see[judge]'"
            ) from error
        if wrong := url_problem(base_url):
            raise ValueError(wrong)
        if not urlsplit(base_url).hostname:
            raise ValueError(
                f"{base_url} names no server; a judge's URL looks like http://HOST:8000/v1"
            )
        if not model:
            raise ValueError("name the model that the judge's URL serves (--judge_model)")
        if not os.environ.get("OPENAI_API_KEY"):
            raise ValueError(
                "set OPENAI_API_KEY in the environment; any word will do where the server asks "
                "for no key"
            )
        waits = Timeout(timeout, connect=min(timeout, 10.0))
        self.open = lambda: AsyncOpenAI(
            base_url=base_url, timeout=waits, max_retries=retries, http_client=_bounded_client()
        )
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.deadline = deadline
        self.options = {"max_tokens": max_tokens, "temperature": 0.0, "seed": 0}
        self.last_error = ""

    def __str__(self) -> str:
        return f"{self.model} at {self.base_url}"

    def sampling(self, temperature: float, top_p: float, max_tokens: int) -> "EndpointJudge":
        """The same server, asked for replies that are sampled."""
        other = copy.copy(self)
        sampled = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        other.options = {name: sampled.get(name, x) for name, x in (self.options | sampled).items()}
        return other

    @property
    def refused(self) -> list[str]:
        """The options for reproducible replies (temperature, seed) that the server has refused."""
        return [name for name in ("temperature", "seed") if name not in self.options]

    def __call__(self, prompts: list[str]) -> list[str | None]:
        return asyncio.run(self._ask_all(prompts)) if prompts else []

    async def _ask_all(self, prompts: list[str]) -> list[str | None]:
        gate = asyncio.Semaphore(self.concurrency)
        async with self.open() as client:
            calls = [asyncio.create_task(self._ask(client, gate, prompt)) for prompt in prompts]
            try:
                done, late = await asyncio.wait(calls, timeout=self.deadline)
            finally:  # at the deadline, or at Ctrl-C: no call may outlive its client
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
        if late:
            self.last_error = f"no reply within {self.deadline:g} s"
        return [call.result() if call in done else None for call in calls]

    async def _ask(self, client, gate: asyncio.Semaphore, prompt: str) -> str | None:
        async with gate:
            options = self.options
            while True:
                try:
                    reply = await client.chat.completions.create(
                        model=self.model, messages=[{"role": "user", "content": prompt}], **options
                    )
                    self.options = options  # the server takes them
                    return _text_of(reply)
                # whatever it is, one call's failure is one unknown reply
                except Exception as error:
                    options = _without_refused(options, error)
                    if options is None:
                        self.last_error = _redacted(_words_of(error), client.api_key or "")
                        return None


def _bounded_client():
    """The client's own HTTP client, which reads at most LONGEST_RESPONSE bytes of any response."""
    from openai import DefaultAsyncHttpxClient, OpenAIError

    class Bounded(DefaultAsyncHttpxClient):
        async def send(self, request, *, stream=False, **options):
            response, body = await super().send(request, stream=True, **options), bytearray()
            try:
                async for part in response.aiter_bytes(2**16):
                    body += part
                    if len(body) > LONGEST_RESPONSE:
                        raise OpenAIError(f"its response is longer than {LONGEST_RESPONSE} bytes")
            finally:
                await response.aclose()
            of_the_wire = ("content-encoding", "content-length", "transfer-encoding")
            headers = [
                (name, value) for name, value in response.headers.items() if name not in of_the_wire
            ]
            return type(response)(
                response.status_code, headers=headers, content=bytes(body), request=request
            )

    return Bounded()


def _text_of(completion) -> str:
    """What a chat completion says after its thought. Raises ValueError, with the reason, where it
    says nothing."""
    try:
        choice = completion.choices[0]
        message, finish = choice.message, choice.finish_reason
        text = message.content
    except (AttributeError, LookupError, TypeError):
        words = _message_of(getattr(completion, "error", None) or str(completion))
        raise ValueError(f"its response is no chat completion: {words}") from None
    reason = str(finish).lower()
    if reason in ("length", "max_tokens"):
        raise ValueError(
            f"its reply was cut off (finish_reason {finish}): raise --judge_max_tokens"
        )
    if reason not in COMPLETE:
        raise ValueError(f"its reply is incomplete (finish_reason {finish})")
    thoughts = (
        getattr(message, name, None)
        for name in ("reasoning_content", "reasoning", "reasoning_details")
    )
    thought = any(str(each or "").strip() for each in thoughts)
    if isinstance(text, list):  # [{"type": "thinking", ...}, {"type": "text", "text": "A"}]
        parts = [part for part in text if isinstance(part, dict)]
        thought |= any(part.get("type") != "text" for part in parts)
        text = "".join(part["text"] for part in parts if part.get("type") == "text")
    if not isinstance(text, str):
        refusal = getattr(message, "refusal", None)
        raise ValueError(
            f"it refused: {refusal}"
            if refusal
            else f"its reply has no text (finish_reason {finish})"
        )
    text = after_thought(text)
    if text == "":
        what = "has nothing after its thought" if thought else "is empty"
        raise ValueError(f"its reply {what} (finish_reason {finish})")
    if text is None:
        raise ValueError(
            "its reply breaks off inside its thought or right after it, or is too long for an "
            "answer"
        )
    return text


def _without_refused(options: dict, error: Exception) -> dict | None:
    """The options without the one that the server's error refuses; None where it refuses none of
    them."""
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    words = str(getattr(error, "param", None) or _message_of(error.body))
    for name in options:
        if re.search(rf"\b{name}\b", words):
            left = {key: value for key, value in options.items() if key != name}
            if name == "max_completion_tokens":
                return None  # never without a bound
            return (
                {"max_completion_tokens": options[name], **left} if name == "max_tokens" else left
            )
    return None


def _words_of(error: Exception) -> str:
    """Status and the server's own words, or what kept the call from the server."""
    status = getattr(error, "status_code", None)
    if status is None or not hasattr(error, "body"):
        return (
            f"{error} ({error.__cause__})"
            if error.__cause__ and str(error.__cause__)
            else f"{error}"
        )
    asked = f" (POST {error.request.url})" if status == 404 else ""
    return f"{status} {_message_of(error.body)}{asked}" if error.body else f"{error}{asked}"


def _message_of(body: object) -> str:
    """{"error": {"message": ...}}, {"detail": [{"loc": [...], "msg": ...}]} and the like, as
    words."""
    if isinstance(body, list):
        return "; ".join(map(_message_of, body))
    if not isinstance(body, dict):
        return str(body)
    where = ".".join(map(str, body["loc"])) + ": " if isinstance(body.get("loc"), list) else ""
    for name in ("error", "message", "detail", "msg"):
        if body.get(name):
            return where + _message_of(body[name])
    return json.dumps(body)


def _redacted(text: str, key: str, longest: int = 300) -> str:
    """The text with the API key, and words that hold a part of it ("sk-abcd****wxyz"), replaced by
    [key]."""
    if len(key) < 8:  # "none", "EMPTY": no secret, and part of other words
        text = re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "[key]", text) if key else text
    else:
        parts = {key[i : i + 6] for i in range(len(key) - 5)}
        text = re.sub(
            r"\S+",
            lambda word: "[key]" if any(part in word[0] for part in parts) else word[0],
            text,
        )
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest] + " ..."


def is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def open_judge(
    judge: str,
    model: str = "",
    device: str | torch.device = "cpu",
    max_tokens: int = MAX_TOKENS,
    **endpoint,
) -> LocalJudge | EndpointJudge:
    """A local causal LM (folder or hub id), or the `model` behind a URL with the other options of
    `EndpointJudge`.

    max_tokens: the longest reply, thought included. Raises ConfigError where nothing there can be
    asked.
    """
    is_folder = Path(judge).is_dir()
    if is_folder and not any(
        (Path(judge) / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        raise ConfigError(f"judge: {judge} holds no model (config.json)")
    try:
        if is_url(judge):
            return EndpointJudge(judge, model, max_tokens=max_tokens, **endpoint)
        return LocalJudge(judge, device, max_new_tokens=max_tokens)
    except Exception as error:
        why = reason(error).rstrip(".")
        if isinstance(error, (OSError, HFValidationError)) and not (is_url(judge) or is_folder):
            why = f"it is no folder, and the hub gave no model of that name ({why})"
            why += ". A server's URL begins with http://"
        raise ConfigError(
            f"judge: {why}" if is_url(judge) else f"judge: cannot load {judge}: {why}"
        ) from error


class Journal(dict):
    """(question, caption) -> the judge's reply, kept on disk: one line a reply, in this rank's own
    file. The lines of all ranks are read at the start, so a resumed run does not ask again."""

    def __init__(self, file: Path, judge: str):
        lines = [
            line
            for one in sorted(file.parent.glob("*.jsonl"))
            for line in read_jsonl(one, repair=one == file)
        ]
        super().__init__(
            {(x["question"], x["caption"]): x["reply"] for x in lines if x["judge"] == judge}
        )
        self.file, self.judge = file, judge

    def __setitem__(self, key: tuple[str, str], reply: str) -> None:
        super().__setitem__(key, reply)
        line = {"judge": self.judge, "question": key[0], "caption": key[1], "reply": reply}
        # not before: a start that fails leaves nothing behind
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(to_jsonl([line]))
