"""MinHash against datasketch and a plain reading of the definition, C++ and fallback."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus import minhash
from opencoder.native import text_engine

pytestmark = pytest.mark.fast
needs_engine = pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")


LEVELS = (0, 1, 2)
"""Plain code, SHA instructions, AVX-512; a processor without one repeats the level below."""


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    if text_engine() is None:
        pytest.skip("the C++ text engine was not built")
    yield text_engine().limit_cpu(request.param)
    text_engine().limit_cpu(max(LEVELS))


@pytest.mark.parametrize(
    ("scheme", "golden"),
    [
        ("legacy", [228630785, 216833891, 617530111, 2362600675]),
        ("affine32", [625790555, 194865109, 1355773502, 1324736089]),
    ],
)
def test_golden_vectors(engine: str, scheme: str, golden: list[int]) -> None:
    found = minhash.signatures_of_shingles([{b"hello", b"world"}], num_perm=4, scheme=scheme, seed=1)
    assert found.tolist() == [golden]


def by_datasketch(text: str, num_perm: int, ngram: int, scheme: str, seed: int) -> list[int]:
    sketch = MinHash(num_perm=num_perm, seed=seed, scheme=scheme)
    if items := list(minhash.shingles(text, ngram)):
        sketch.update_batch(items)
    return list(map(int, sketch.hashvalues))


TRICKY = [
    "",
    " \n\t",
    "one",
    "a b c d",
    "İstanbul ΣΑΣ ς ǅ ß",
    "naïve_x ２３ ½ 中文 字 _a",
    "x\u0301y\u200bz",
    "a-b_c.d\x00e",
    "😀 a 😀",
]


def test_golden_vectors_at_every_level(level: int) -> None:
    for scheme, golden in (
        ("legacy", [228630785, 216833891, 617530111, 2362600675]),
        ("affine32", [625790555, 194865109, 1355773502, 1324736089]),
    ):
        assert minhash.signatures_of_shingles([{b"hello", b"world"}], num_perm=4, scheme=scheme).tolist() == [golden]


@pytest.mark.parametrize("scheme", ["legacy", "affine32"])
def test_texts_equal_datasketch(engine: str, scheme: str) -> None:
    found = minhash.signatures(TRICKY, num_perm=37, ngram=3, scheme=scheme, seed=42)
    assert found.tolist() == [by_datasketch(t, 37, 3, scheme, 42) for t in TRICKY]


def tricky_texts() -> st.SearchStrategy[str]:
    """Runs of ASCII long enough for whole registers between characters with rules of their own."""
    ascii_run = st.text("aZ_9 .\n\x00", max_size=150)
    odd = st.sampled_from(["İ", "Σ", "ΑΣ", "Σ.Α", "ẞ", "é", "Ⱥ", "𐐀", "\ud800", "\u0307", "ǅ", "中"])
    return st.lists(ascii_run | odd | st.text(max_size=5), max_size=8).map("".join)


@needs_engine
@pytest.mark.parametrize("limit", LEVELS)
@given(st.text(max_size=200) | tricky_texts(), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_any_text_equals_datasketch(limit: int, text: str, ngram: int) -> None:
    try:
        text_engine().limit_cpu(limit)
        for scheme in ("affine32", "legacy"):
            found = minhash.signatures([text], num_perm=8, ngram=ngram, scheme=scheme, seed=1)
            assert found[0].tolist() == by_datasketch(text, 8, ngram, scheme, 1)
    finally:
        text_engine().limit_cpu(max(LEVELS))


@needs_engine
def test_lower_case_is_a_map_of_code_points_but_for_the_capital_sigma() -> None:
    """What the C++ tokeniser relies on: one code point's lower case says all, and lowering twice changes nothing."""
    points = [chr(i) for i in range(0x110000) if chr(i) != "Σ"]
    lower = [c.lower() for c in points]
    assert "".join(f"A{c}B" for c in points).lower() == "".join(f"a{low}b" for low in lower)
    for c, low in zip(points, lower, strict=True):
        if c != low:
            assert low.lower() == low
            assert len(low.encode()) <= 1.5 * len(c.encode())


def test_arrow_columns_are_read_as_lists_are(engine: str) -> None:
    texts = ["zero", *TRICKY, None, "last one ΣΑΣ"]
    plain = [text or "" for text in texts[1:]]
    for kind in (pa.string(), pa.large_string()):
        column = pa.array(texts, kind).slice(1)
        for given_as in (column, pa.chunked_array([column.slice(0, 4), column.slice(4)])):
            found = minhash.signatures(given_as, num_perm=16, ngram=2)
            assert found.tolist() == minhash.signatures(plain, num_perm=16, ngram=2).tolist()
    assert minhash.signatures(pa.array([], pa.string()), num_perm=16, ngram=2).shape == (0, 16)


def test_repeated_shingles_change_nothing_at_any_length(level: int) -> None:
    draw = random.Random(5)
    text = " ".join(draw.choice("abcdefgh") for _ in range(3000))
    for perms in (64, 1000):
        found = minhash.signatures([text], num_perm=perms, ngram=4)
        assert found.tolist() == [by_datasketch(text, perms, 4, "affine32", 1)]


def test_legacy_next_to_multiples_of_the_prime(level: int) -> None:
    """Sums chosen so that the product lands on, before and after multiples of 2^61-1 and 2^61, and on 2^32-1."""
    prime, shingle = (1 << 61) - 1, b"hello"
    h = int.from_bytes(hashlib.sha1(shingle).digest()[:4], "little")
    wanted = [
        (q << 61) + r
        for q in range(8)
        for r in [0, 1, 2, 9, (1 << 32) - 1, (1 << 32) - 2, 5 << 40, *range(prime - 9, prime + 1)]
    ]
    a = np.array([0x2468ACE013579BDF + 97 * i & prime for i in range(len(wanted))], np.uint64)
    b = np.array([(w - int(x) * h) % (1 << 64) for w, x in zip(wanted, a, strict=True)], np.uint64)
    found = text_engine().minhash_shingles([[shingle]], a, b, "legacy")
    assert found[0].tolist() == [w % prime & 0xFFFFFFFF for w in wanted]


@needs_engine
@given(st.text(max_size=120), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_fast_scheme_is_the_same_in_both_versions(text: str, ngram: int) -> None:
    a, b = minhash.permutations(16, "affine32", 1)
    found = minhash.signatures([text], num_perm=16, ngram=ngram, scheme="fast", seed=1)
    assert found[0].tolist() == minhash._fast_row(text, ngram, a, b).tolist()


def test_sha1_of_every_length_at_every_level(level: int) -> None:
    draw = random.Random(0)
    messages = [draw.randbytes(n) for n in [*range(300), 516, 700, 1000, *[37] * 16, *[60] * 33]]
    found = text_engine().sha1_first_words(messages)
    assert found == [int.from_bytes(hashlib.sha1(m).digest()[:4], "little") for m in messages]


def test_share_of_equal_slots_estimates_jaccard(engine: str) -> None:
    words = [f"w{i}" for i in range(400)]
    a, b = " ".join(words[:300]), " ".join(words[100:])
    x, y = minhash.shingles(a, 5), minhash.shingles(b, 5)
    truth = len(x & y) / len(x | y)
    for scheme in minhash.SCHEMES:
        perms = 512 if engine == "fallback" else 2048
        found = minhash.signatures([a, b], num_perm=perms, ngram=5, scheme=scheme, seed=1)
        share = float((found[0] == found[1]).mean())
        assert abs(share - truth) < 4 * np.sqrt(truth * (1 - truth) / perms), scheme


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="scheme='sha'; allowed: affine32, legacy, fast"):
        minhash.signatures([], num_perm=4, ngram=5, scheme="sha")
    with pytest.raises(ValueError, match="num_perm=0"):
        minhash.signatures([], num_perm=0, ngram=5)
    with pytest.raises(ValueError, match="fast hashes tokens"):
        minhash.signatures_of_shingles([], num_perm=4, scheme="fast")
