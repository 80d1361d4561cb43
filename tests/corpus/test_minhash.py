"""MinHash against datasketch and a plain reading of the definition, C++ and fallback."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus import minhash
from opencoder.native import text_engine

pytestmark = pytest.mark.fast
needs_engine = pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")


@pytest.fixture(params=["cpp", "fallback"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and text_engine() is None:
        pytest.skip("the C++ text engine was not built")
    if request.param == "fallback":
        monkeypatch.setattr(minhash, "_engine", lambda: None)
    return str(request.param)


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


@pytest.mark.parametrize("scheme", ["legacy", "affine32"])
def test_texts_equal_datasketch(engine: str, scheme: str) -> None:
    found = minhash.signatures(TRICKY, num_perm=37, ngram=3, scheme=scheme, seed=42)
    assert found.tolist() == [by_datasketch(t, 37, 3, scheme, 42) for t in TRICKY]


@needs_engine
@given(st.text(max_size=200), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_any_text_equals_datasketch(text: str, ngram: int) -> None:
    found = minhash.signatures([text], num_perm=8, ngram=ngram, scheme="affine32", seed=1)
    assert found[0].tolist() == by_datasketch(text, 8, ngram, "affine32", 1)


@needs_engine
@given(st.text(max_size=120), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_fast_scheme_is_the_same_in_both_versions(text: str, ngram: int) -> None:
    a, b = minhash.permutations(16, "affine32", 1)
    found = minhash.signatures([text], num_perm=16, ngram=ngram, scheme="fast", seed=1)
    assert found[0].tolist() == minhash._fast_row(text, ngram, a, b).tolist()


@needs_engine
def test_sha1_of_every_length_in_both_versions() -> None:
    draw = random.Random(0)
    for n in [*range(130), 1000]:
        data = draw.randbytes(n)
        truth = int.from_bytes(hashlib.sha1(data).digest()[:4], "little")
        assert text_engine().sha1_first_word(data) == truth
        assert text_engine().sha1_first_word(data, allow_ni=False) == truth


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
