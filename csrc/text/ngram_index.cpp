// Which n-grams of reference texts (the tasks of a benchmark) occur in a document, and where.
//
// A document arrives lower-cased, as UTF-8. Tokens are its runs of word characters; a 64-bit hash of each is combined into
// a rolling hash over n of them. A bitmap of 32 bits per n-gram or more answers almost every position without a look into
// the table. A hit in the table is believed only after its tokens are compared with those of the reference, byte for byte.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "module.h"

namespace {

constexpr uint64_t kBase = 0x9e3779b97f4a7c15ull;  // multiplier of the rolling hash: odd, bits well spread

uint64_t mix(uint64_t h) {  // MurmurHash3's finaliser
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

struct Hasher {  // FNV-1a, then mixed
    uint64_t h = 0xcbf29ce484222325ull;
    void add(uint8_t byte) { h = (h ^ byte) * 0x100000001b3ull; }
    uint64_t done() const { return mix(h); }
};

uint64_t hash_of(std::string_view token) {
    Hasher hasher;
    for (const char c : token) hasher.add(static_cast<uint8_t>(c));
    return hasher.done();
}

struct Bitmap {
    explicit Bitmap(size_t entries, size_t per_entry) {
        size_t bits = 1 << 12;
        while (bits < entries * per_entry && bits < (size_t(1) << 33)) bits <<= 1;
        words.assign(bits / 64, 0);
        mask = bits - 1;
    }
    void set(uint64_t h) { words[(h & mask) / 64] |= uint64_t(1) << (h % 64); }
    bool test(uint64_t h) const { return words[(h & mask) / 64] >> (h % 64) & 1; }
    std::vector<uint64_t> words;
    uint64_t mask;
};

struct Span {  // of a token in the document
    size_t byte_begin, byte_end;
    int64_t char_begin, char_end;
};

struct Entry {
    uint64_t hash;
    int64_t key;           // what the n-gram counts for: task and side
    uint32_t ref, offset;  // where it stands
};

struct Run {  // n-grams of one key that overlap or touch in the document
    int64_t last = -1, count = 0, char_begin = 0, char_end = 0, ref = 0, offset = 0;
    bool open = false;
};

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

class NgramIndex {
public:
    // refs: tokens of each reference, joined by one space. rows: (n-grams, 3) of reference, token offset, key; keys < keys.
    // names: lower-cased tokens to be reported wherever they stand.
    NgramIndex(const py::bytes& word_table, size_t ngram, const py::sequence& refs, const Integers& rows, int64_t keys,
               const py::sequence& names)
        : ngram_(ngram), keys_(keys), grams_(static_cast<size_t>(rows.shape(0)), 32), name_bits_(py::len(names), 64) {
        if (ngram == 0) throw std::invalid_argument("ngram must be at least 1");
        if (rows.ndim() != 2 || rows.shape(1) != 3) throw std::invalid_argument("rows must be (n-grams, 3)");
        const std::string_view table = word_table;
        words_.assign(table.begin(), table.end());
        if (words_.size() < 0x110000) throw std::invalid_argument("the word table must have a byte per code point");
        for (size_t j = 0; j + 1 < ngram; ++j) top_ *= kBase;
        for (const auto& ref : refs) read_ref(std::string(py::reinterpret_borrow<py::bytes>(ref)));
        index(rows);
        size_t number = 0;
        for (const auto& name : names) {
            const uint64_t h = hash_of(std::string(py::reinterpret_borrow<py::bytes>(name)));
            name_bits_.set(h);
            names_.emplace(h, number++);
            name_texts_.push_back(std::string(py::reinterpret_borrow<py::bytes>(name)));
        }
    }

    // (runs, names, left out). runs: (r, 6) of key, first and last character (exclusive) in the lowered text, n-grams,
    // reference, token offset of the first; names: (m, 3) of name, first and last character. At most `most` runs.
    py::tuple check(const py::bytes& lowered, size_t most) const;

    size_t entries() const { return entries_.size(); }

private:
    struct Scan;

    static py::array_t<int64_t> as_rows(const std::vector<int64_t>& flat, py::ssize_t columns) {
        py::array_t<int64_t> rows({static_cast<py::ssize_t>(flat.size()) / columns, columns});
        std::copy(flat.begin(), flat.end(), rows.mutable_data());
        return rows;
    }

    void read_ref(std::string text) {
        std::vector<std::pair<uint32_t, uint32_t>> spans;
        for (size_t begin = 0; begin < text.size();) {
            const size_t end = std::min(text.find(' ', begin), text.size());
            spans.emplace_back(begin, end);
            begin = end + 1;
        }
        refs_.push_back(std::move(text));
        ref_spans_.push_back(std::move(spans));
    }

    std::string_view ref_token(size_t ref, size_t i) const {
        const auto [begin, end] = ref_spans_[ref][i];
        return std::string_view(refs_[ref]).substr(begin, end - begin);
    }

    void index(const Integers& rows) {
        const auto r = rows.unchecked<2>();
        entries_.reserve(static_cast<size_t>(r.shape(0)));
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
            const auto ref = static_cast<size_t>(r(i, 0)), offset = static_cast<size_t>(r(i, 1));
            if (ref >= refs_.size() || offset + ngram_ > ref_spans_[ref].size() || r(i, 2) < 0 || r(i, 2) >= keys_)
                throw std::invalid_argument("rows name an n-gram that does not exist");
            uint64_t h = 0;
            for (size_t j = 0; j < ngram_; ++j) h = h * kBase + hash_of(ref_token(ref, offset + j));
            h = mix(h);
            grams_.set(h);
            entries_.push_back({h, r(i, 2), static_cast<uint32_t>(ref), static_cast<uint32_t>(offset)});
        }
        std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
            return std::tie(a.hash, a.key, a.ref, a.offset) < std::tie(b.hash, b.key, b.ref, b.offset);
        });
        for (size_t i = 0; i < entries_.size(); ++i)
            if (i == 0 || entries_[i].hash != entries_[i - 1].hash) first_.emplace(entries_[i].hash, i);
    }

    size_t ngram_;
    int64_t keys_;
    uint64_t top_ = 1;
    std::vector<uint8_t> words_;
    std::vector<std::string> refs_;
    std::vector<std::vector<std::pair<uint32_t, uint32_t>>> ref_spans_;
    std::vector<Entry> entries_;                  // sorted by hash, key, reference, offset
    std::unordered_map<uint64_t, size_t> first_;  // hash -> first entry
    Bitmap grams_, name_bits_;
    std::unordered_map<uint64_t, size_t> names_;
    std::vector<std::string> name_texts_;
};

// One document on its way through the index.
struct NgramIndex::Scan {
    const NgramIndex& index;
    std::string_view text;
    size_t most;
    std::vector<int64_t>&runs, &found;
    int64_t& left_out;
    std::vector<Span> ring;        // the last n tokens
    std::vector<uint64_t> hashes;  // their hashes
    std::vector<Run> open;         // per key, made at the first hit
    std::vector<int64_t> touched;
    int64_t count = 0;  // tokens so far
    uint64_t rolling = 0;

    Scan(const NgramIndex& index, std::string_view text, size_t most, std::vector<int64_t>& runs, std::vector<int64_t>& found,
         int64_t& left_out)
        : index(index), text(text), most(most), runs(runs), found(found), left_out(left_out), ring(index.ngram_),
          hashes(index.ngram_) {}

    void run() {
        const auto* p = reinterpret_cast<const uint8_t*>(text.data());
        const size_t n = text.size();
        int64_t character = 0;
        bool inside = false;
        Hasher hasher;
        Span span{};
        for (size_t i = 0; i < n; ++character) {
            size_t length = 1;
            uint32_t c = p[i];
            if (c >= 0x80) c = decode(p + i, n - i, length);
            if (index.words_[c]) {
                if (!inside) {
                    hasher = Hasher();
                    span.byte_begin = i, span.char_begin = character;
                    inside = true;
                }
                for (size_t j = 0; j < length; ++j) hasher.add(p[i + j]);
            } else if (inside) {
                span.byte_end = i, span.char_end = character;
                token(span, hasher.done());
                inside = false;
            }
            i += length;
        }
        if (inside) {
            span.byte_end = n, span.char_end = character;
            token(span, hasher.done());
        }
        std::sort(touched.begin(), touched.end());
        for (const int64_t key : touched)
            if (open[static_cast<size_t>(key)].open) close(key);
    }

    void token(const Span& span, uint64_t h) {
        const size_t slot = static_cast<size_t>(count) % index.ngram_;
        if (index.name_bits_.test(h)) name(span, h);
        if (static_cast<size_t>(count) >= index.ngram_) rolling -= hashes[slot] * index.top_;
        rolling = rolling * kBase + h;
        hashes[slot] = h;
        ring[slot] = span;
        ++count;
        if (static_cast<size_t>(count) < index.ngram_) return;
        const uint64_t gram = mix(rolling);
        if (index.grams_.test(gram)) hits(gram, span);
    }

    void name(const Span& span, uint64_t h) {
        const auto at = index.names_.find(h);
        if (at == index.names_.end() || bytes(span) != index.name_texts_[at->second]) return;
        for (const int64_t x : {static_cast<int64_t>(at->second), span.char_begin, span.char_end}) found.push_back(x);
    }

    std::string_view bytes(const Span& span) const { return text.substr(span.byte_begin, span.byte_end - span.byte_begin); }

    bool equal(const Entry& entry) const {
        const size_t n = index.ngram_;
        for (size_t j = 0; j < n; ++j)
            if (bytes(ring[(static_cast<size_t>(count) - n + j) % n]) != index.ref_token(entry.ref, entry.offset + j)) return false;
        return true;
    }

    void hits(uint64_t gram, const Span& last) {
        const auto at = index.first_.find(gram);
        if (at == index.first_.end()) return;
        if (open.empty()) open.resize(static_cast<size_t>(index.keys_));
        const int64_t n = static_cast<int64_t>(index.ngram_), start = count - n;
        const int64_t char_begin = ring[static_cast<size_t>(start) % index.ngram_].char_begin;
        for (size_t i = at->second; i < index.entries_.size() && index.entries_[i].hash == gram; ++i) {
            const Entry& entry = index.entries_[i];
            Run& run = open[static_cast<size_t>(entry.key)];
            if (run.open && run.last == start) continue;  // the task has this n-gram twice
            if (!equal(entry)) continue;
            if (run.open && start > run.last + n) close(entry.key);
            if (!run.open) {
                touched.push_back(entry.key);
                run = Run{start, 0, char_begin, 0, entry.ref, entry.offset, true};
            }
            run.last = start, run.char_end = last.char_end, ++run.count;
        }
    }

    void close(int64_t key) {
        Run& run = open[static_cast<size_t>(key)];
        run.open = false;
        if (runs.size() / 6 >= most) {
            ++left_out;
            return;
        }
        for (const int64_t x : {key, run.char_begin, run.char_end, run.count, run.ref, run.offset}) runs.push_back(x);
    }

    // The text is UTF-8 (surrogates allowed): Python made it.
    uint32_t decode(const uint8_t* p, size_t left, size_t& length) const {
        length = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
        if (length > left) throw std::invalid_argument("text is not valid UTF-8");
        uint32_t c = p[0] & (0xffu >> (length + 1));
        for (size_t j = 1; j < length; ++j) c = c << 6 | (p[j] & 0x3fu);
        if (c >= index.words_.size()) throw std::invalid_argument("text is not valid UTF-8");
        return c;
    }
};

py::tuple NgramIndex::check(const py::bytes& lowered, size_t most) const {
    std::vector<int64_t> runs, found;
    int64_t left_out = 0;
    const std::string_view text = lowered;
    {
        py::gil_scoped_release release;
        Scan(*this, text, most, runs, found, left_out).run();
    }
    return py::make_tuple(as_rows(runs, 6), as_rows(found, 3), left_out);
}

}  // namespace

void add_ngram_index(py::module_& m) {
    py::class_<NgramIndex>(m, "NgramIndex")
        .def(py::init<const py::bytes&, size_t, const py::sequence&, const Integers&, int64_t, const py::sequence&>(),
             py::arg("word_table"), py::arg("ngram"), py::arg("refs"), py::arg("rows"), py::arg("keys"), py::arg("names"))
        .def("check", &NgramIndex::check, py::arg("lowered"), py::arg("most"))
        .def_property_readonly("entries", &NgramIndex::entries);
}
