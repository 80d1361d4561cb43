"""Searching in what class_export.py has written: features of samples, and the classes whose rows they go with best.

N classes, D width, Q samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from opencoder.data import tokenizer as tok
from opencoder.errors import DataError, UserError
from opencoder.model.classes.topk import keys_of, values_and_ids
from opencoder.model.classes.variants import directions
from opencoder.model.decoder import named_parameters
from opencoder.model.encoder import FeatureModel

from . import folders, native
from .class_export import DESCRIPTION, FORMAT, map_matrix

BLOCK_BYTES = 64 << 20
"""Rows that are looked at, and their logits, at one time."""


class ClassFolder:
    """An export, its class matrix mapped: what is looked at is read, and may be given up again."""

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError if the folder is no whole export."""
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise DataError(
                f"{folder} holds no {DESCRIPTION}: make it with `opencoder export-classes --input RUN --output {folder}`"
            )
        self.facts: dict[str, Any] = folders.read_json(self.folder / DESCRIPTION)
        if self.facts.get("format") != FORMAT:
            raise DataError(f"{folder} has format {self.facts.get('format')}; this version reads format {FORMAT}")
        self.config = native.read_config(self.folder)
        self.rows = map_matrix(self.folder, self.facts)
        """(N, D) float32."""
        self.model = self._load_model()

    def _load_model(self) -> FeatureModel:
        file = self.folder / "encoder.safetensors"
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors raises its own untyped error for a damaged header or a cut file
            raise DataError(f"{file} cannot be read ({error}): copy it again") from error
        with torch.device("meta"):
            model = FeatureModel(self.config.model)
        names = named_parameters(model)
        if set(names) != set(tensors):
            raise DataError(f"{file} holds other tensors than config.yaml describes: they are of two models")
        model = model.to(next(iter(tensors.values())).dtype).to_empty(device="cpu")
        with torch.no_grad():
            for key, parameter in named_parameters(model).items():
                parameter.copy_(tensors[key])
        return model.eval()

    # ---- features ----

    @torch.no_grad()
    def features_of_tokens(self, samples: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids of each sample → (Q, D) fp32, as logits take them. Samples are cut to the length of training."""
        if self.config.model.encoder.input != "tokens":
            raise UserError(f"{self.folder}: the model takes features, not tokens: use --features")
        if any(not len(ids) for ids in samples):
            raise UserError(f"query {next(i for i, ids in enumerate(samples) if not len(ids)) + 1} has no tokens")
        length = min(self.config.data.seq_len, max(len(ids) for ids in samples))
        tokens = torch.zeros(len(samples), length, dtype=torch.int64)
        lengths = torch.tensor([min(len(ids), length) for ids in samples])
        for row, ids in enumerate(samples):
            tokens[row, : lengths[row]] = torch.as_tensor(ids[:length])
        return self._scored(self.model.features(tokens, lengths))

    @torch.no_grad()
    def features_of_numbers(self, samples: NDArray[Any]) -> torch.Tensor:
        """(Q, W) numbers → (Q, D) fp32, as logits take them."""
        width = self.config.model.encoder.width
        if width is None:
            raise UserError(f"{self.folder}: the model takes tokens, not features: use --query")
        if samples.ndim != 2 or samples.shape[1] != width:
            raise UserError(f"the queries have shape {samples.shape}, the model takes rows of {width} numbers")
        if not np.isfinite(samples).all():
            raise UserError("the queries have numbers that are not finite")
        return self._scored(self.model.features(torch.from_numpy(samples.astype(np.float32))))

    def _scored(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        return directions(features) if self.facts["matrix"]["unit_rows"] else features

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """By the tokenizer of the export."""
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            raise DataError(
                f"{self.folder} carries no tokenizer: train with data.tokenizer set, or copy the folder there"
            )
        encoded = tok.load(folder).tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]

    # ---- search ----

    @torch.no_grad()
    def search(
        self, features: torch.Tensor, k: int, *, backend: Literal["torch", "faiss"] = "torch"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features (Q, D) as the methods above give them → the k largest logits (Q, k), fp32, and their classes, int64; of equal
        ones the smaller class first (faiss: in no certain order). All rows are looked at."""
        if not 1 <= k <= self.facts["classes"]:
            raise UserError(
                f"--top {k}: the model has {self.facts['classes']} classes, so 1 to that many can be asked for"
            )
        search = self._by_faiss if backend == "faiss" else self._by_torch
        values, classes = search(features, k)
        return values * self.facts["scale"], classes

    def _by_torch(self, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        n, dim = self.rows.shape
        step = max(1, BLOCK_BYTES // (4 * (dim + 3 * len(features))))
        best = torch.empty(len(features), 0, dtype=torch.int64)
        for first in range(0, n, step):
            rows = torch.from_numpy(
                np.array(self.rows[first : first + step])
            )  # a copy: what is mapped cannot be written
            logits = features @ rows.T
            keys = torch.cat([best, keys_of(logits, torch.arange(first, first + len(rows)))], 1)
            best = keys.topk(min(k, keys.shape[1]), 1).values
        return values_and_ids(best)

    def _by_faiss(self, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            import faiss
        except ImportError as error:
            raise UserError("--backend faiss needs the package: pip install 'opencoder[faiss]'") from error
        values, classes = faiss.knn(features.numpy(), self.rows, k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(values), torch.from_numpy(classes)
