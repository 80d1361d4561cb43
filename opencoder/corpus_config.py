"""The configuration of `build-corpus`: everything that can be set, what it means, and its defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config_loading import Branch


class ArchiveConfig(Branch):
    """Limits on what an archive (tar, zip) or a git repository may unpack to. What goes beyond is reported as failed."""

    max_members: int = Field(1_000_000, ge=1)
    """Members of one archive, or entries of one commit's trees."""
    max_member_bytes: int = Field(1_000_000_000, ge=1)
    """A larger member is not unpacked. One between `max_bytes` and this is hashed and dropped for its size."""
    max_total_bytes: int = Field(1_000_000_000_000, ge=1)
    """Unpacked bytes of one archive; reading stops there."""
    max_ratio: float = Field(200.0, ge=1)
    """Unpacked bytes per packed byte, judged on a member or an archive once it has unpacked to 64 MiB. Source code packs
    3 to 10 times; deflate's limit is 1032."""


class NotebookConfig(Branch):
    """How Jupyter notebooks are read (docs/sources.md has the template)."""

    structured: bool = True
    """Turn .ipynb files into text of markdown, code and result cells. False: they are JSON files, of a type that is
    excluded."""
    max_output_chars: int = Field(2_000, ge=0)
    """Characters kept of the results of one cell; 0 leaves results out."""


class ReadConfig(Branch):
    """How inputs are taken apart."""

    containers: bool = False
    """Take jsonl, parquet, tar and zip files inside input folders apart too. Those named as an input always are."""
    git: bool = True
    """Read a folder that is a git repository from its HEAD commit. False: read the files that lie there, without .git."""
    archive: ArchiveConfig = ArchiveConfig()
    notebooks: NotebookConfig = NotebookConfig()
    min_stars: int | None = Field(None, ge=0)
    """Drop files whose repository has fewer stars, or of which the number is not known. None: no such rule."""
    repo_depth: int = Field(0, ge=0)
    """Leading folders of a path that name its repository, where the source names none: 2 for owner/name/…; 0: none."""
    split_bytes: int = Field(64_000_000, ge=1)
    """Larger jsonl (not compressed), parquet and zip files and git repositories are read by several tasks."""


class DedupConfig(Branch):
    """Exact and near-duplicate removal."""

    exact: bool = True
    fuzzy: bool = True
    preset: Literal["opencoder", "bigcode", "datatrove", "custom"] = "opencoder"
    """Bands × rows: opencoder 16×128, bigcode 25×10, datatrove 14×8; custom: `bands` and `rows`."""
    bands: int | None = Field(None, ge=1)
    rows: int | None = Field(None, ge=1)
    ngram: int = Field(5, ge=1)
    """Tokens per shingle."""
    scheme: Literal["affine32", "legacy", "fast"] = "affine32"
    seed: int = 1
    check_jaccard: float | None = Field(None, gt=0, le=1)
    """Least true Jaccard similarity of two files that are joined; None: LSH alone decides."""
    level: Literal["file", "repository", "chunk"] = "file"
    """What is one document: a file, a whole repository, or a chunk of `chunk_tokens` tokens of a file."""
    chunk_tokens: int = Field(4096, ge=1)
    """Tokens of a chunk, as docs/dedup.md defines them."""
    against: list[str] = []
    """Output folders of earlier builds: a file that one of them has is dropped, and so is a near-duplicate of one."""
    store_signatures: bool = False
    """Write signatures.parquet for later builds against this one. Every kept file then gets its whole signature."""


class RulesConfig(Branch):
    """Quality rules."""

    enabled: bool = True
    compat: bool = False
    """Reproduce the published filter with its defects (docs/rules.md lists them)."""


class SampleBudget(Branch):
    """How much of a language is kept; exactly one of the three."""

    max_bytes: int | None = Field(None, ge=0)
    """Bytes of text (SI: 200 GB is 200_000_000_000)."""
    max_tokens: int | None = Field(None, ge=0)
    """Tokens; estimated from `bytes_per_token` where they are not counted."""
    ratio: float | None = Field(None, ge=0, le=1)
    """Share of the language's bytes."""

    @model_validator(mode="after")
    def _one(self) -> SampleBudget:
        given = [name for name in ("max_bytes", "max_tokens", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of max_bytes, max_tokens and ratio, not {' and '.join(given) or 'none'}")
        return self


class SampleConfig(Branch):
    """Downsampling of over-represented languages, after all other stages."""

    enabled: bool = True
    budgets: dict[str, SampleBudget] = {
        "java": SampleBudget(max_bytes=200_000_000_000),
        "html": SampleBudget(max_bytes=64_000_000_000),
    }
    """Language → budget; other languages are kept whole. A mapping given here replaces the default, which is RefineCode's
    (arXiv:2411.04905: Java 449 → 200 GB, HTML 474 → 64 GB). It is an amount, not a share, so it does nothing to a corpus
    that is too small to be out of balance."""
    bytes_per_token: float = Field(4.0, gt=0)
    """For `max_tokens` without a column of counts. Vocabularies of 8 000 to 200 000 give 3.8 to 4.2 on code."""
    seed: int = 1


class TransformConfig(Branch):
    """Repair of small defects: copyright headers, personal data, licences. See docs/transform.md."""

    enabled: bool = True
    headers: bool = True
    """Take the copyright or licence comment at the head of a file out."""
    pii: tuple[Literal["key", "password", "email", "ip_address", "name"], ...] = (
        "key",
        "password",
        "email",
        "ip_address",
        "name",
    )
    """Kinds of personal data that are replaced by a placeholder; an empty list: none."""
    licences: tuple[str, ...] = ()
    """Allow-list: SPDX ids, or `permissive` for all permissive ones. Files under other licences are dropped. Empty: all stay."""
    unknown_licence: Literal["keep", "drop"] = "keep"
    """With an allow-list: what becomes of files whose licence is not known."""


class BenchmarkFields(Branch):
    """Names of the fields of a benchmark's jsonl file; of several, the first that a line has."""

    task_id: list[str] = ["task_id", "id", "question_id"]
    prompt: list[str] = ["prompt", "text", "question", "instruction"]
    solution: list[str] = ["canonical_solution", "solution", "code", "answer"]
    test: list[str] = ["test", "tests", "test_list"]
    """A string or a list of strings."""
    entry_point: list[str] = ["entry_point"]
    """Where absent: the last function that the solution defines and the tests mention."""


class DecontaminateConfig(Branch):
    """Removing or reporting documents that hold tasks of benchmarks (opencoder/corpus/decontaminate.py)."""

    against: list[str] = []
    """`humaneval` (extra `humaneval`) and files .jsonl, .jsonl.gz, .jsonl.zst. Empty: the step is off, so that a corpus does
    not depend on what happens to be installed."""
    action: Literal["drop", "report"] = "drop"
    ngram: int = Field(10, ge=2, le=64)
    """Tokens; a document that shares one n-gram with a task matches it."""
    sides: list[Literal["prompt", "solution", "test"]] = ["prompt", "solution", "test"]
    """Parts of a task whose n-grams count."""
    min_words: int = Field(3, ge=0)
    """An n-gram with fewer distinct tokens that do not begin with a digit does not count."""
    max_tasks: int = Field(10, ge=1)
    """An n-gram that more tasks share is boilerplate and does not count."""
    entry_points: Literal["definition", "word", "off"] = "definition"
    """Specific names of entry points: where a function of that name is defined, or (for tuning data) wherever it stands."""
    fields: BenchmarkFields = BenchmarkFields()


class EngineConfig(Branch):
    """Where the tasks of a build run (docs/engine.md). It changes nothing in the result."""

    executor: Literal["local", "ray", "array"] = "local"
    """local: processes of this machine. ray: a Ray cluster (extra `ray`). array: elements of a job array, Slurm's say."""
    memory_per_worker_mb: int | None = Field(None, ge=64)
    """local: MiB of resident memory above which a worker is ended; None: (0.9 · available − 512) / workers."""
    retries: int = Field(2, ge=0)
    """Further attempts for a task whose process was killed; the last has nothing beside it."""
    max_failures: int = Field(10, ge=1)
    """Failed tasks after which nothing new is started."""
    ray_address: str | None = None
    """ray: address of the cluster, or `auto`; None: RAY_ADDRESS, else one started on this machine."""
    array_count: int = Field(1, ge=1)
    """array: number of elements."""
    array_command: str | None = None
    """array: shell command that starts the elements and waits for them; {folder} and {count} are filled in. None: the
    driver says what to start by hand."""


class CorpusConfig(Branch):
    """The configuration of `build-corpus`."""

    max_bytes: int = Field(8_000_000, ge=1)
    """Files larger than this are dropped."""
    read: ReadConfig = ReadConfig()
    dedup: DedupConfig = DedupConfig()
    transform: TransformConfig = TransformConfig()
    rules: RulesConfig = RulesConfig()
    sample: SampleConfig = SampleConfig()

    decontaminate: DecontaminateConfig = DecontaminateConfig()
    engine: EngineConfig = EngineConfig()
    shard_bytes: int = Field(16_000_000, ge=1)
    """Input bytes per task."""
    seed: int = 1234
    """Chooses the samples shown in the report."""
    samples_per_rule: int = Field(3, ge=0)
