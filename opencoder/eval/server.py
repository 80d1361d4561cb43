"""Texts from any server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, a hosted one).

What fails is tried again, counted, and if it fails to the end left out: a sample that was not generated is not a wrong one."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from opencoder.errors import UserError

from .generation import Sampling, Text
from .task import Task

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that may pass; any other error is the user's to mend and ends the run."""
MAX_STOPS = 4
"""OpenAI takes no more; the rest is cut off here anyway."""
LONGEST_WAIT_S = 60.0
MAX_ANSWER = 64 << 20


class Trouble(Exception):
    """A request that may succeed when it is tried again; `wait_s` is how long the server asks to wait."""

    def __init__(self, kind: str, wait_s: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.wait_s = kind, wait_s


class Server:
    """A backend over HTTP. Thread-safe."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout_s: float = 600.0,
        retries: int = 5,
        first_wait_s: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"server {url!r}: give its address with http:// or https://, up to and including /v1")
        self.name = f"{model} at {url}"
        self.failures: dict[str, int] = {}
        self._url, self._model, self._key = url.rstrip("/"), model, key
        self._timeout_s, self._retries, self._first_wait_s = timeout_s, retries, first_wait_s
        self._lock = threading.Lock()

    def generate(self, task: Task, samples: Sequence[int], sampling: Sampling) -> list[Text]:
        """One request for each sample: a server may refuse `n`, and a failure then costs one sample. Raises UserError where the
        server says that the request is wrong."""
        found = (self._one(task, sample, sampling) for sample in samples)
        return [text for text in found if text is not None]

    def _one(self, task: Task, sample: int, sampling: Sampling) -> Text | None:
        body: dict[str, Any] = {
            "model": self._model, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens, "seed": sampling.seed + sample,
        }  # fmt: skip
        question = task.question(sampling.mode)
        if sampling.mode == "chat":
            path, body["messages"] = "/chat/completions", [{"role": "user", "content": question}]
        else:
            path, body["prompt"], body["stop"] = "/completions", question, list(task.stops[:MAX_STOPS])
        for attempt in range(self._retries + 1):
            try:
                text, finish, tokens = _read(self._post(path, body), sampling.mode)
                return Text(task.id, sample, text, "length" if finish == "length" else "stop", tokens)
            except Trouble as trouble:
                self._count(trouble.kind if attempt < self._retries else f"given up: {trouble.kind}")
                if attempt < self._retries:
                    wait_s = self._first_wait_s * 2**attempt * random.uniform(0.5, 1.0)
                    time.sleep(min(max(wait_s, trouble.wait_s), LONGEST_WAIT_S))
        return None

    def _count(self, kind: str) -> None:
        with self._lock:
            self.failures[kind] = self.failures.get(kind, 0) + 1

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                data = answer.read(MAX_ANSWER + 1)
        except urllib.error.HTTPError as error:
            if error.code in RETRIED:
                raise Trouble(f"status {error.code}", _seconds(error.headers.get("Retry-After"))) from error
            said = error.read(500).decode("utf-8", "replace")
            raise UserError(f"{self._url}{path} answers {error.code}: {said}") from error
        except TimeoutError as error:
            raise Trouble("timeout") from error
        except (urllib.error.URLError, OSError, ValueError) as error:
            kind = "timeout" if isinstance(getattr(error, "reason", None), TimeoutError) else "connection"
            raise Trouble(kind) from error
        try:
            return json.loads(data)
        except ValueError as error:
            raise Trouble("no JSON") from error


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date: our own waiting will do
        return 0.0


def _read(answer: Any, mode: str) -> tuple[str, str, int]:
    """Text, reason of its end and number of tokens. Raises Trouble if the answer holds no text."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if mode == "chat" else choice["text"]
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Trouble("answer without text") from error
    if not isinstance(text, str):
        raise Trouble("answer without text")
    return text, str(choice.get("finish_reason")), tokens
