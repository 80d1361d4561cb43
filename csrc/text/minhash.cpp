// MinHash signatures of texts, bit-equal with datasketch 2.0 in the schemes `legacy` and `affine32`.
//
// A text arrives lower-cased, as UTF-8. Its tokens are its runs of word characters; they are written into one buffer with
// single spaces between, so that a shingle of n tokens is a slice of that buffer and nothing is copied per shingle. The
// permutations dominate (2048 of them): each tile of them stays in registers while all hashes of the text pass by.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "module.h"
#include "sha1.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

typedef uint32_t Lane32 __attribute__((vector_size(64)));
typedef uint64_t Lane64 __attribute__((vector_size(64)));

constexpr uint64_t kPrime = (uint64_t(1) << 61) - 1;
constexpr uint32_t kEmpty = 0xffffffffu;
constexpr uint64_t kBase = 0x9e3779b97f4a7c15ull;  // multiplier of the rolling hash (`fast`): odd, bits well spread

enum class Scheme { legacy, affine32, fast };

Scheme scheme_of(const std::string& name) {
    if (name == "legacy") return Scheme::legacy;
    if (name == "affine32") return Scheme::affine32;
    if (name == "fast") return Scheme::fast;
    throw std::invalid_argument("scheme must be legacy, affine32 or fast, not " + name);
}

uint32_t fmix32(uint32_t h) {  // MurmurHash3's finaliser
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}
uint64_t fmix64(uint64_t h) {
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

// min over hashes of a·h + b mod 2³², for num_perm padded to a multiple of 64.
CLONES void permute32(const uint32_t* a, const uint32_t* b, const uint32_t* hashes, size_t count, uint32_t* out, size_t perms) {
    for (size_t k = 0; k < perms; k += 64) {
        const auto* va = reinterpret_cast<const Lane32*>(a + k);
        const auto* vb = reinterpret_cast<const Lane32*>(b + k);
        const Lane32 a0 = va[0], a1 = va[1], a2 = va[2], a3 = va[3], b0 = vb[0], b1 = vb[1], b2 = vb[2], b3 = vb[3];
        Lane32 m0 = Lane32{} - 1, m1 = m0, m2 = m0, m3 = m0;
        for (size_t i = 0; i < count; ++i) {
            const Lane32 h = Lane32{} + hashes[i];
            const Lane32 v0 = a0 * h + b0, v1 = a1 * h + b1, v2 = a2 * h + b2, v3 = a3 * h + b3;
            m0 = v0 < m0 ? v0 : m0;
            m1 = v1 < m1 ? v1 : m1;
            m2 = v2 < m2 ? v2 : m2;
            m3 = v3 < m3 ? v3 : m3;
        }
        auto* o = reinterpret_cast<Lane32*>(out + k);
        o[0] = m0, o[1] = m1, o[2] = m2, o[3] = m3;
    }
}

// min over hashes of ((a·h + b mod 2⁶⁴) mod 2⁶¹−1) & 2³²−1; the product wraps first, as in datasketch.
CLONES void permute64(const uint64_t* a, const uint64_t* b, const uint32_t* hashes, size_t count, uint64_t* out, size_t perms) {
    for (size_t k = 0; k < perms; k += 32) {
        const auto* va = reinterpret_cast<const Lane64*>(a + k);
        const auto* vb = reinterpret_cast<const Lane64*>(b + k);
        Lane64 m[4];
        for (auto& x : m) x = Lane64{} + kEmpty;
        for (size_t i = 0; i < count; ++i) {
            const Lane64 h = Lane64{} + uint64_t(hashes[i]);
            for (int j = 0; j < 4; ++j) {
                const Lane64 v = va[j] * h + vb[j];
                Lane64 s = (v & kPrime) + (v >> 61);
                s = s >= kPrime ? s - kPrime : s;
                s &= 0xffffffffull;
                m[j] = s < m[j] ? s : m[j];
            }
        }
        auto* o = reinterpret_cast<Lane64*>(out + k);
        for (int j = 0; j < 4; ++j) o[j] = m[j];
    }
}

template <typename T>
struct Aligned {  // vector loads of 64 bytes need it
    explicit Aligned(size_t n) : storage(n + 64 / sizeof(T)), data(align(storage.data())) {}
    static T* align(T* p) { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63)); }
    std::vector<T> storage;
    T* data;
};

// Which code points are word characters (`\w` of Python's re), one byte each; handed over by Python once.
std::vector<uint8_t> word_table;

struct Tokens {
    std::string text;                             // tokens with one space between
    std::vector<std::pair<size_t, size_t>> spans;  // begin, end of each

    void read(std::string_view lowered) {
        text.clear();
        spans.clear();
        text.reserve(lowered.size() + 1);
        size_t begin = 0;
        bool inside = false;
        const auto* p = reinterpret_cast<const uint8_t*>(lowered.data());
        const size_t n = lowered.size();
        for (size_t i = 0; i < n;) {
            size_t length = 1;
            uint32_t c = p[i];
            if (c >= 0x80) c = decode(p + i, n - i, length);
            if (word_table[c]) {
                if (!inside) {
                    if (!spans.empty()) text.push_back(' ');
                    begin = text.size();
                    inside = true;
                }
                text.append(lowered.substr(i, length));
            } else if (inside) {
                spans.emplace_back(begin, text.size());
                inside = false;
            }
            i += length;
        }
        if (inside) spans.emplace_back(begin, text.size());
    }

    // The input is valid UTF-8 (surrogates allowed): Python made it.
    static uint32_t decode(const uint8_t* p, size_t left, size_t& length) {
        length = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
        if (length > left) throw std::invalid_argument("text is not valid UTF-8");
        uint32_t c = p[0] & (0xffu >> (length + 1));
        for (size_t j = 1; j < length; ++j) c = c << 6 | (p[j] & 0x3fu);
        if (c >= word_table.size()) throw std::invalid_argument("text is not valid UTF-8");
        return c;
    }
};

uint64_t token_hash(const char* p, size_t n) {  // FNV-1a, then mixed
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < n; ++i) h = (h ^ static_cast<uint8_t>(p[i])) * 0x100000001b3ull;
    return fmix64(h);
}

// 32-bit hashes of the distinct shingles. None for a text without tokens.
void shingle_hashes(const Tokens& tokens, size_t ngram, Scheme scheme, sha1::Block block, std::vector<uint32_t>& out) {
    out.clear();
    const size_t count = tokens.spans.size();
    if (count == 0) return;
    const size_t n = std::min(ngram, count);  // a short text is one shingle of all its tokens
    if (scheme == Scheme::fast) {
        std::vector<uint64_t> t(count);
        for (size_t i = 0; i < count; ++i)
            t[i] = token_hash(tokens.text.data() + tokens.spans[i].first, tokens.spans[i].second - tokens.spans[i].first);
        uint64_t top = 1, h = 0;  // h = Σ t[i+j]·base^(n−1−j); the leaving token's factor is base^(n−1)
        for (size_t j = 0; j + 1 < n; ++j) top *= kBase;
        for (size_t j = 0; j < n; ++j) h = h * kBase + t[j];
        out.push_back(static_cast<uint32_t>(fmix64(h)));
        for (size_t i = n; i < count; ++i) {
            h = (h - t[i - n] * top) * kBase + t[i];
            out.push_back(static_cast<uint32_t>(fmix64(h)));
        }
    } else {
        const auto* p = reinterpret_cast<const uint8_t*>(tokens.text.data());
        for (size_t i = 0; i + n <= count; ++i) {
            const size_t begin = tokens.spans[i].first, end = tokens.spans[i + n - 1].second;
            out.push_back(sha1::first_word(p + begin, end - begin, block));
        }
    }
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
}

using Params = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;

// Permutations ready for the kernels, padded to whole tiles.
struct Permutations {
    Permutations(const Params& a, const Params& b, Scheme scheme)
        : scheme(scheme), perms(a.size()), padded((a.size() + 63) / 64 * 64), a32(padded), b32(padded), a64(padded),
          b64(padded), out32(padded), out64(padded) {
        if (a.size() != b.size()) throw std::invalid_argument("a and b must have one length");
        for (size_t k = 0; k < perms; ++k) {
            a64.data[k] = a.data()[k], b64.data[k] = b.data()[k];
            a32.data[k] = static_cast<uint32_t>(a.data()[k]), b32.data[k] = static_cast<uint32_t>(b.data()[k]);
        }
    }
    void run(std::vector<uint32_t>& hashes, uint64_t* row64, uint32_t* row32) {
        if (scheme == Scheme::legacy) {
            permute64(a64.data, b64.data, hashes.data(), hashes.size(), out64.data, padded);
            std::copy(out64.data, out64.data + perms, row64);
        } else {
            if (scheme == Scheme::affine32)
                for (auto& h : hashes) h = fmix32(h);
            permute32(a32.data, b32.data, hashes.data(), hashes.size(), out32.data, padded);
            std::copy(out32.data, out32.data + perms, row32);
        }
    }
    Scheme scheme;
    size_t perms, padded;
    Aligned<uint32_t> a32, b32;
    Aligned<uint64_t> a64, b64;
    Aligned<uint32_t> out32;
    Aligned<uint64_t> out64;
};

std::vector<std::string_view> views_of(const py::sequence& items) {
    std::vector<std::string_view> views;
    for (const auto& item : items) {
        char* data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(item.ptr(), &data, &size) != 0) throw py::error_already_set();
        views.emplace_back(data, static_cast<size_t>(size));
    }
    return views;
}

template <typename Fill>
py::object rows(size_t documents, const Params& a, const Params& b, Scheme scheme, const Fill& fill) {
    Permutations permutations(a, b, scheme);
    const auto n = static_cast<py::ssize_t>(documents), k = static_cast<py::ssize_t>(permutations.perms);
    py::array_t<uint64_t> wide({scheme == Scheme::legacy ? n : 0, k});
    py::array_t<uint32_t> narrow({scheme == Scheme::legacy ? 0 : n, k});
    uint64_t* w = wide.mutable_data();
    uint32_t* s = narrow.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<uint32_t> hashes;
        for (size_t d = 0; d < documents; ++d) {
            fill(d, hashes);
            permutations.run(hashes, w + d * (scheme == Scheme::legacy) * permutations.perms,
                             s + d * (scheme != Scheme::legacy) * permutations.perms);
        }
    }
    if (scheme == Scheme::legacy) return wide;
    return narrow;
}

// lowered: list of bytes, each a lower-cased text in UTF-8.
py::object minhash_texts(const py::sequence& lowered, const Params& a, const Params& b, size_t ngram, const std::string& name) {
    if (word_table.empty()) throw std::runtime_error("set_word_table has not been called");
    if (ngram == 0) throw std::invalid_argument("ngram must be at least 1");
    const auto views = views_of(lowered);
    const Scheme scheme = scheme_of(name);
    Tokens tokens;
    const sha1::Block block = sha1::choose();
    return rows(views.size(), a, b, scheme, [&](size_t d, std::vector<uint32_t>& hashes) {
        tokens.read(views[d]);
        shingle_hashes(tokens, ngram, scheme, block, hashes);
    });
}

// sets: list of lists of bytes, the shingles of each document.
py::object minhash_shingles(const py::sequence& sets, const Params& a, const Params& b, const std::string& name) {
    const Scheme scheme = scheme_of(name);
    if (scheme == Scheme::fast) throw std::invalid_argument("scheme fast hashes tokens, not shingles; use legacy or affine32");
    std::vector<std::vector<std::string_view>> views;
    for (const auto& set : sets) views.push_back(views_of(py::reinterpret_borrow<py::sequence>(set)));
    const sha1::Block block = sha1::choose();
    return rows(views.size(), a, b, scheme, [&](size_t d, std::vector<uint32_t>& hashes) {
        hashes.clear();
        for (const auto& v : views[d])
            hashes.push_back(sha1::first_word(reinterpret_cast<const uint8_t*>(v.data()), v.size(), block));
    });
}

uint32_t sha1_first_word(const py::bytes& data, bool allow_ni) {
    const std::string_view v = data;
    return sha1::first_word(reinterpret_cast<const uint8_t*>(v.data()), v.size(), sha1::choose(allow_ni));
}

}  // namespace

void add_minhash(py::module_& m) {
    m.def("set_word_table", [](const py::bytes& table) {
        const std::string_view v = table;
        word_table.assign(v.begin(), v.end());
    });
    m.def("minhash_texts", &minhash_texts, py::arg("lowered"), py::arg("a"), py::arg("b"), py::arg("ngram"), py::arg("scheme"));
    m.def("minhash_shingles", &minhash_shingles, py::arg("sets"), py::arg("a"), py::arg("b"), py::arg("scheme"));
    m.def("sha1_first_word", &sha1_first_word, py::arg("data"), py::arg("allow_ni") = true);
}
