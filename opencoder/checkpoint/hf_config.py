"""config.json of a Hugging Face Llama model to and from our model configuration, and the ids that must agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from opencoder.config import ModelConfig
from opencoder.config_loading import parse_tree
from opencoder.errors import DataError


@dataclass(frozen=True)
class TokenizerIds:
    """What a model must know of its tokenizer."""

    size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def as_dict(self) -> dict[str, int]:
        """The special ids that exist, under their Hugging Face names."""
        named = {name: getattr(self, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {name: value for name, value in named.items() if value is not None}


def tokenizer_ids(folder: Path) -> TokenizerIds:
    """Size and special ids of a tokenizer folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return TokenizerIds(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def hf_config(config: ModelConfig, dtype: torch.dtype, ids: TokenizerIds | None) -> dict[str, Any]:
    """config.json for LlamaForCausalLM. head_dim is always written: hidden_size / heads need not equal it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.padded_vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        # Explicit nulls: LlamaConfig would otherwise assume ids 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **(ids.as_dict() if ids else {}),
    }


def model_config(described: dict[str, Any], file: Path, tokenizer_size: int | None) -> ModelConfig:
    """The ModelConfig that `described` (a config.json) stands for. Raises DataError for what cannot be expressed."""
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    for key, value, allowed in (
        ("model_type", described.get("model_type"), ("llama",)),
        ("hidden_act", described.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", described.get("attention_bias", False), (False,)),
        ("mlp_bias", described.get("mlp_bias", False), (False,)),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
    ):
        if value not in allowed:
            raise DataError(f"{file}: {key}={value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
    heads = described["num_attention_heads"]
    vocab = described["vocab_size"]
    if tokenizer_size is not None and tokenizer_size > vocab:
        raise DataError(f"{file}: vocab_size={vocab} is less than the tokenizer's {tokenizer_size} entries")
    tree = {
        "layers": described["num_hidden_layers"],
        "hidden_size": described["hidden_size"],
        "heads": heads,
        "kv_heads": described.get("num_key_value_heads") or heads,
        "head_dim": described.get("head_dim") or described["hidden_size"] // heads,
        "ffn_size": described["intermediate_size"],
        "vocab_size": tokenizer_size or vocab,
        "padded_vocab_size": vocab,
        "rope_theta": described.get("rope_theta") or rope.get("rope_theta") or 1e4,
        "norm_eps": described.get("rms_norm_eps", 1e-6),
        "tie_embeddings": described.get("tie_word_embeddings", False),
        "max_seq_len": described.get("max_position_embeddings", 2048),
        "init_std": described.get("initializer_range", 0.02),
    }
    return parse_tree(ModelConfig, tree)


def check_ids(folder: Path) -> None:
    """Compare the special ids of config.json, generation_config.json and the tokenizer, as far as each exists.

    Raises DataError naming both values. A list of ids agrees with one of its members."""
    sources: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            sources[name] = json.loads((folder / name).read_text(encoding="utf-8"))
    if (folder / "tokenizer.json").is_file():
        ids = tokenizer_ids(folder)
        vocab = sources.get("config.json", {}).get("vocab_size")
        if vocab is not None and ids.size > vocab:
            raise DataError(f"{folder}: the tokenizer has {ids.size} entries, config.json vocab_size={vocab}")
        sources["the tokenizer"] = dict(ids.as_dict())
    for key in ("bos_token_id", "eos_token_id"):
        stated = [(name, _ids(values[key])) for name, values in sources.items() if values.get(key) is not None]
        for (name, value), (other, against) in pairwise(stated):
            if not value & against:
                raise DataError(
                    f"{folder}: {key} is {sorted(value)} in {name} but {sorted(against)} in {other}: make them agree"
                )


def _ids(value: int | list[int]) -> set[int]:
    return set(value) if isinstance(value, list) else {value}
