"""Texts from a checkpoint of ours or a Hugging Face folder, by transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opencoder.checkpoint import folders, hf
from opencoder.checkpoint.hf_config import check_ids
from opencoder.data.chat_prompt import prompt_ids
from opencoder.errors import DataError, UserError

from .generation import Sampling, Text
from .task import Task

TAIL = 24
"""New tokens that are looked through for a stop after each step; stops are shorter."""
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class Local:
    """A backend with the model in this process."""

    def __init__(self, folder: str | Path, *, device: str = "auto", dtype: str = "auto", batch_size: int = 8) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self.failures: dict[str, int] = {}
        self.batch_size = batch_size
        self.model, tokenizer_folder = load_model(self.folder, dtype)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model = self.model.to(self.device).eval()
        self.tokenizer = load_tokenizer(tokenizer_folder, self.folder)
        self.context = int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)
        self.ends = end_ids(self.model, self.tokenizer)

    def generate(self, task: Task, samples: Sequence[int], sampling: Sampling) -> list[Text]:
        """Texts of one task, `batch_size` samples at a time. The seed is that of the task and its samples: the same text comes
        whatever else a run holds, and when it is resumed."""
        ids = self._prompt(task, sampling)
        room = min(sampling.max_new_tokens, self.context - len(ids))
        if room < 1 or not ids:
            return [Text(task.id, sample, "", "prompt too long") for sample in samples]
        texts: list[Text] = []
        for start in range(0, len(samples), self.batch_size):
            part = samples[start : start + self.batch_size]
            key = f"{sampling.seed} {task.id} {list(part)}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            rows = self._draw(ids, len(part), room, task.stops if sampling.mode == "completion" else (), sampling)
            texts += [self._text(task, sample, row, room) for sample, row in zip(part, rows, strict=True)]
        return texts

    def _prompt(self, task: Task, sampling: Sampling) -> list[int]:
        question = task.question(sampling.mode)
        if sampling.mode == "completion":
            return list(self.tokenizer(question, add_special_tokens=False)["input_ids"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(f"{self.folder} has no chat template: use --mode completion, or a tuned model")
        return prompt_ids(self.tokenizer, [{"role": "user", "content": question}])

    def _draw(self, ids: list[int], count: int, room: int, stops: Sequence[str], sampling: Sampling) -> list[list[int]]:
        from transformers import StoppingCriteriaList

        given = torch.tensor([ids], device=self.device)
        drawing = {} if sampling.greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=room, do_sample=not sampling.greedy,
                num_return_sequences=count, eos_token_id=sorted(self.ends) or None,
                pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends, default=0),
                stopping_criteria=StoppingCriteriaList([_Stops(self.tokenizer, stops, len(ids))] if stops else []), **drawing,
            )  # fmt: skip
        return [row[len(ids) :].tolist() for row in output]

    def _text(self, task: Task, sample: int, row: list[int], room: int) -> Text:
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        kept = row if end is None else row[:end]
        # Bytes that are no UTF-8 become U+FFFD: the program then fails by itself, and the report shows them.
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stopped = end is not None or len(row) < room or any(stop in text for stop in task.stops)
        return Text(task.id, sample, str(text), "stop" if stopped else "length", len(kept))


class _Stops:
    """Ends a row as soon as one of the stops stands in its newest tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, stops, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = input_ids[:, max(self._prompt, input_ids.shape[1] - TAIL) :]
        texts = self._tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def load_model(folder: Path, dtype: str = "auto") -> tuple[Any, Path]:
    """The model of a native checkpoint, a run folder or a Hugging Face folder, and where its tokenizer is."""
    if not folder.is_dir():
        raise UserError(f"--model {folder} is not a folder")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    if hf.is_hf_folder(folder):
        from transformers import AutoModelForCausalLM

        check_ids(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        tokenizer_folder = folder
    else:
        model, tokenizer_folder = hf.to_transformers(folder), folders.resolve(folder) / "tokenizer"
    return (model if dtype == "auto" else model.to(DTYPES[dtype])), tokenizer_folder


def load_tokenizer(folder: Path, model: Path) -> Any:
    """transformers' tokenizer. Raises DataError if the checkpoint carries none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{model} carries no tokenizer: train with data.tokenizer set, or copy tokenizer.json there")
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a text: the tokenizer's end, ChatML's, and those of the model's generation settings."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends |= set(configured) if isinstance(configured, list) else {configured}
    unknown = tokenizer.unk_token_id
    return {int(end) for end in ends if end is not None and end != unknown}
