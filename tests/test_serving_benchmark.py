"""benchmarks/serving: what it makes of a server's answers, with a stand-in for vLLM that answers as it is told."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.serving import serve, server
from benchmarks.serving.install import BY_ROWS, Environment
from tests import tiny_vlm
from vlmquant.calibration.samples import Sample

STAND_IN = """#!{python}
import http.server, json, sys
told = json.load(open({told!r}))
if told["dies"]:
    sys.exit(told["dies"])

class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self.reply(200, {{}})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(*told["answers"][request["messages"][0]["content"][1]["text"]])

port = int(sys.argv[sys.argv.index("--port") + 1])
print("INFO Selected CPUSomethingKernel for Linear", flush=True)
http.server.HTTPServer((sys.argv[sys.argv.index("--host") + 1], port), Handler).serve_forever()
"""
LOG = """
(APIServer pid=1) INFO 11-28 22:00:00 [model.py:1] all is well
(Worker pid=3) WARNING 11-28 22:00:01 [core.py:9] this can cause errors like `OSError: [Errno 24] Too many files`
(Worker pid=3) ERROR 11-28 22:00:01 [core.py:9] subprocess.CalledProcessError: Command '['x']' returned non-zero
(Worker pid=3) ERROR 11-28 22:00:01 [core.py:9]   File "/srv/env/lib/python3.11/vllm/x.py", line 3, in load
(Worker pid=3) ERROR 11-28 22:00:01 [core.py:9] ValueError: \x1b[0mno kernel in /srv/models/out/config.json for it
(EngineCore pid=2) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
QUESTIONS = ("What is it?", "How many are there?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving") / "model"
    return tiny_vlm.build("llava", path, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[serve.Prompt]:
    picture = model.parent / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    samples = [Sample(str(at), "vqa", text, ("no",), (picture,)) for at, text in enumerate(QUESTIONS)]
    return serve.make_prompts(model, samples, model.parent / "prompts")


@pytest.fixture(scope="module")
def right(model: Path, prompts: list[serve.Prompt]) -> dict[str, tuple[int, Any]]:
    """What vLLM would answer if it were transformers: from `generate`, in words of the API."""
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    answers: dict[str, tuple[int, Any]] = {}
    for prompt in prompts:
        made = loaded.generate(
            **prompt.encoded.inputs,
            max_new_tokens=serve.TOKENS,
            do_sample=False,
            eos_token_id=[],
            output_logits=True,
            return_dict_in_generate=True,
        )
        length = prompt.encoded.tokens
        tokens, content = made.sequences[0, length:].tolist(), []
        for token, logits in zip(tokens, made.logits, strict=True):
            values, ids = logits[0].log_softmax(-1).topk(serve.TOP)
            top = [
                {"token": f"token_id:{one}", "logprob": value}
                for one, value in zip(ids.tolist(), values.tolist(), strict=True)
            ]
            content.append({**next(one for one in top if one["token"] == f"token_id:{token}"), "top_logprobs": top})
        choice = {"token_ids": tokens, "logprobs": {"content": content}}
        ids = made.sequences[0, :length].tolist()
        answers[prompt.question] = (200, {"prompt_token_ids": ids, "choices": [choice]})
    return answers


Made = Callable[..., dict[str, Any]]


@pytest.fixture
def row(tmp_path: Path, model: Path, prompts: list[serve.Prompt]) -> Iterator[Made]:
    """Makes the row of the unquantized model, with these answers of the server."""

    def make(answers: Any, dies: str = "") -> dict[str, Any]:
        told, python = tmp_path / "told.json", tmp_path / "bin" / "python"
        told.write_text(json.dumps({"answers": answers, "dies": dies}))
        python.parent.mkdir(exist_ok=True)
        python.write_text(STAND_IN.format(python=sys.executable, told=str(told)))
        python.chmod(0o700)
        here = Environment(tmp_path, None)
        (tmp_path / serve.Row("tiny", serve.UNQUANTIZED).place).mkdir(exist_ok=True)
        return serve.make_row(serve.Row("tiny", serve.UNQUANTIZED), model, prompts, here, tmp_path, threads=1)

    return make


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_transformers_own_greedy_answers_are_as_ours(row: Made, right: Any) -> None:
    found = row(right)
    assert serve.served(found)
    assert found["summary"]["differing"] == 0
    assert found["summary"]["tokens"] == 2 * serve.TOKENS
    assert found["summary"]["largest"] < 1e-3
    assert found["kernels"] == ["CPUSomethingKernel for Linear"]


def test_other_logprobs_are_not_as_ours(row: Made, right: Any) -> None:
    wrong = copied(right)
    for step in wrong[QUESTIONS[0]][1]["choices"][0]["logprobs"]["content"]:
        step["logprob"] -= 0.5
        step["top_logprobs"] = []
    found = row(wrong)
    assert found["summary"]["mean"] == pytest.approx(0.25, abs=1e-3)  # half of the tokens by 0.5
    assert not serve.served(found)
    assert "answers, not as ours" in serve.table([found])[-1]


def test_an_unlikely_token_is_not_as_ours(row: Made, right: Any) -> None:
    wrong = copied(right)
    choice = wrong[QUESTIONS[1]][1]["choices"][0]
    step = choice["logprobs"]["content"][-1]
    fifth = step["top_logprobs"][4]
    gap = step["logprob"] - fifth["logprob"]
    choice["token_ids"][-1] = int(fifth["token"].removeprefix("token_id:"))
    step |= {"token": fifth["token"], "logprob": fifth["logprob"]}
    found = row(wrong)
    assert [prompt["equal_until"] for prompt in found["prompts"]] == [serve.TOKENS, serve.TOKENS - 1]
    assert found["summary"]["largest_gap"] == pytest.approx(gap, abs=1e-3)
    assert gap > serve.TIE
    assert not serve.served(found)


def test_another_prompt_is_told(row: Made, right: Any) -> None:
    wrong = copied(right)
    wrong[QUESTIONS[0]][1]["prompt_token_ids"][-1] += 1
    found = row(wrong)
    assert not serve.served(found)
    assert "another prompt than ours" in serve.table([found])[-1]


def test_an_error_of_the_server_fails_the_row(row: Made, right: Any) -> None:
    wrong = {**right, QUESTIONS[1]: (500, {"error": "the engine is dead"})}
    found = row(wrong)
    assert found["failed"] == 1
    assert found["summary"]["agrees"]  # what was answered is right, and that is not enough
    assert not serve.served(found)
    assert "1 of 2 requests failed: 1: status 500" in serve.table([found])[-1]


def test_a_server_that_dies_is_a_row_with_its_error(row: Made, right: Any) -> None:
    found = row(right, dies="ValueError: cannot serve this in /srv/models/out")
    assert found["down"] == "ValueError: cannot serve this in out"
    assert not serve.served(found)
    assert "does not start" in serve.table([found])[-1]


def test_a_verdict_of_check_that_did_not_come_true_is_marked(row: Made, right: Any) -> None:
    def checked(found: dict[str, Any], fits: bool, notes: list[str]) -> bool:
        return serve.as_checked(found | {"check": {"fits": fits, "refusals": [], "notes": notes, "kernels": []}})

    good, bad = row(right), {"environment": {}, "down": "it died"}
    assert checked(good, True, [])
    assert not checked(good, False, [])
    assert not checked(bad, True, [])
    assert not checked(bad, True, ["set VLLM_CPU_INT4_W4A8=0 for the server"])
    assert checked(bad, True, ["torch's product is a loop"])
    assert checked(bad, False, [])
    told = good | {"check": {"fits": False, "refusals": ["no kernel"], "notes": [], "kernels": []}}
    assert "| refused: no kernel | as ours **not as checked** |" in serve.table([told])[-1]


def test_the_first_error_of_a_log_is_its_cause() -> None:
    assert server.first_error(LOG) == "ValueError: no kernel in config.json for it"
    more = LOG.replace(
        "for it\n", "for it. Reasons:\n(Worker pid=3) ERROR 11-28 22:00:01 [core.py:9]  It takes 4 bits\n"
    )
    assert server.first_error(more) == "ValueError: no kernel in config.json for it. Reasons: It takes 4 bits"
    assert server.first_error("all is well") is None


def test_a_server_that_does_not_come_up_is_ended(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho waiting for nothing\nexec sleep 60\n")
    python.chmod(0o700)
    log = tmp_path / "log"
    with (
        pytest.raises(server.ServerError, match=r"not up after 1 s; the last line of its log: waiting for nothing"),
        server.serving(python, tmp_path, log=log, seconds=1, threads=1, environment={}),
    ):
        pass
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if children.exists():
        names = [Path(f"/proc/{one}/comm").read_text().strip() for one in children.read_text().split()]
        assert "sleep" not in names


def test_a_cache_cut_off_toward_zero() -> None:
    """By hand: 1.99 lies between the codes of 1.875 and 2, 500 beyond the largest, 448."""
    scale = torch.tensor([[[0.5]], [[0.25]]])
    values = torch.tensor([0.995, -0.995, 1.0, 0.0, -250.0])[None, None, None]
    assert serve.toward_zero(values, scale).flatten().tolist() == [0.9375, -0.9375, 1.0, 0.0, -224.0]


def test_inputs_of_three_dimensions_go_through_rows() -> None:
    """What is appended to vLLM's file, on a class of the same name."""

    class Kernel:
        def _apply_weights_sgl(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            assert x.dim() == 2
            product: torch.Tensor = x @ layer
            return product

    exec(BY_ROWS, {"CPUInt8ScaledMMLinearKernel": Kernel})
    x, layer = torch.randn(2, 3, 4), torch.randn(4, 5)
    torch.testing.assert_close(Kernel()._apply_weights_sgl(layer, x), x @ layer)
    torch.testing.assert_close(Kernel()._apply_weights_sgl(layer, x[0]), x[0] @ layer)
