"""The staging ablation at small scale: the broad set alone, the broad then the practical set, and both mixed.

The mixed run reads as many rows of each set as the two stages together, so the arms differ in order alone; all have one learning
rate. Measured is the mean loss of answers that no arm has read. It follows the table of arXiv:2411.04905 (three arms), not its scale:
sets, model and measure are ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from opencoder.checkpoint import folders, hf, native
from opencoder.config import ModelConfig
from opencoder.data.loader import BatchLoader
from opencoder.data.sft import Packing, build_sft_dataset
from opencoder.errors import DataError, Failure
from opencoder.files import atomic_open, atomic_path, write_json, write_text
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.model.initialise import build_model
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import placement_of
from opencoder.train.metrics import read_rows
from opencoder.train.step import inputs_of

from .from_code import BROAD, PRACTICAL, Limits, make_sets
from .preprocess import Job, preprocess_sft

CPU = torch.device("cpu")
SETS = (BROAD, PRACTICAL)
STAGE1, STAGE2, MIXED = "stage 1", "stage 1 then 2", "mixed"
ARMS = ("before", STAGE1, STAGE2, MIXED)


@dataclass(frozen=True)
class Setting:
    """What is compared."""

    model: str
    """Run, native checkpoint or Hugging Face folder, with a tokenizer."""
    inputs: tuple[str, ...]
    """Python code that the sets are made of."""
    broad: int = 1500
    """Conversations of the first set."""
    practical: int = 700
    held_out: int = 200
    """Conversations of each set that are measured on."""
    epochs: int = 3
    """Of the practical set; the broad one is read once."""
    seq_len: int = 512
    batch: int = 8
    """Rows per update."""
    lr: float = 1e-3
    seed: int = 1234
    threads: int | None = None
    """As train.threads."""


class Ablation:
    """Makes the sets, trains the arms that are not done, measures and draws."""

    def __init__(self, setting: Setting, output: str | Path) -> None:
        self.setting, self.output = setting, Path(output)
        self.model_config, self.tokenizer = model_and_tokenizer(Path(setting.model))
        longest = max(self.model_config.max_seq_len, setting.seq_len)
        self.model_config = self.model_config.model_copy(update={"max_seq_len": longest})
        self.rows: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """The result, which is also written as ablation.json with a picture beside it."""
        self._claim()
        datasets = self._datasets()
        s = self.setting
        steps = {BROAD: _steps(self.rows[BROAD], s.batch), PRACTICAL: _steps(s.epochs * self.rows[PRACTICAL], s.batch)}
        weights = {BROAD: self.rows[BROAD], PRACTICAL: s.epochs * self.rows[PRACTICAL]}
        runs = {
            STAGE1: self._train("stage1", {BROAD: 1.0}, steps[BROAD], s.model),
            STAGE2: self._train("stage2", {PRACTICAL: 1.0}, steps[PRACTICAL], str(self.output / "stage1")),
            MIXED: self._train("mixed", weights, sum(steps.values()), s.model),
        }
        folders_of = {"before": Path(s.model), **runs}
        losses = {arm: {kind: self._loss(folders_of[arm], kind) for kind in SETS} for arm in ARMS}
        result = {
            "setting": asdict(s),
            "datasets": datasets,
            "steps": {STAGE1: steps[BROAD], STAGE2: sum(steps.values()), MIXED: sum(steps.values())},
            "held_out_answer_loss": losses,
            "training_loss": {arm: [row["loss"] for row in read_rows(run / "metrics.jsonl")] for arm, run in runs.items()},
        }  # fmt: skip
        write_json(self.output / "ablation.json", result)
        draw(result, self.output / "ablation.png")
        return result

    def _claim(self) -> None:
        """A folder belongs to one setting: finished arms are not trained again."""
        marker, asked = self.output / "setting.json", json.loads(json.dumps(asdict(self.setting)))
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != asked:
            raise DataError(
                f"{self.output} holds an ablation with another setting: remove it, or choose another --output"
            )
        write_json(marker, asked)

    def _datasets(self) -> dict[str, Any]:
        """Four tokenised sets, chosen evenly out of what the code gives."""
        s, facts = self.setting, {}
        sets, _ = make_sets([Path(path) for path in s.inputs], Limits())
        for kind, most in ((BROAD, s.broad), (PRACTICAL, s.practical)):
            for name, n in ((kind, most), (f"{kind}.held-out", s.held_out)):
                chosen = evenly(sets[name], n)
                if not chosen:
                    raise Failure(
                        f"the code in {', '.join(s.inputs)} gives no conversation for the set {name}: give more"
                    )
                path = self.output / "sets" / f"{name}.jsonl"
                with atomic_open(path) as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
                job = Job((str(path),), str(self.tokenizer), s.seq_len, on_long="drop")
                made = preprocess_sft(job, self.output / "data" / name)
                self.rows[name] = made["packing"]["rows"]
                keys = ("documents", "tokens", "learned_tokens", "longer_than_context", "packing")
                facts[name] = {key: made[key] for key in keys}
        return facts

    def _train(self, name: str, weights: Mapping[str, float], steps: int, load: str) -> Path:
        s, run_dir = self.setting, self.output / name
        tree = {
            "run_dir": str(run_dir),
            "model": self.model_config.model_dump(exclude={"preset"}),
            "data": {
                "kind": "sft",
                "tokenizer": str(self.tokenizer),
                "blend": [{"prefix": str(self.output / "data" / kind), "weight": w} for kind, w in weights.items()],
                "seq_len": s.seq_len,
                "seed": s.seed,
            },
            "train": {
                "steps": steps,
                "global_batch_size": s.batch,
                "micro_batch_size": 1,
                "threads": s.threads,
                "bandwidth_check": False,
            },
            "optim": {
                "lr": s.lr,
                "min_lr": 0.0,
                "schedule": "cosine",
                "warmup_steps": min(steps // 10, 100),
                "betas": [0.9, 0.999],
                "weight_decay": 0.0,
            },
            "checkpoint": {"load": load, "keep": 1},
            "log": {"every": max(steps // 10, 1), "tensorboard": False},
        }
        config = self.output / f"{name}.yaml"
        write_text(config, yaml.safe_dump(tree, sort_keys=False))
        done = subprocess.run([sys.executable, "-m", "opencoder.train", str(config)], check=False)
        if done.returncode:
            raise Failure(
                f"training with {config} ended with status {done.returncode}; the same command goes on from there"
            )
        return run_dir

    def _loss(self, folder: Path, kind: str) -> float:
        model = load_model(folder, self.model_config)
        prefix = str(self.output / "data" / f"{kind}.held-out")
        return answer_loss(model, prefix, seq_len=self.setting.seq_len)


def _steps(rows: int, batch: int) -> int:
    return max(2, round(rows / batch))


def evenly(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """At most `n` rows, as far apart from one another as possible."""
    if n >= len(rows):
        return rows
    return [rows[i * len(rows) // n] for i in range(n)]


def model_and_tokenizer(folder: Path) -> tuple[ModelConfig, Path]:
    """What a checkpoint is of, and where its tokenizer lies. Raises DataError if it has none."""
    if hf.is_hf_folder(folder):
        config, tokenizer = hf.read_model_config(folder), folder
    else:
        found = folders.resolve(folder)
        config, tokenizer = native.read_config(found).model, found / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        raise DataError(f"{folder} carries no tokenizer: train with data.tokenizer set, or copy tokenizer.json there")
    return config, tokenizer


def load_model(folder: Path, config: ModelConfig) -> Decoder:
    """The model in fp32 on the CPU."""
    model = build_model(config, Mesh(), dtype=torch.float32, device=CPU, seed=0)
    tensors = {key: (p, placement_of(p)) for key, p in named_parameters(model).items()}
    if hf.is_hf_folder(folder):
        hf.load_weights(folder, tensors, Mesh())
    else:
        native.load_tensors(folders.resolve(folder), tensors, Mesh())
    return model.eval()


@torch.no_grad()
def answer_loss(model: Decoder, prefix: str, *, seq_len: int, micro_batch: int = 4) -> float:
    """Mean loss, in nats, of the targets of a dataset, every conversation once."""
    packing = Packing(epochs=1)
    options: dict[str, Any] = {"seq_len": seq_len, "seed": 0, "packing": packing}
    rows = len(build_sft_dataset([(prefix, 1.0)], num_rows=0, **options).members[0])
    size = -(-rows // micro_batch) * micro_batch
    dataset = build_sft_dataset([(prefix, 1.0)], num_rows=size, **options)
    loader = BatchLoader(dataset, global_batch_size=micro_batch, micro_batch_size=micro_batch, document_mask=True)
    total, count = 0.0, 0
    for (mb,) in loader:
        tokens, labels, documents = inputs_of(mb, CPU)
        total += float(model.loss(tokens, labels, documents)[0])
        count += int((labels >= 0).sum())
    return total / count


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the held-out losses, and the losses while training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses, colours = result["held_out_answer_loss"], {BROAD: "#8c8c8c", PRACTICAL: "#1b6ca8"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, kind in enumerate(SETS):
        at = [x + (i - 0.5) * 0.38 for x in range(len(ARMS))]
        bars = left.bar(at, [losses[arm][kind] for arm in ARMS], 0.36, label=f"{kind} set", color=colours[kind])
        left.bar_label(bars, fmt="%.2f", fontsize=8)
    left.set_xticks(range(len(ARMS)), ARMS)
    left.set_ylabel("held-out answer loss, nats per token")
    left.margins(y=0.1)
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # above, where it hides nothing
    stage1, stage2, mixed = (result["training_loss"][arm] for arm in (STAGE1, STAGE2, MIXED))
    right.plot(range(1, len(stage1) + 1), stage1, color="#8c8c8c", label=STAGE1)
    right.plot(range(len(stage1) + 1, len(stage1) + len(stage2) + 1), stage2, color="#1b6ca8", label="then stage 2")
    right.plot(range(1, len(mixed) + 1), mixed, color="#c23b22", label=MIXED, linewidth=1)
    right.set_xlabel("update")
    right.set_ylabel("training loss, nats per target")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
