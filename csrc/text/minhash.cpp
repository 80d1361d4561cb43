// MinHash signatures of texts, bit-equal with datasketch 2.0 in the schemes `legacy` and `affine32`, and band keys for LSH.
#include "minhash.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "jaccard.h"
#include "module.h"
#include "texts.h"

namespace {

using Params = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;
using minhash::Scheme;

// From this many permutations on, a repeated shingle costs more than finding out that it is one.
constexpr size_t kWorthFiltering = 256;

void check_ready() {
    if (tokens::tables.word.empty()) throw std::runtime_error("set_tables has not been called");
}

minhash::Permutations permutations_of(const Params& a, const Params& b, Scheme scheme) {
    if (a.size() != b.size()) throw std::invalid_argument("a and b must have one length");
    return {a.data(), b.data(), static_cast<size_t>(a.size()), scheme};
}

// (documents, perms), uint64 for legacy as in datasketch.
template <typename Hashes>
py::object signature_rows(size_t documents, const Params& a, const Params& b, Scheme scheme, const Hashes& hashes_of) {
    auto permutations = permutations_of(a, b, scheme);
    const size_t perms = permutations.size();
    const bool wide = scheme == Scheme::legacy;
    const auto n = static_cast<py::ssize_t>(documents), k = static_cast<py::ssize_t>(perms);
    py::array_t<uint64_t> rows64({wide ? n : 0, k});
    py::array_t<uint32_t> rows32({wide ? 0 : n, k});
    uint64_t* out64 = rows64.mutable_data();
    uint32_t* out32 = rows32.mutable_data();
    {
        py::gil_scoped_release release;
        for (size_t d = 0; d < documents; ++d) {
            const uint32_t* row = permutations.run(hashes_of(d), 0, perms);
            if (wide) std::copy(row, row + perms, out64 + d * perms);
            else std::copy(row, row + perms, out32 + d * perms);
        }
    }
    if (wide) return rows64;
    return rows32;
}

py::object minhash_texts(const py::object& given, const Params& a, const Params& b, size_t ngram, const std::string& name) {
    check_ready();
    const Texts texts(given);
    const Scheme scheme = minhash::scheme_of(name);
    minhash::Shingler shingler(scheme, ngram, static_cast<size_t>(a.size()) >= kWorthFiltering);
    return signature_rows(texts.size(), a, b, scheme, [&](size_t d) -> auto& { return shingler.hashes(texts[d]); });
}

// sets: list of lists of bytes, the shingles of each document.
py::object minhash_shingles(const py::sequence& sets, const Params& a, const Params& b, const std::string& name) {
    const Scheme scheme = minhash::scheme_of(name);
    if (scheme == Scheme::fast) throw std::invalid_argument("scheme fast hashes tokens, not shingles; use legacy or affine32");
    std::vector<std::vector<std::string_view>> views;
    for (const auto& set : sets) {
        views.emplace_back();
        for (const auto& item : py::reinterpret_borrow<py::sequence>(set)) {
            char* data;
            Py_ssize_t size;
            if (PyBytes_AsStringAndSize(item.ptr(), &data, &size) != 0) throw py::error_already_set();
            views.back().emplace_back(data, static_cast<size_t>(size));
        }
    }
    minhash::Shingler shingler(scheme, 1, false);
    return signature_rows(views.size(), a, b, scheme, [&](size_t d) -> auto& { return shingler.hashes(views[d]); });
}

// Writes the keys of the wanted bands of one document: the first `width` 64-bit words of the SHA-1 of the band's number and
// its slots, all as little-endian 32-bit numbers (the machines this builds for are little-endian). Never all zero: that
// means "no key".
class BandKeys {
public:
    BandKeys(size_t bands, size_t rows, size_t width) : bands_(bands), rows_(rows), width_(width), messages_(bands * (rows + 1)) {}

    void write(minhash::Permutations& permutations, const std::vector<uint32_t>& hashes, const bool* wanted, uint64_t* out) {
        if (hashes.empty()) return;
        for (size_t band = 0; band < bands_;) {
            if (wanted != nullptr && !wanted[band]) {
                ++band;
                continue;
            }
            size_t end = band + 1;  // neighbours go through the permutations together
            while (end < bands_ && (wanted == nullptr || wanted[end])) ++end;
            const uint32_t* slots = permutations.run(hashes, band * rows_, end * rows_);
            for (; band < end; ++band) {
                uint32_t* message = messages_.data() + band * (rows_ + 1);
                message[0] = static_cast<uint32_t>(band);
                std::copy(slots + band * rows_, slots + (band + 1) * rows_, message + 1);
            }
        }
        const size_t width = width_;
        auto store = [out, width](size_t band, const uint32_t* state) {
            const uint64_t a = sha1::swap_bytes(state[0]) | uint64_t(sha1::swap_bytes(state[1])) << 32;
            out[band * width] = a == 0 ? 1 : a;
            if (width == 2) out[band * width + 1] = sha1::swap_bytes(state[2]) | uint64_t(sha1::swap_bytes(state[3])) << 32;
        };
        sha1::Queue queue(store);
        for (size_t band = 0; band < bands_; ++band)
            if (wanted == nullptr || wanted[band])
                queue.add(reinterpret_cast<const uint8_t*>(messages_.data() + band * (rows_ + 1)), 4 * (rows_ + 1), band);
        queue.finish();
    }

private:
    size_t bands_, rows_, width_;
    std::vector<uint32_t> messages_;
};

// (documents, bands, width) keys; zero for a text without tokens and for a band that is not wanted. `a` and `b` have
// bands · rows entries. wanted: (documents, bands) of bool, or None for all.
py::object minhash_keys(const py::object& given, const Params& a, const Params& b, size_t ngram, const std::string& name,
                        size_t bands, const py::object& wanted, size_t width) {
    check_ready();
    const Texts texts(given);
    const Scheme scheme = minhash::scheme_of(name);
    if (bands == 0 || a.size() == 0 || static_cast<size_t>(a.size()) % bands != 0)
        throw std::invalid_argument("the permutations must be a multiple of the bands");
    if (width != 1 && width != 2) throw std::invalid_argument("width must be 1 or 2");
    const size_t rows = static_cast<size_t>(a.size()) / bands;
    py::array_t<bool, py::array::c_style | py::array::forcecast> mask;
    if (!wanted.is_none()) {
        mask = wanted.cast<decltype(mask)>();
        if (mask.ndim() != 2 || static_cast<size_t>(mask.shape(0)) != texts.size() || static_cast<size_t>(mask.shape(1)) != bands)
            throw std::invalid_argument("wanted must be (documents, bands)");
    }
    const bool* want = wanted.is_none() ? nullptr : mask.data();
    py::array_t<uint64_t> keys({texts.size(), bands, width});
    uint64_t* out = keys.mutable_data();
    {
        py::gil_scoped_release release;
        auto permutations = permutations_of(a, b, scheme);
        minhash::Shingler shingler(scheme, ngram, permutations.size() >= kWorthFiltering);
        BandKeys band_keys(bands, rows, width);
        std::fill(out, out + texts.size() * bands * width, 0);
        for (size_t d = 0; d < texts.size(); ++d) {
            const bool* row = want == nullptr ? nullptr : want + d * bands;
            if (row != nullptr && std::none_of(row, row + bands, [](bool x) { return x; })) continue;
            band_keys.write(permutations, shingler.hashes(texts[d]), row, out + d * bands * width);
        }
    }
    return keys;
}

// (pairs,) true Jaccard similarity of the shingle sets of the two texts of each pair.
py::object jaccard_pairs(const py::object& given, const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& pairs,
                         size_t ngram) {
    check_ready();
    const Texts texts(given);
    if (ngram == 0) throw std::invalid_argument("ngram must be at least 1");
    if (pairs.ndim() != 2 || pairs.shape(1) != 2) throw std::invalid_argument("pairs must be (pairs, 2)");
    const auto n = static_cast<size_t>(pairs.shape(0));
    const int64_t* p = pairs.data();
    for (size_t i = 0; i < 2 * n; ++i)
        if (p[i] < 0 || static_cast<size_t>(p[i]) >= texts.size()) throw std::invalid_argument("a pair names no text");
    py::array_t<double> found(static_cast<py::ssize_t>(n));
    double* out = found.mutable_data();
    {
        py::gil_scoped_release release;
        const jaccard::Sets sets(texts, ngram);
        for (size_t i = 0; i < n; ++i) out[i] = sets.similarity(static_cast<size_t>(p[2 * i]), static_cast<size_t>(p[2 * i + 1]));
    }
    return found;
}

// word: one byte per code point; lower: list of (code point, lower case as a list of code points) where it differs.
void set_tables(const py::bytes& word, const std::vector<std::pair<uint32_t, std::u32string>>& lower) {
    tokens::Tables t;
    const std::string_view v = word;
    t.word.assign(v.begin(), v.end());
    if (t.word.size() < 128) throw std::invalid_argument("word must have a byte for each code point");
    for (const auto& [from, to] : lower) {
        if (from >= t.word.size() || to.empty()) throw std::invalid_argument("lower names a code point beyond Unicode");
        while (t.lower.size() <= from) t.lower.push_back(static_cast<uint32_t>(t.lower.size()));
        if (to.size() == 1) {
            t.lower[from] = to[0];
        } else {
            t.lower[from] = tokens::Tables::kSeveral | static_cast<uint32_t>(t.several.size());
            t.several.push_back(to);
        }
    }
    for (uint32_t c = 0; c < 128; ++c) {
        const uint32_t low = c < t.lower.size() ? t.lower[c] : c;
        t.ascii[c] = t.word[c] ? static_cast<uint8_t>(low) : 0;
    }
    tokens::tables = std::move(t);
}

// First four bytes of each digest as a little-endian number.
std::vector<uint32_t> sha1_first_words(const std::vector<std::string>& messages) {
    std::vector<uint32_t> out(messages.size());
    auto store = [&out](size_t i, const uint32_t* state) { out[i] = sha1::swap_bytes(state[0]); };
    sha1::Queue queue(store);
    for (size_t i = 0; i < messages.size(); ++i)
        queue.add(reinterpret_cast<const uint8_t*>(messages[i].data()), messages[i].size(), i);
    queue.finish();
    return out;
}

}  // namespace

void add_minhash(py::module_& m) {
    m.def("set_tables", &set_tables, py::arg("word"), py::arg("lower"));
    m.def("minhash_texts", &minhash_texts, py::arg("texts"), py::arg("a"), py::arg("b"), py::arg("ngram"), py::arg("scheme"));
    m.def("minhash_shingles", &minhash_shingles, py::arg("sets"), py::arg("a"), py::arg("b"), py::arg("scheme"));
    m.def("minhash_keys", &minhash_keys, py::arg("texts"), py::arg("a"), py::arg("b"), py::arg("ngram"), py::arg("scheme"),
          py::arg("bands"), py::arg("wanted"), py::arg("width"));
    m.def("jaccard_pairs", &jaccard_pairs, py::arg("texts"), py::arg("pairs"), py::arg("ngram"));
    m.def("sha1_first_words", &sha1_first_words, py::arg("messages"));
    // 0 plain, 1 with SHA instructions, 2 with AVX-512; never above what the processor has. Returns the level in force.
    m.def("limit_cpu", [](int limit) { return cpu::level = std::min(limit, cpu::detect()); }, py::arg("limit"));
}
