"""Texts: from servers that fail, from models of ours, from files; runs that stop and go on; nothing scored wrong in silence."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opencoder.errors import DataError, Failure, UserError
from opencoder.eval.generation import Sampling, Text, TextFile, read_texts
from opencoder.eval.run import Settings, evaluate, score_file
from opencoder.eval.sandbox.pool import Sandbox
from opencoder.eval.server import Server
from opencoder.eval.task import Judge, Task
from opencoder.eval.watch import watch

TASKS = [
    Task(
        f"T/{i}", f"def f{i}(x):\n",
        Judge({"mode": "check", "setup": "", "entry_point": f"f{i}", "test": f"def check(c):\n    assert c(1) == {i}\n"}),
        f"f{i}",
    )
    for i in range(3)
]  # fmt: skip
Reply = tuple[int, Any]


def said(text: str, finish: str = "stop") -> Reply:
    return 200, {
        "choices": [{"text": text, "message": {"content": text}, "finish_reason": finish}],
        "usage": {"completion_tokens": 3},
    }


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Server, list[dict[str, Any]]]]]:
    """A server that gives the replies one after another (the last one again and again), and what it was asked."""
    running: list[ThreadingHTTPServer] = []

    def start(*replies: Reply | str, **options: Any) -> tuple[Server, list[dict[str, Any]]]:
        asked: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                reply = replies[min(len(asked), len(replies)) - 1]
                if reply == "hang":
                    stop.wait(5)
                    return
                status, value = (200, reply) if isinstance(reply, str) else reply
                data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return Server(url, "m", **{"timeout_s": 2.0, "first_wait_s": 0.01, **options}), asked

    stop = threading.Event()
    yield start
    stop.set()
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox()
    except UserError as error:
        pytest.skip(f"no namespaces on this machine: {error}")
    with made:
        yield made


def test_what_fails_is_tried_again_and_counted(serve: Any) -> None:
    server, asked = serve(
        (500, "x"), (429, "x"), "no json", (200, {"choices": []}), said("    return 0", "length"), key="k"
    )
    (text,) = server.generate(TASKS[0], [0], Sampling(temperature=0.5, max_new_tokens=7))
    assert (text.text, text.finish, text.tokens) == ("    return 0", "length", 3)
    assert server.failures == {"status 500": 1, "status 429": 1, "no JSON": 1, "answer without text": 1}
    assert len(asked) == 5
    assert (asked[0]["path"], asked[0]["key"]) == ("/v1/completions", "Bearer k")
    assert (asked[0]["temperature"], asked[0]["max_tokens"], len(asked[0]["stop"])) == (0.5, 7, 4)


def test_a_timeout_is_tried_again(serve: Any) -> None:
    server, _ = serve("hang", said("y"), timeout_s=0.3)
    assert [t.text for t in server.generate(TASKS[0], [0], Sampling())] == ["y"]
    assert server.failures == {"timeout": 1}


def test_chat_asks_in_turns(serve: Any) -> None:
    server, asked = serve(said("y"))
    server.generate(TASKS[0], [0], Sampling("chat"))
    assert asked[0]["path"] == "/v1/chat/completions"
    assert "def f0(x)" in asked[0]["messages"][0]["content"]


def test_temperature_is_what_was_asked_for(serve: Any) -> None:
    """The original tool's check of it was inverted."""
    server, asked = serve(said("y"))
    for temperature in (0.0, 0.8):
        server.generate(TASKS[0], [0], Sampling(temperature=temperature))
    assert [a["temperature"] for a in asked] == [0.0, 0.8]
    assert Sampling(temperature=0.0).greedy
    assert not Sampling(temperature=0.8).greedy


def test_a_request_that_is_wrong_ends_the_run(serve: Any) -> None:
    server, asked = serve((404, "no such model"))
    with pytest.raises(UserError, match="404: no such model"):
        server.generate(TASKS[0], [0], Sampling())
    assert len(asked) == 1


def test_samples_that_could_not_be_had_give_no_score_and_are_made_up_for(
    serve: Any, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = Settings("t", Sampling())
    failing, _ = serve(said("    return 0"), (503, "busy"), retries=1)
    with pytest.raises(Failure, match=r"2 samples could not be generated \(T/1 and others; 2 × given up: status 503"):
        evaluate(TASKS, failing, sandbox, settings, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(UserError, match="another backend"):
        evaluate(TASKS, serve(said(""))[0], sandbox, settings, tmp_path)
    working, asked = serve(said("    return 1"))
    working.name = failing.name
    summary = evaluate(TASKS, working, sandbox, settings, tmp_path)
    assert [a["prompt"] for a in asked] == [TASKS[1].prompt, TASKS[2].prompt]
    assert summary["pass"] == {"pass@1": pytest.approx(2 / 3)}
    assert summary["statuses"] == {"passed": 2, "failed": 1}


class Fixed:
    """A backend that knows its texts."""

    name = "fixed"

    def __init__(self, *texts: str) -> None:
        self.texts, self.calls = texts, 0
        self.failures: dict[str, int] = {}

    def generate(self, task: Task, samples: Sequence[int], sampling: Sampling) -> list[Text]:
        self.calls += 1
        return [Text(task.id, s, self.texts[s % len(self.texts)], "stop") for s in samples]


def test_results_are_written_and_what_models_write_is_escaped(sandbox: Sandbox, tmp_path: Path) -> None:
    texts = ["    return 0 # <script>alert(1)</script>", "    return '\ud800'", "    return 0"]
    settings = Settings("t", Sampling(samples=3, temperature=1.0), (1, 2, 3))
    summary = evaluate(TASKS[:1], Fixed(*texts), sandbox, settings, tmp_path)
    assert summary["pass"] == {"pass@1": pytest.approx(2 / 3), "pass@2": 1.0, "pass@3": 1.0}
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().split("\n") if line]
    assert [row["status"] for row in rows] == ["passed", "failed", "passed"]
    assert rows[1]["program"].endswith("'\ud800'\n") or rows[1]["program"].endswith("'\ud800'")
    again = Fixed(*texts)
    assert evaluate(TASKS[:1], again, sandbox, settings, tmp_path)["pass"] == summary["pass"]
    assert again.calls == 0


def test_a_line_cut_off_by_a_crash_is_generated_anew(tmp_path: Path) -> None:
    file = TextFile(tmp_path / "g.jsonl")
    file.add([Text("T/0", 0, "a", "stop"), Text("T/1", 0, "b", "stop")])
    file.close()
    path = tmp_path / "g.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    file = TextFile(path)
    assert [len(file.missing(task, 1)) for task in TASKS] == [0, 1, 1]
    file.add([Text("T/1", 0, "c", "stop")])
    file.close()
    assert [t.text for t in read_texts(path)] == ["a", "c"]


@pytest.mark.parametrize(
    ("sampling", "ks", "says"),
    [
        (Sampling(samples=2), (1,), "would all be the same"),
        (Sampling(), (10,), "pass@10 needs that many samples"),
        (Sampling(), (0,), "pass@0"),
        (Sampling(temperature=-1.0), (1,), "must be 0 or more"),
        (Sampling(top_p=0.0), (1,), "above 0 and at most 1"),
        (Sampling("talk"), (1,), "allowed are completion, chat"),  # type: ignore[arg-type]
        (Sampling(max_new_tokens=0), (1,), "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(sampling: Sampling, ks: tuple[int, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Settings("t", sampling, ks).check()


def test_texts_from_a_file_must_cover_every_task(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"task_id": task.id, "completion": f"    return {i}"} for i, task in enumerate(TASKS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = score_file(TASKS, read_texts(path), sandbox, Settings("t", Sampling()), tmp_path / "o", "file")
    assert summary["pass"] == {"pass@1": 1.0}
    with pytest.raises(DataError, match=r"1 tasks do not have 1 texts each \(T/2\)"):
        score_file(TASKS, read_texts(path)[:2], sandbox, Settings("t", Sampling()), tmp_path / "o", "file")
    with pytest.raises(DataError, match="does not have: T/2"):
        score_file(TASKS[:2], read_texts(path), sandbox, Settings("t", Sampling()), tmp_path / "o", "file")
    path.write_text('{"task": "T/0"}\n')
    with pytest.raises(DataError, match="line 1: needs `task` and `text`"):
        read_texts(path)


def test_the_watcher_takes_each_checkpoint_once_and_in_order(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    seen: list[str] = []

    def appear(step: int) -> None:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)

    def evaluate_one(folder: Path, to: Path) -> dict[str, Any]:
        seen.append(folder.name)
        if folder.name.endswith("20") and seen.count(folder.name) == 1:
            raise Failure("the server was away")
        return {"humaneval": {"pass": {"pass@1": 0.5}}}

    def sleep(_: float) -> None:
        appear(30 if not (run / "checkpoints" / "step_00000030").exists() else 40)

    appear(20)
    appear(10)
    assert watch(run, output, evaluate_one, until_step=30, sleep=sleep) == 0
    assert seen == ["step_00000010", "step_00000020", "step_00000020", "step_00000030"]
    curve = json.loads((output / "curve.json").read_text())
    assert [row["step"] for row in curve] == [10, 20, 30]
    assert curve[0]["humaneval pass@1"] == 0.5
    assert watch(run, output, evaluate_one, once=True) == 0
    assert len(seen) == 4


def test_the_watcher_gives_up_on_a_checkpoint_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)

    def broken(folder: Path, to: Path) -> dict[str, Any]:
        raise DataError("damaged")

    assert watch(tmp_path, tmp_path / "out", broken, once=True) == 1
    assert capsys.readouterr().err.count("not evaluated: damaged") == 3
