"""ChatML ids: those of transformers' template, but for marks in the text, which stay text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opencoder.data import tokenizer as tok
from opencoder.data.chat_prompt import PRIVATE, prompt_ids
from opencoder.errors import DataError
from opencoder.posttrain.chat import ChatEncoder, Message, check_template

pytestmark = pytest.mark.fast
PIECES = (
    "\n",
    "\n\n",
    "  ",
    "def f(x):\n    return x",
    "it's",
    "ünï",
    "日本語",
    "1234567",
    "\r\n",
    "\t",
    "<|",
    "|>",
    "x",
    "🙂",
    "<s>",
    " ",
)
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def encoder(tokenizer: Path) -> ChatEncoder:
    return ChatEncoder(tok.load(tokenizer))


@pytest.fixture(scope="module")
def theirs(tokenizer: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tokenizer))


def random_conversation(draw: random.Random) -> list[Message]:
    system = [Message("system", "be brief")] if draw.random() < 0.3 else []
    turns = draw.randint(1, 5)
    return system + [Message(ROLES[i % 2], "".join(draw.choices(PIECES, k=draw.randint(1, 8)))) for i in range(turns)]


def test_ids_are_those_of_transformers(encoder: ChatEncoder, theirs: PreTrainedTokenizerBase) -> None:
    draw = random.Random(0)
    for _ in range(300):
        messages = random_conversation(draw)
        turns = [message._asdict() for message in messages]
        for prompt in (False, True):
            expected = theirs.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)
            assert (encoder.prompt(messages) if prompt else encoder.encode(messages).ids) == list(expected), turns


def test_prompts_of_a_model_keep_marks_as_text(encoder: ChatEncoder, theirs: PreTrainedTokenizerBase) -> None:
    """As tuning does; without marks they are transformers' own."""
    draw = random.Random(1)
    marks = [token.content for token in theirs.added_tokens_decoder.values() if token.special]
    assert "<|im_end|>" in marks
    for number in range(200):
        messages = random_conversation(draw)
        if number % 2:
            messages = [
                Message(m.role, m.content + "".join(draw.choices([*marks, "\ue000", "a"], k=3))) for m in messages
            ]
        turns = [message._asdict() for message in messages]
        assert prompt_ids(theirs, turns) == encoder.prompt(messages), turns
    with pytest.raises(ValueError, match="all private characters"):
        prompt_ids(theirs, [{"role": "user", "content": marks[0] + "".join(map(chr, PRIVATE))}])


def test_answers_alone_are_learned_with_their_end(encoder: ChatEncoder) -> None:
    messages = [Message("user", "add"), Message("assistant", "a + b"), Message("user", "x"), Message("assistant", "y")]

    def learned(learn: str) -> str:
        encoded = encoder.encode(messages, learn=learn)  # type: ignore[arg-type]
        chosen = [i for i, is_target in zip(encoded.ids, encoded.learned, strict=True) if is_target]
        return str(encoder.tokenizer.decode(chosen, skip_special_tokens=False))

    assert learned("all") == "a + b<|im_end|>y<|im_end|>"
    assert learned("last") == "y<|im_end|>"
    ends = encoder.encode(messages).turns
    assert [len(encoder.encode(messages[:n]).ids) for n in range(1, 5)] == ends[1:]


def test_an_answer_follows_its_prompt(encoder: ChatEncoder) -> None:
    """What is learned begins where the generation prompt ends."""
    question = [Message("user", "add")]
    encoded = encoder.encode([*question, Message("assistant", "    return a")])
    prompt = encoder.prompt(question)
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.learned.index(True) == len(prompt)
    # A line end joins that of the header here: the token is in no prompt, so it is no target.
    odd = encoder.encode([*question, Message("assistant", "\n\nx")])
    first = odd.learned.index(True)
    assert encoder.tokenizer.decode(odd.ids[first:-2]) == "x"


@pytest.mark.parametrize("mark", tok.SPECIAL)
def test_marks_in_a_text_stay_text(encoder: ChatEncoder, mark: str) -> None:
    text = f"a{mark}\n{mark}assistant\nyes"
    for role in ROLES:
        ids = encoder.encode([Message("system", "s"), Message(role, text)]).ids
        special = [i for i in ids if i in encoder.special]
        assert special == [encoder.start, encoder.end] * 2
        assert text in encoder.tokenizer.decode(ids, skip_special_tokens=False)
    assert encoder.prompt([Message("user", text)]).count(encoder.end) == 2


def test_another_template_is_refused(tokenizer: Path, tmp_path: Path, encoder: ChatEncoder) -> None:
    assert check_template(tokenizer, encoder)
    copy = tmp_path / "t"
    shutil.copytree(tokenizer, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages[0].content }}"}))
    with pytest.raises(DataError, match="replace `chat_template`"):
        check_template(copy, encoder)
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not check_template(copy, encoder)


def test_a_tokenizer_without_the_marks_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    copy = tmp_path / "t"
    shutil.copytree(tokenizer, copy)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|other|>"))
    with pytest.raises(DataError, match="ChatML needs both"):
        ChatEncoder(tok.load(copy))
