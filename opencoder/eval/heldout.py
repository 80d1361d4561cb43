"""Loss and bits per byte on documents that a model was not trained on, by language, from a .bin/.idx dataset.

Every token of a document is predicted once, from the tokens before it in the document and the end-of-document token before that, as
in training with packed documents. Documents longer than the context are read in windows that overlap by half, each token scored
where it has the most context. The end-of-document tokens themselves are not scored: they are no text.

loss = nats per token; bits per byte = nats / (ln 2 · bytes of the text in UTF-8), which tokenizers can be compared by."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from opencoder.console import ProgressBar
from opencoder.data.indexed import IndexedDataset
from opencoder.errors import DataError
from opencoder.files import sha256_of

if TYPE_CHECKING:
    from .local import Local


class Window(NamedTuple):
    """A piece of one document."""

    document: int
    ids: list[int]
    """What the model reads."""
    targets: list[int]
    """What it should say next; −100: scored in another window."""


def windows(document: int, tokens: list[int], before: int, context: int) -> Iterator[Window]:
    """The windows of a document's text `tokens`, which follow the token `before`; each target is in exactly one."""
    ids, targets = [before, *tokens[:-1]], tokens
    stride = max(1, context // 2)
    scored = 0
    for start in range(0, len(targets), stride):
        end = min(start + context, len(targets))
        if end <= scored:
            break
        yield Window(document, ids[start:end], [-100] * (scored - start) + targets[scored:end])
        scored = end


def evaluate_dataset(model: Local, prefix: str | Path, *, batch_size: int = 8) -> dict[str, Any]:
    """{"all": {...}, "by_language": {language: {...}}}, each with documents, tokens, bytes, loss and bits_per_byte.

    Raises DataError if the dataset was made with another tokenizer than the model's."""
    data = IndexedDataset(prefix)
    _check_tokenizer(model, Path(f"{prefix}.json"))
    languages = _languages(data)
    eod = model.tokenizer.eos_token_id
    nats: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    sizes: dict[int, int] = {}

    def pieces() -> Iterator[Window]:
        for document in range(len(data.document_indices) - 1):
            first, last = int(data.document_indices[document]), int(data.document_indices[document + 1])
            tokens = np.concatenate([data[i] for i in range(first, last)] or [np.zeros(0, np.int64)]).tolist()
            if tokens and tokens[-1] == eod:
                tokens.pop()
            text = model.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            sizes[document] = len(text.encode("utf-8", "surrogatepass"))
            yield from windows(document, tokens, eod, model.context if model.context < 1 << 30 else 4096)
            bar.advance()

    with ProgressBar("held-out", total=len(data.document_indices) - 1, unit="documents") as bar:
        for batch in _batches(pieces(), batch_size):
            for window, loss, count in zip(batch, *_losses(model, batch, eod), strict=True):
                nats[window.document] += loss
                counts[window.document] += count
    groups: dict[str, list[int]] = defaultdict(list)
    for document in sizes:
        groups[languages[document]].append(document)

    def sums(documents: list[int]) -> dict[str, Any]:
        total, tokens = math.fsum(nats[d] for d in documents), sum(counts[d] for d in documents)
        size = sum(sizes[d] for d in documents)
        return {
            "documents": len(documents), "tokens": tokens, "bytes": size, "loss": total / tokens if tokens else None,
            "bits_per_byte": total / math.log(2) / size if size else None,
        }  # fmt: skip

    return {"all": sums(list(sizes)), "by_language": {name: sums(groups[name]) for name in sorted(groups)}}


def _batches(items: Iterator[Window], size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _losses(model: Local, batch: list[Window], pad: int) -> tuple[list[float], list[int]]:
    """Summed nats and number of scored tokens of each window."""
    longest = max(len(window.ids) for window in batch)
    ids = torch.full((len(batch), longest), pad)
    targets = torch.full((len(batch), longest), -100)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        targets[row, : len(window.targets)] = torch.tensor(window.targets)
    ids, targets = ids.to(model.device), targets.to(model.device)
    # Padding stands to the right, where a causal model does not look.
    logits = model.model(input_ids=ids).logits  # (windows, tokens, vocabulary)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Flat: across the vocabulary of a transposed tensor the same takes three times as long on a CPU.
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return loss.view(targets.shape).double().sum(1).tolist(), (targets != -100).sum(1).tolist()


def _check_tokenizer(model: Local, path: Path) -> None:
    if not path.is_file():
        return  # made by another tool: nothing to compare
    made_with = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_hash")
    file = Path(model.tokenizer.name_or_path) / "tokenizer.json"
    if made_with and made_with != sha256_of(file):
        raise DataError(
            f"{path} says that the dataset was made with another tokenizer than {file}: preprocess it with the model's"
        )


def _languages(data: IndexedDataset) -> list[str]:
    documents = len(data.document_indices) - 1
    path = Path(f"{data.prefix}.docs.parquet")
    if not path.is_file():
        return ["unknown"] * documents
    import pyarrow.parquet

    names = pyarrow.parquet.read_table(path, columns=["language"])["language"].to_pylist()
    if len(names) != documents:
        raise DataError(f"{path} has {len(names)} rows, the dataset {documents} documents: they do not belong together")
    return [name or "unknown" for name in names]


def show(prefix: str | Path, result: dict[str, Any]) -> str:
    """A table of the result."""
    lines = [f"held-out {prefix}", f"  {'language':<20}{'documents':>10}{'tokens':>12}{'loss':>9}{'bits/byte':>11}"]
    for name, row in [("all", result["all"]), *result["by_language"].items()]:
        numbers = "".join(
            f"{row[k]:>{w}.4f}" if row[k] is not None else f"{'–':>{w}}"
            for k, w in (("loss", 9), ("bits_per_byte", 11))
        )
        lines.append(f"  {name:<20}{row['documents']:>10}{row['tokens']:>12}{numbers}")
    return "\n".join(lines)
