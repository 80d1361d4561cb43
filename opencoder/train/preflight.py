"""What must agree before the first step: tokenizer, dataset and model. Most silent failures of released models were
here (an eos id of 2 beside one of 96,539; a tokenizer with more entries than the model has rows)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from opencoder.config import Config
from opencoder.errors import ConfigError, DataError
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.optim.update import check_groups


def check_inputs(config: Config) -> None:
    """Compare the tokenizer folder, every dataset's PREFIX.json, optim.groups and the model. Raises ConfigError or
    DataError."""
    if config.optim.groups:
        with torch.device("meta"):
            check_groups(config.optim, named_parameters(Decoder(config.model)))
    tokenizer = _tokenizer_facts(config.data.tokenizer) if config.data.tokenizer else None
    if tokenizer and tokenizer["size"] > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer {config.data.tokenizer} with "
            f"{tokenizer['size']} entries: set model.vocab_size={tokenizer['size']}"
        )
    blends = [config.data.blend, *(stage.blend or [] for stage in config.data.stages)]
    for prefix in dict.fromkeys(entry.prefix for blend in blends for entry in blend):
        _check_dataset(prefix, config, tokenizer)


def _check_dataset(prefix: str, config: Config, tokenizer: dict[str, Any] | None) -> None:
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise DataError(f"dataset {prefix}{suffix} does not exist: make it with `opencoder preprocess`")
    described = Path(prefix + ".json")
    if not described.is_file():
        return  # written by another tool, for example Megatron-LM: there is nothing to compare
    facts = json.loads(described.read_text(encoding="utf-8"))
    size = facts.get("vocab_size")
    if size is not None and size > config.model.vocab_size:
        raise ConfigError(
            f"dataset {prefix} was made with a vocabulary of {size}, model.vocab_size={config.model.vocab_size} is "
            f"smaller: set model.vocab_size={size}"
        )
    if tokenizer is None:
        return
    for name, ours, theirs in (
        ("tokenizer hash", tokenizer["hash"], facts.get("tokenizer_hash")),
        ("eod id", tokenizer["eos_id"], facts.get("eod_id")),
    ):
        if theirs is not None and ours != theirs:
            raise ConfigError(
                f"{name} of data.tokenizer={config.data.tokenizer} is {ours}, of dataset {prefix} {theirs}: use the "
                "tokenizer the dataset was made with, or make the dataset again"
            )


def _tokenizer_facts(folder: str) -> dict[str, Any]:
    """Size, hash of tokenizer.json and eos id of an HF tokenizer folder."""
    from transformers import AutoTokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"data.tokenizer={folder} holds no tokenizer.json: give a folder made by `train-tokenizer`")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"size": len(tokenizer), "hash": digest, "eos_id": tokenizer.eos_token_id}
