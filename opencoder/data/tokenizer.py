"""The tokenizer: byte-level BPE by HF `tokenizers`, with the special tokens of the OpenCoder family.

`<|endoftext|>` is eos and ends documents; ChatML turns begin with `<|im_start|>` (bos) and end with `<|im_end|>`; the
fill-in-the-middle tokens stand for the parts of a cut document."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from opencoder.errors import DataError, UserError
from opencoder.files import replace_directory, temporary_name, write_json, write_text

log = logging.getLogger("opencoder")

EOS, BOS, TURN_END, PAD, UNK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<unk>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"
SPECIAL = (EOS, BOS, TURN_END, PAD, UNK, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD)
SMALLEST = 256 + len(SPECIAL)
"""Every byte is a token, so that any text can be written."""

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with one symbol or space before them
    r"|\p{N}{1,3}"  # digits in groups of at most three
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
    r"|\s*[\r\n]+"  # line ends with the white space before them
    r"|\s+(?!\S)|\s+"  # indentation
)
"""How text is cut before merges are learned: the classes of GPT-4's pattern, as the published model uses."""

SYSTEM = "You are OpenCoder, created by OpenCoder Team."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(texts: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """A tokenizer of `vocab_size` entries, special tokens included, trained on `texts`. The same texts give the same.

    Raises UserError if vocab_size is below SMALLEST."""
    if vocab_size < SMALLEST:
        raise UserError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens need {SMALLEST}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        log.warning("the text gives only %d of %d entries", tokenizer.get_vocab_size(), vocab_size)
    return tokenizer


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads, atomically."""
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (target / "tokenizer.json").is_file():
        raise UserError(f"--output {target} exists and is no tokenizer: choose a new or empty folder")
    temporary = temporary_name(target)
    temporary.mkdir(parents=True, exist_ok=True)
    write_text(temporary / "tokenizer.json", tokenizer.to_str(pretty=False))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    extra = [t for t in SPECIAL if t not in names.values()]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "additional_special_tokens": extra,
        "chat_template": CHAT_TEMPLATE,
        **names,
    }
    write_json(temporary / "tokenizer_config.json", settings)
    write_json(temporary / "special_tokens_map.json", {**names, "additional_special_tokens": extra})
    replace_directory(temporary, target)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer folder as preprocessing needs it."""

    tokenizer: Tokenizer
    hash: str
    """SHA-256 of tokenizer.json."""
    size: int
    """Largest id + 1."""
    eod_id: int
    """The eos token's id, which ends documents."""
    im_end_id: int | None
    fim_ids: tuple[int, int, int] | None
    """Prefix, middle, suffix."""


def load(folder: str | Path) -> LoadedTokenizer:
    """Read a tokenizer folder. Raises DataError if it is none or names no eos token."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"--tokenizer {folder} holds no tokenizer.json: make one with `opencoder train-tokenizer`")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises a bare Exception for a malformed file
        raise DataError(f"--tokenizer {folder} cannot be read: {error}") from error
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    eod = tokenizer.token_to_id(eos) if eos else None
    if eod is None:
        raise DataError(f"{folder}/tokenizer_config.json names no eos_token that tokenizer.json has (it says {eos!r})")
    fim = [i for t in (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX) if (i := tokenizer.token_to_id(t)) is not None]
    return LoadedTokenizer(
        tokenizer=tokenizer,
        hash=hashlib.sha256(file.read_bytes()).hexdigest(),
        size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eod_id=eod,
        im_end_id=tokenizer.token_to_id(TURN_END),
        fim_ids=(fim[0], fim[1], fim[2]) if len(fim) == 3 else None,
    )


def without_parallelism() -> None:
    """Keep HF `tokenizers` to one thread: with several processes, its own threads only get in one another's way."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def texts_of(files: Iterable[Path], column: str) -> Iterator[str]:
    """The texts of all files, in order."""
    from .documents import read_documents

    for file in files:
        for document in read_documents(file, column=column):
            yield document.text
