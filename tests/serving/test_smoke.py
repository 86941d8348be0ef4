"""scripts/smoke_test.py against a server that behaves, and against one that has one fault at a time."""

import ast
import json
import math
import socketserver
import subprocess
import sys
import threading
import zlib
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest

from tests.support.paths import SCRIPTS
from tests.support.servers import fake_chat

LIMIT = 600  # seconds; reached only by what hangs
EOS = 257
MAX_MODEL_LEN = 4096
STORY = (
    b" an old keeper who wound the lamp each dusk and wrote the names of passing ships in a book. "
    b"Nobody asked him why, until one quiet winter a child came up the stairs with a question."
)
ANSWERS = {
    "The capital of France is": b" Paris, which lies on the river Seine.",
    "The chemical symbol for gold is": b" Au, from the Latin word aurum.",
    "One, two, three, four, five, six,": b" seven, eight, nine, ten.",
}
LAYERS = [
    {
        "name": f"model.layers.{i}.{name}",
        "kind": kind,
        "format": "nvfp4",
        "kernel": kernel,
        "ours": True,
        "implementation": "reference",
        "reason": "",
    }
    for i in range(3)
    for name, kind, kernel in (
        ("attn.wq_b", "linear", "CuTeDSLNvFp4LinearKernel"),
        ("ffn.experts", "experts", "CuTeDSLNvFp4Experts"),
    )
]


def reference_logprob(i: int, token: int) -> float:
    """What both the fake server and its expected.json take for the log-probability of token i of a text."""
    return -((i * 31 + token * 7) % 50) / 25


def document(key: str, lead: str, moral: str, **extra) -> dict:
    prompt = f"Story of {key}: {lead}"
    text = f"the {key} door stood open, and every evening someone counted the steps twice. Moral: {moral}"
    token_ids = list((prompt + text).encode())
    start = extra.get("logprobs_from", 1)
    scores = [reference_logprob(i, token_ids[i]) for i in range(start, len(token_ids))]
    sizes = {"token_ids": token_ids, "logprobs": scores, "max_tokens": len(text) + 1}
    return {"key": key, "prompt": prompt, "text": text, **sizes, **extra}


def expected_json() -> dict:
    long_lead = "".join(f"On day {n} the ferry left at {n % 12} and came back late. " for n in range(50))
    return {
        "documents": [
            document("amber", "", "the amber key opens the north gate."),
            document("cobalt", "", "the cobalt one sinks the old ships."),
            document("ivory", "", "the ivory dice always land on sixes."),
        ],
        "long": [document("saffron", long_lead, "saffron costs more than bread.", logprobs_from=2200)],
        "chat": fake_chat.conversations(),
        "tolerance": {"mean_abs_dlogp_w4a16": 0.06, "mean_abs_dlogp_w4a4": 0.25},
    }


class FakeServer(socketserver.ThreadingTCPServer):
    """An OpenAI-compatible server of a model with one token per byte; `fault` names what it does wrong."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, model: str = "demo", fault: str = "", **settings) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.fault = model, fault
        self.expected = expected_json()
        self.activations = settings.pop("activations", "bf16")
        self.logprob_error = settings.pop("logprob_error", 0.01)
        self.api_key = settings.pop("api_key", "")
        self.speculates = settings.pop("speculates", "")  # "ngram", or the class of a draft head
        assert not settings, settings
        self.layers = [dict(layer) for layer in LAYERS]
        if fault.startswith("foreign"):
            reason = "no kernel for this architecture" if fault == "foreign_with_reason" else ""
            self.layers[1].update(kernel="MarlinExperts", ours=False, implementation="", reason=reason)
        self.lock = threading.Lock()
        self.counters: Counter = Counter()
        self.arrived = threading.Condition(self.lock)
        self.in_flight = 0
        self.asked: set[str] = set()
        self.met: set[str] = set()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "FakeServer":
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def crowd(self, request: dict) -> str:
        """The check that sends this request together with others; empty where it comes alone."""
        if request["max_tokens"] in {document["max_tokens"] for document in self.expected["documents"]}:
            return "demo_text"
        asked = json.dumps(request, sort_keys=True)
        with self.lock:
            again = asked in self.asked
            self.asked.add(asked)
        return "concurrency" if again and "logprobs" in request else ""

    def is_busy(self, crowd: str) -> bool:
        """Whether another request is in flight; the first one of a crowd waits for the second."""
        with self.arrived:
            if crowd:
                self.arrived.wait_for(lambda: self.in_flight > 1 or crowd in self.met)
                self.met.add(crowd)
            return bool(crowd) or self.in_flight > 1

    def continuation(self, prompt: str) -> bytes:
        """What the model says after `prompt`, up to the end of its text."""
        fault = self.fault
        if fault == "immediate_eos":
            return b""
        if fault == "repeated_token":
            return b"a" * 200
        if self.model != "demo":
            if "The pass key is" in prompt:
                return (
                    b" I do not remember." if fault == "forgets_the_pass_key" else b" 71432, as I was told."
                )
            if prompt in ANSWERS:
                return STORY if fault == "knows_nothing" else ANSWERS[prompt]
            start = zlib.crc32(prompt.encode()) % 60
            return b"ab" * 60 if fault == "two_tokens" else STORY[start:]
        for document in self.expected["documents"] + self.expected["long"]:
            whole = document["prompt"] + document["text"]
            if whole.startswith(prompt) and len(prompt) >= len(document["prompt"]):
                if fault == "wrong_text" and document["key"] == "cobalt":
                    whole = whole[:-2] + "z."
                if fault == "broken_characters" and document["key"] == "amber":
                    whole = whole[:60] + "\ufffd" + whole[60:]
                return whole[len(prompt) :].encode()
        return b" I know only my own stories, and this one is not mine."

    def generate(self, prompt: str, max_tokens: int, stop: list[str]) -> tuple[list[int], str, str]:
        """(tokens, text, finish_reason) of a greedy answer."""
        tokens = [*self.continuation(prompt), EOS]
        if self.fault != "max_tokens_ignored":
            tokens = tokens[:max_tokens]
        text = bytes(token for token in tokens if token != EOS).decode("utf-8", "replace")
        finish = "stop" if tokens[-1] == EOS else "length"
        for word in stop if self.fault != "stop_ignored" else ():
            if word in text:
                text, finish = text[: text.index(word)], "stop"
        return tokens, "" if self.fault == "empty_text" else text, finish


class BadRequest(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    disable_nagle_algorithm = True

    def log_message(self, *arguments) -> None:
        pass

    def reply(self, status: int, body: object, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        if self.server.fault == "500_for_bad_requests":
            status = 500
        if self.server.fault == "refuses_without_message":
            message = ""
        self.reply(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})

    def do_GET(self) -> None:
        server, fault = self.server, self.server.fault
        if self.path == "/health":
            self.reply(503 if fault == "unhealthy" else 200, "")
        elif self.path == "/v1/models" and fault != "models_broken":
            card = {"id": server.model, "object": "model", "max_model_len": MAX_MODEL_LEN}
            self.reply(200, {"object": "list", "data": [card]})
        elif self.path == "/kernels" and fault != "no_kernels":
            summary = Counter(layer["kernel"] for layer in server.layers)
            versions = {"package_version": "0.1.0", "vllm_version": "0.32.0", "device": "cpu"}
            if fault == "summary_disagrees":
                summary["CuTeDSLNvFp4Experts"] += 1
            layers = [] if fault == "no_layers" else server.layers
            verdict = "off" if fault == "self_check_off" else "passed"
            report = {"activations": server.activations, "layers": layers, "summary": dict(summary)}
            report["self_check"] = {"verdict": verdict}
            report["draft"] = server.speculates if server.speculates != "ngram" else None
            self.reply(200, {**versions, **report})
        elif self.path == "/metrics":
            self.reply(200, self.metrics_text(), "text/plain")
        else:
            self.refuse(404, f"no such path: {self.path}")

    def metrics_text(self) -> str:
        server = self.server
        lines = ["# HELP vllm:request_success_total Count of successfully processed requests."]
        for name in ("request_success", "generation_tokens", "prompt_tokens"):
            value = 0 if server.fault == "counters_stuck" else server.counters[name]
            lines.append(f'vllm:{name}_total{{engine="0",model_name="{server.model}"}} {float(value)}')
        if server.speculates:
            lines += self.speculation_metrics()
        layers = Counter((layer["kernel"], str(layer["ours"]).lower()) for layer in server.layers)
        for (kernel, ours), count in layers.items():
            count += server.fault == "metric_disagrees"
            if server.fault != "no_layers_metric":
                lines.append(f'cutedsl_nvfp4_layers{{kernel="{kernel}",ours="{ours}"}} {float(count)}')
        return "\n".join(lines) + "\n"

    def speculation_metrics(self) -> list[str]:
        """Every draft is of two tokens, both accepted, so that a step makes three."""
        fault, drafts = self.server.fault, self.server.counters["generation_tokens"] // 3
        first = second = drafts
        if fault == "nothing_drafted":
            drafts = first = second = 0
        if fault == "nothing_accepted":
            first = second = 0
        if fault == "half_accepted":
            first, second = drafts // 2, 0
        if fault == "more_accepted_than_drafted":
            second = 2 * drafts
        series = {
            "drafts_total{": drafts,
            "draft_tokens_total{": 2 * drafts,
            "accepted_tokens_total{": first + second,
            'accepted_tokens_per_pos_total{position="0",': first,
            'accepted_tokens_per_pos_total{position="1",': second,
        }
        return [f'vllm:spec_decode_num_{name}engine="0"}} {float(value)}' for name, value in series.items()]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        if server.api_key and self.headers.get("Authorization") != f"Bearer {server.api_key}":
            self.reply(401, {"error": "Unauthorized"})
            return
        try:
            request = json.loads(body)
        except ValueError as error:
            if server.fault == "dies_of_malformed_json":
                server.shutdown()
                server.socket.close()
                return
            self.refuse(400, f"JSON decode error: {error}")
            return
        with server.arrived:
            server.in_flight += 1
            server.arrived.notify_all()
        try:
            self.answer(request)
        except BadRequest as error:
            self.refuse(error.status, str(error))
        finally:
            with server.lock:
                server.in_flight -= 1

    def converse(self, request: dict) -> None:
        """Answer a request that only a chat model understands."""
        server, anthropic = self.server, self.path == "/v1/messages"
        if anthropic:
            request = {**fake_chat.as_chat(request), "model": request["model"]}
        self.checked_prompt({"max_tokens": 1, **request}, chat=True)
        known = server.expected["chat"] if server.model == "demo" else []
        message = fake_chat.message_of(request, server.fault, known)
        if message is None:
            raise BadRequest(
                400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
            )
        finish = fake_chat.finish_of(message)
        if anthropic:
            self.reply(200, {"type": "message", "content": fake_chat.blocks_of(message, server.fault)})
        elif request.get("stream"):
            self.stream_deltas(fake_chat.deltas_of(message, server.fault), finish)
        else:
            choice = {"index": 0, "finish_reason": finish, "message": message}
            self.reply(200, {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {}})

    def stream_deltas(self, deltas: list[dict], finish: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for delta in [*deltas, {}]:
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else finish}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, request: dict) -> None:
        server, fault = self.server, self.server.fault
        if self.path == "/v1/messages" or not {"tools", "chat_template_kwargs", "response_format"}.isdisjoint(
            request
        ):
            self.converse(request)
            return
        chat = self.path == "/v1/chat/completions"
        prompt = self.checked_prompt(request, chat)
        text_of_prompt = bytes(prompt).decode() if isinstance(prompt, list) else prompt
        if fault == "corrupts_when_busy" and server.is_busy(server.crowd(request)):
            text_of_prompt = "Once upon a time, in a small village by the sea, there lived"
        if fault == "500_for_logprobs" and "logprobs" in request:
            raise BadRequest(500, "Out of range float values are not JSON compliant: nan")
        tokens, text, finish = server.generate(text_of_prompt, request["max_tokens"], request.get("stop", []))
        count = len(tokens)
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "total_tokens": len(prompt) + count,
        }
        if fault == "usage_does_not_add_up":
            usage["total_tokens"] += 1
        if chat and fault == "chat_empty":
            text = ""
        with server.lock:
            server.counters.update(request_success=1, prompt_tokens=len(prompt), generation_tokens=count)
        if request.get("stream"):
            self.stream(text, finish, usage, chat)
            return
        choice = {"index": 0, "finish_reason": finish}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if request.get("logprobs") is not None:
            choice["logprobs"] = self.logprobs(tokens)
        if request.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": list(prompt.encode())}
        if request.get("prompt_logprobs") is not None and fault != "no_prompt_logprobs":
            choice["prompt_logprobs"] = self.prompt_logprobs(prompt)
        kind = "chat.completion" if chat else "text_completion"
        self.reply(200, {"id": "1", "object": kind, "choices": [choice], "usage": usage})

    def checked_prompt(self, request: dict, chat: bool) -> str | list[int]:
        if request.get("model") != self.server.model:
            raise BadRequest(404, f"The model `{request.get('model')}` does not exist.")
        if chat:
            messages = request.get("messages")
            if not isinstance(messages, list):
                raise BadRequest(400, "messages: Input should be a valid list")
            prompt = messages[-1]["content"]
        else:
            prompt = request.get("prompt")
        if not isinstance(prompt, (str, list)):
            raise BadRequest(400, "prompt: Input should be a valid string")
        if not isinstance(request.get("temperature", 0), (int, float)):
            raise BadRequest(400, "temperature: Input should be a valid number")
        if request["max_tokens"] < 1:
            raise BadRequest(400, f"max_tokens must be at least 1, got {request['max_tokens']}.")
        if len(prompt) + 1 > MAX_MODEL_LEN:
            raise BadRequest(400, f"maximum context length is {MAX_MODEL_LEN}, the prompt has {len(prompt)}")
        return prompt

    def logprobs(self, tokens: list[int]) -> dict:
        fault = self.server.fault
        scores = [-5.0 if fault == "noise" else -(token % 7) / 100 for token in tokens]
        names = ["" if token == EOS else chr(token) for token in tokens]
        top = [{name: score} for name, score in zip(names, scores, strict=True)]
        if fault == "greedy_is_not_best":
            top[-1]["other"] = scores[-1] + 0.5
        if fault == "nan_logprob":
            scores[len(scores) // 2] = math.nan
        if fault == "null_logprob":
            scores[len(scores) // 2] = None
        if fault == "logprob_missing":
            scores.pop()
        return {"tokens": names, "token_logprobs": scores, "top_logprobs": top}

    def prompt_logprobs(self, prompt: str | list[int]) -> list:
        fault = self.server.fault
        ids = prompt if isinstance(prompt, list) else list(prompt.encode())
        if fault == "text_prompt_logprobs_short" and isinstance(prompt, str):
            ids = ids[:-1]
        shift = fault == "shifted_logprobs"
        entries: list = [None]
        for i in range(1, len(ids)):
            source = min(i + shift, len(ids) - 1)
            score = reference_logprob(source, ids[source]) - self.server.logprob_error
            if fault == "nan_prompt_logprob" and i == len(ids) - 1:
                score = math.nan
            entries.append({str(ids[i]): {"logprob": score, "rank": 1}})
        if fault == "wrong_drafts_pass" and len(ids) > 90:
            entries[90]["0"] = {"logprob": entries[90][str(ids[90])]["logprob"] + 2, "rank": 1}
        return entries

    def stream(self, text: str, finish: str, usage: dict, chat: bool) -> None:
        fault = "" if chat else self.server.fault
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()

        def send(event: dict | str) -> None:
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        if fault == "stream_differs":
            text = text[:-1] + "#"
        size = max(1, len(text)) if fault == "stream_in_one_piece" else 7
        self.wfile.write(b": a comment, as proxies send to keep a stream open\n\n")
        if chat:
            send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for at in range(0, len(text), size):
            piece = text[at : at + size]
            send({"choices": [{"index": 0, **({"delta": {"content": piece}} if chat else {"text": piece})}]})
            if fault == "stream_hangs":
                self.server.closing.wait()
                return
        last = {"delta": {}} if chat else {"text": ""}
        send({"choices": [{"index": 0, "finish_reason": finish, **last}]})
        if fault != "stream_without_usage":
            send({"choices": [], "usage": usage})
        if fault != "stream_without_done":
            send("[DONE]")


FAULTS = {  # on the demo model: fault -> the checks that must turn red, and no other
    "unhealthy": {"health", "bad_requests"},
    "models_broken": {"models"},
    "usage_does_not_add_up": {"completion"},
    "chat_empty": {"chat"},
    "stream_hangs": {"streaming"},
    "stream_differs": {"streaming"},
    "stream_in_one_piece": {"streaming"},
    "stream_without_usage": {"streaming"},
    "stream_without_done": {"streaming"},
    "nan_logprob": {"logprobs", "long_prompt", "garbage"},
    "null_logprob": {"logprobs", "long_prompt", "garbage"},
    "500_for_logprobs": {"logprobs", "concurrency", "long_prompt", "garbage"},  # what vLLM makes of NaN
    "logprob_missing": {"logprobs"},
    "greedy_is_not_best": {"logprobs"},
    "text_prompt_logprobs_short": {"prompt_logprobs"},
    "nan_prompt_logprob": {"prompt_logprobs", "demo_logprobs"},
    "stop_ignored": {"stop"},
    "max_tokens_ignored": {"max_tokens"},
    "corrupts_when_busy": {"concurrency", "demo_text"},
    "empty_text": {"chat", "garbage", "demo_text"},
    "immediate_eos": {"chat", "garbage", "demo_text"},
    "repeated_token": {"garbage", "demo_text"},
    "broken_characters": {"garbage", "demo_text"},
    "noise": {"garbage"},
    "counters_stuck": {"metrics"},
    "no_kernels": {"kernels"},
    "no_layers": {"kernels"},
    "foreign_without_reason": {"kernels"},
    "summary_disagrees": {"kernels"},
    "metric_disagrees": {"kernels"},
    "no_layers_metric": {"kernels"},
    "wrong_text": {"demo_text"},
    "shifted_logprobs": {"demo_logprobs"},
    "no_prompt_logprobs": {"demo_logprobs"},
    "500_for_bad_requests": {"bad_requests"},
    "refuses_without_message": {"bad_requests"},
    "dies_of_malformed_json": {"bad_requests"},
    **fake_chat.FAULTS,
}
FAULTS_OF_ANOTHER_MODEL = {
    "knows_nothing": {"facts"},
    "forgets_the_pass_key": {"long_prompt"},
    "two_tokens": {"garbage"},
    "corrupts_when_busy": {"concurrency"},
    "immediate_eos": {"chat", "garbage", "facts", "long_prompt"},
    **fake_chat.FAULTS_OF_ANOTHER_MODEL,
}
FAULTS_OF_SPECULATION = {  # (model, speculator, fault) that turn `speculation` red, and no other check
    ("demo", "DeepSeekV4MTP", "half_accepted"),
    *((model, "DeepSeekV4MTP", "nothing_accepted") for model in ("demo", "deepseek-v4")),
    *((model, "DeepSeekV4MTP", "nothing_drafted") for model in ("demo", "deepseek-v4")),
    *((model, "ngram", "more_accepted_than_drafted") for model in ("demo", "deepseek-v4")),
    ("deepseek-v4", "ngram", "wrong_drafts_pass"),
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """Run the smoke test against a server -> (exit status, {check: its JSON row}); the check `brief` is given 2 s."""

    def run(server: FakeServer, *arguments: str, brief: str = "") -> tuple[int, dict[str, dict]]:
        from smoke import cli

        checks = [
            replace(check, patience=2 / LIMIT) if check.name == brief else check for check in cli.CHECKS
        ]
        monkeypatch.setattr(cli, "CHECKS", checks)
        expected, report = tmp_path / "expected.json", tmp_path / "report.json"
        expected.write_text(json.dumps(server.expected))
        demo = ["--expected", str(expected)] if server.model == "demo" else []
        common = ["--base-url", server.url, "--json", str(report), "--timeout", str(LIMIT)]
        status = cli.main([*common, *demo, *arguments])
        rows = json.loads(report.read_text())
        assert rows["verdict"] == ("red" if status else "green")
        return status, {row["name"]: row for row in rows["checks"]}

    return run


def red(rows: dict[str, dict]) -> set[str]:
    return {name for name, row in rows.items() if row["verdict"] == "red"}


@pytest.mark.parametrize("model", ["demo", "deepseek-v4"])
def test_a_right_server_is_green(smoke, model):
    with FakeServer(model) as server:
        status, rows = smoke(server)
    assert (status, red(rows)) == (0, set()), rows
    skipped = {name for name, row in rows.items() if row["verdict"] == "skipped"}
    assert skipped == {"speculation", *(["facts"] if model == "demo" else ["demo_text", "demo_logprobs"])}


@pytest.mark.parametrize("model", ["demo", "deepseek-v4"])
@pytest.mark.parametrize("speculates", ["ngram", "DeepSeekV4MTP"])
def test_a_right_server_that_speculates_is_green(smoke, model, speculates):
    with FakeServer(model, speculates=speculates) as server:
        status, rows = smoke(server)
    assert (status, red(rows)) == (0, set()), rows
    assert (
        " accepted" in rows["speculation"]["figure"] and "3.00 tokens a step" in rows["speculation"]["detail"]
    )


@pytest.mark.parametrize(("model", "speculates", "fault"), sorted(FAULTS_OF_SPECULATION))
def test_a_fault_of_speculation_turns_its_check_red(smoke, model, speculates, fault):
    with FakeServer(model, fault, speculates=speculates) as server:
        status, rows = smoke(server)
    assert (status, red(rows)) == (1, {"speculation"}), rows
    assert rows["speculation"]["detail"] and rows["speculation"]["remedy"]


def test_another_text_than_without_speculation_is_red(smoke):
    with FakeServer("demo", "broken_characters", speculates="ngram") as server:
        status, rows = smoke(server)
    assert (status, red(rows)) == (1, {"speculation", "garbage", "demo_text"}), rows
    assert "another text than without speculation" in rows["speculation"]["detail"]


@pytest.mark.parametrize("fault", ["nothing_accepted", "half_accepted", "nothing_drafted"])
def test_a_speculator_without_a_head_may_find_nothing(smoke, fault):
    with FakeServer("demo", fault, speculates="ngram") as server:
        status, rows = smoke(server)
    assert (status, red(rows)) == (0, set()), rows


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_demo_turns_its_check_red(smoke, fault):
    arguments = ["--model", "demo"] if fault == "models_broken" else []
    brief = {"stream_hangs": "streaming", "counters_stuck": "metrics"}.get(fault, "")
    with FakeServer("demo", fault) as server:
        status, rows = smoke(server, *arguments, brief=brief)
    assert (status, red(rows)) == (1, FAULTS[fault]), rows
    assert not any("unforeseen" in row["detail"] for row in rows.values()), rows
    assert all(rows[name]["detail"] and rows[name]["remedy"] for name in FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS_OF_ANOTHER_MODEL)
def test_a_fault_of_another_model_turns_its_check_red(smoke, fault):
    with FakeServer("deepseek-v4", fault) as server:
        status, rows = smoke(server)
    assert (status, red(rows)) == (1, FAULTS_OF_ANOTHER_MODEL[fault]), rows


def test_every_check_can_turn_red():
    from smoke.cli import CHECKS

    planted = {"speculation"}.union(*FAULTS.values(), *FAULTS_OF_ANOTHER_MODEL.values())
    assert planted == {check.name for check in CHECKS}


def test_a_foreign_kernel_with_a_reason_is_green_unless_ours_is_required(smoke):
    with FakeServer("demo", "foreign_with_reason") as server:
        status, rows = smoke(server)
        assert (status, red(rows)) == (0, set())
        assert "no kernel for this architecture" in rows["kernels"]["detail"]
        assert rows["kernels"]["figure"] == "5 of 6 ours"
        status, rows = smoke(server, "--require-ours")
        assert (status, red(rows)) == (1, {"kernels"})


def test_unchecked_kernels_are_green_unless_ours_is_required(smoke):
    with FakeServer("demo", "self_check_off") as server:
        status, rows = smoke(server)
        assert (status, red(rows)) == (0, set()) and "self-check: off" in rows["kernels"]["detail"]
        status, rows = smoke(server, "--require-ours")
        assert (status, red(rows)) == (1, {"kernels"})


def test_a_foreign_server_is_green_when_told_so(smoke):
    with FakeServer("deepseek-v4", "no_kernels") as server:
        assert smoke(server)[0] == 1
        status, rows = smoke(server, "--no-kernels")
    assert (status, rows["kernels"]["verdict"]) == (0, "skipped")


@pytest.mark.parametrize(
    ("activations", "error", "status"),
    [
        ("bf16", 0.05, 0),
        ("bf16", 0.15, 1),
        ("none of ours", 0.15, 1),
        ("nvfp4:checkpoint", 0.15, 0),
        ("bf16+nvfp4:dynamic", 0.15, 0),
        ("nvfp4:warmup", 0.3, 1),
    ],
)
def test_the_tolerance_follows_the_activations(smoke, activations, error, status):
    with FakeServer("demo", activations=activations, logprob_error=error) as server:
        assert smoke(server, "--only", "demo_logprobs")[0] == status


@pytest.mark.parametrize(
    ("activations", "exact", "verdict"),
    [("nvfp4", True, "red"), ("nvfp4", False, "skipped"), ("bf16", False, "red")],
)
def test_exact_text_is_waived_only_for_w4a4_and_only_in_writing(smoke, activations, exact, verdict):
    with FakeServer("demo", "wrong_text", activations=activations) as server:
        server.expected["exact_w4a4"] = exact
        assert smoke(server, "--only", "demo_text")[1]["demo_text"]["verdict"] == verdict


def test_the_api_key_comes_from_the_environment(smoke, monkeypatch):
    with FakeServer("demo", api_key="sesame") as server:
        status, rows = smoke(server, "--only", "completion", "--model", "demo")
        assert status == 1 and "OPENAI_API_KEY" in rows["completion"]["remedy"]
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        assert smoke(server)[0] == 0


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(SCRIPTS / "smoke_test"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=LIMIT)


def test_a_server_that_never_answers_is_red_not_a_hang():
    from smoke.cli import CHECKS

    class Mute(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            closing.wait()

    closing = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mute) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        done = command("--base-url", f"http://127.0.0.1:{server.server_address[1]}", "--timeout", "2")
        closing.set()
        server.shutdown()
    assert done.returncode == 1
    assert done.stdout.count("not run: health and models ran out of time") == len(CHECKS) - 2


def test_json_on_stdout_is_alone_there_and_the_table_has_no_colour():
    with FakeServer("deepseek-v4") as server:
        done = command("--base-url", server.url + "/v1/", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "green"
    assert "kernels" in done.stderr and "\033" not in done.stderr


def test_list_names_every_check_in_order():
    from smoke.cli import CHECKS

    lines = command("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [check.name for check in CHECKS]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base-url", "http://127.0.0.1:1"), "make demo"),
        (("--base-url", "http://127.0.0.1:1", "--wait", "0.5"), "not healthy after"),
        (("--base-url", "localhost:8000"), "http://HOST:PORT"),
        (("--only", "nothing"), "no such check"),
        (("--timeout", "0"), "--timeout must be above 0"),
        (("--no-kernels", "--require-ours"), "drop one of them"),
    ],
)
def test_what_cannot_run_is_status_2_with_a_remedy(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: e.pop("tolerance"), "lacks 'tolerance'"),
        (lambda e: e["documents"].clear(), "`documents` is empty"),
        (lambda e: e["documents"][1]["logprobs"].pop(), "cobalt"),
        (lambda e: e["documents"][0].update(text=""), "amber"),
    ],
)
def test_a_damaged_expected_json_is_status_2(tmp_path, damage, message):
    path = tmp_path / "expected.json"
    expected = expected_json()
    damage(expected)
    path.write_text(json.dumps(expected))
    with FakeServer("demo") as server:
        done = command("--base-url", server.url, "--expected", str(path))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path", [SCRIPTS / "smoke_test", *sorted((SCRIPTS / "smoke").glob("*.py"))], ids=lambda path: path.name
)
def test_it_needs_python_3_9_and_nothing_else(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [] if node.level else [node.module]
        else:
            continue
        for module in modules:
            assert module.split(".")[0] in {*sys.stdlib_module_names, "smoke"}, f"{path}: imports {module}"
