// Words of a text and how much of it repeats.
//
// Words become numbers through one hash table. The places of each n-gram form a group; a group of (n-1)-grams falls into those
// of n-grams by the word that follows, and places that are left alone are let go: only where an (n-1)-gram repeats can an
// n-gram repeat. No n-gram is hashed or compared.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "counter.h"

namespace {

using text::View;

constexpr int kLongest = 10;                        // n-grams up to this length
constexpr int kTopFirst = 2, kTopLast = 4;          // most frequent n-gram
constexpr int kRepeatedFirst = 5;                   // share in repeated n-grams, up to kLongest

struct Words {
    std::vector<uint32_t> number;  // of each word of the text
    std::vector<uint32_t> length;  // in characters, of each distinct word
    text::Counter counter;

    // Adds the word in bytes [begin, begin + bytes) of `store`, `characters` long; 8 bytes follow.
    void add(const char* store, size_t begin, size_t bytes, uint32_t characters) {
        number.push_back(counter.add<true>(store, begin, bytes));
        if (counter.count.size() > length.size()) length.push_back(characters);
    }
    uint32_t count_at(size_t place) const { return counter.count[number[place]]; }
    uint32_t length_at(size_t place) const { return length[number[place]]; }
};

// Cuts normalised text into words. Deleted characters are gone before a word is looked at, so the characters of a word are
// first gathered in `store` (as UTF-8), which always has room for what comes.
class Reader {
public:
    explicit Reader(size_t size) : store(size + 128) {
        for (uint32_t c = 0; c < 0x80; ++c) {
            const uint16_t k = text::classes[c];
            kinds[c] = k & text::kDeleted ? kGone : k & (text::kSpaced | text::kSpace) ? kBlank : k & text::kPiece ? kLetters : kSigns;
            lowered[c] = c >= 'A' && c <= 'Z' ? char(c + 32) : char(c);
        }
        words.number.reserve(size / 6);
        words.counter.expect(size / 32);
    }
    // A whole text of ASCII without rare control characters: its words are runs of letters and digits. Their bounds come
    // as bits, 64 characters at a time, so that the processor need not guess where a word ends.
    bool plain(const uint8_t* p, size_t size) {
        bool rare = false;
        for (size_t i = 0; i < size; ++i) rare |= p[i] >= 0x7f || (p[i] < 0x20 && (p[i] < 9 || p[i] > 13));
        if (rare) return false;
        make_room(size + 64);
        std::vector<uint8_t> inside(size + 64);  // 1 for a letter or digit
        auto* out = reinterpret_cast<uint8_t*>(store.data());
        for (size_t i = 0; i < size; ++i) {
            const uint8_t c = p[i], small = c | 32;
            const bool letter = uint8_t(small - 'a') < 26;
            out[i] = letter ? small : c;
            inside[i] = letter | (uint8_t(c - '0') < 10);
        }
        size_t begin = 0;
        uint64_t before = 0;  // the last bit of the block before
        for (size_t block = 0; block <= size; block += 64) {
            uint64_t bits = 0;
            for (size_t j = 0; j < 64; j += 8) {
                uint64_t eight;
                std::memcpy(&eight, inside.data() + block + j, 8);
                bits |= (eight * 0x0102040810204080ull >> 56) << j;
            }
            uint64_t edges = bits ^ (bits << 1 | before);
            before = bits >> 63;
            for (; edges; edges &= edges - 1) {
                const auto bit = unsigned(__builtin_ctzll(edges));
                if (bits >> bit & 1)
                    begin = block + bit;
                else
                    words.add(store.data(), begin, block + bit - begin, uint32_t(block + bit - begin));
            }
        }
        return true;
    }
    template <typename Char>
    void ascii(const Char* p, const Char* end) {
        make_room(size_t(end - p));
        char* out = store.data() + filled;
        while (p != end) {
            const Kind kind = kinds[uint8_t(*p)];
            if (kind == kBlank || kind == kGone) {
                ++p;
                continue;
            }
            const char* word = out;
            do *out++ = lowered[uint8_t(*p++)];
            while (p != end && kinds[uint8_t(*p)] == kind);
            while (p != end && kinds[uint8_t(*p)] == kGone) {  // a word goes on behind what is deleted
                ++p;
                while (p != end && kinds[uint8_t(*p)] == kind) *out++ = lowered[uint8_t(*p++)];
            }
            words.add(store.data(), size_t(word - store.data()), size_t(out - word), uint32_t(out - word));
        }
        filled = size_t(out - store.data());
    }
    // Text that Python has lower-cased and normalised.
    template <typename Char>
    void normalised(const Char* p, const Char* end) {
        make_room(4 * size_t(end - p));
        while (p != end) {
            const Kind kind = kind_of(*p);
            if (kind == kBlank) {
                ++p;
                continue;
            }
            const size_t begin = filled;
            uint32_t characters = 0;
            for (; p != end && kind_of(*p) == kind; ++p, ++characters) put(*p);
            words.add(store.data(), begin, filled - begin, characters);
        }
    }
    // One word.
    template <typename Char>
    void word(const Char* p, const Char* end) {
        make_room(4 * size_t(end - p));
        const size_t begin = filled;
        for (const Char* c = p; c != end; ++c) put(*c);
        words.add(store.data(), begin, filled - begin, uint32_t(end - p));
    }
    Words words;

private:
    enum Kind : uint8_t { kBlank, kLetters, kSigns, kGone };
    static Kind kind_of(uint32_t c) {
        const uint16_t k = text::class_of(c);
        return k & text::kSpace ? kBlank : k & text::kPiece ? kLetters : kSigns;
    }
    void make_room(size_t bytes) {
        if (filled + bytes + 8 > store.size()) store.resize(2 * (filled + bytes) + 8);
    }
    void put(uint32_t c) {
        char* out = store.data() + filled;
        if (c < 0x80) {
            *out++ = char(c);
        } else if (c < 0x800) {
            *out++ = char(0xc0 | c >> 6);
        } else if (c < 0x10000) {
            *out++ = char(0xe0 | c >> 12);
            *out++ = char(0x80 | (c >> 6 & 0x3f));
        } else {
            *out++ = char(0xf0 | c >> 18);
            *out++ = char(0x80 | (c >> 12 & 0x3f));
            *out++ = char(0x80 | (c >> 6 & 0x3f));
        }
        if (c >= 0x80) *out++ = char(0x80 | (c & 0x3f));
        filled = size_t(out - store.data());
    }
    std::vector<char> store;
    size_t filled = 0;
    std::array<Kind, 128> kinds;
    std::array<char, 128> lowered;
};

struct Repetition {
    std::array<uint64_t, kTopLast - kTopFirst + 1> top{};
    std::array<uint64_t, kLongest - kRepeatedFirst + 1> repeated{};
};

class Ngrams {
public:
    explicit Ngrams(const Words& words) : words(words), depth(words.number.size()), seen(words.length.size()), place(words.length.size()) {}
    Repetition run() {
        Repetition found;
        by_word();
        for (size_t n = 2; n <= size_t(kLongest) && !groups.empty(); ++n) {
            extend(n);
            if (n <= size_t(kTopLast)) found.top[n - kTopFirst] = most_frequent(n);
        }
        cover(found);
        return found;
    }

private:
    struct Group {
        uint32_t begin, end;  // of the places in `order`
    };
    const Words& words;
    std::vector<uint8_t> depth;         // longest n for which the n-gram that begins at a word repeats, up to kLongest
    std::vector<uint32_t> seen, place;  // by word: how often in the group at hand, and where its next place goes
    std::vector<uint32_t> order, next_order;
    std::vector<Group> groups, next_groups;
    std::vector<uint32_t> touched;

    // Groups of 1-grams: the places of each word that occurs twice.
    void by_word() {
        for (uint32_t w = 0; w < words.length.size(); ++w) {
            const uint32_t count = words.counter.count[w], begin = groups.empty() ? 0 : groups.back().end;
            if (count < 2) continue;
            place[w] = begin;
            groups.push_back({begin, begin + count});
        }
        order.resize(groups.empty() ? 0 : groups.back().end);
        next_order.resize(order.size());
        for (uint32_t i = 0; i < words.number.size(); ++i)
            if (words.count_at(i) > 1) order[place[words.number[i]]++] = i;
    }

    // Splits each group of (n-1)-grams by the word that follows, and keeps the parts of two places and more.
    void extend(size_t n) {
        const size_t count = words.number.size();
        const uint32_t* follows = words.number.data() + n - 1;
        uint32_t filled = 0;
        next_groups.clear();
        for (const Group& g : groups) {
            // Places ascend in a group, so only its last ones can lie too near the end.
            uint32_t end = g.end;
            while (end > g.begin && order[end - 1] + n > count) --end;
            if (end - g.begin < 2) continue;
            if (end - g.begin == 2) {
                const uint32_t a = order[g.begin], b = order[g.begin + 1];
                if (follows[a] != follows[b]) continue;
                next_order[filled] = a, next_order[filled + 1] = b;
                next_groups.push_back({filled, filled + 2});
                filled += 2;
                continue;
            }
            touched.clear();
            for (uint32_t i = g.begin; i < end; ++i) {
                const uint32_t w = follows[order[i]];
                if (seen[w]++ == 0) touched.push_back(w);
            }
            for (const uint32_t w : touched) {
                if (seen[w] < 2) continue;
                place[w] = filled;
                next_groups.push_back({filled, filled + seen[w]});
                filled += seen[w];
            }
            for (uint32_t i = g.begin; i < end; ++i) {
                const uint32_t w = follows[order[i]];
                if (seen[w] >= 2) next_order[place[w]++] = order[i];
            }
            for (const uint32_t w : touched) seen[w] = 0;
        }
        for (uint32_t i = 0; i < filled; ++i) depth[next_order[i]] = uint8_t(n);
        order.swap(next_order);
        groups.swap(next_groups);
    }
    uint64_t most_frequent(size_t n) const {
        uint32_t most = 0, first = 0;  // of equals, the one that comes first in the text
        for (const Group& g : groups) {
            const uint32_t count = g.end - g.begin;
            if (count < most || (count == most && order[g.begin] > first)) continue;
            most = count;
            first = order[g.begin];
        }
        uint64_t characters = 0;
        for (size_t i = 0; i < n && most; ++i) characters += words.length_at(first + i);
        return characters * most;
    }
    void cover(Repetition& found) const {
        std::array<size_t, kLongest - kRepeatedFirst + 1> until{};  // words before it lie in a repeated n-gram
        for (size_t i = 0; i < depth.size(); ++i)
            for (size_t j = 0; j < until.size(); ++j) {
                if (depth[i] >= j + kRepeatedFirst) until[j] = i + j + kRepeatedFirst;
                if (i < until[j]) found.repeated[j] += words.length_at(i);
            }
    }
};

template <typename Char, typename Normal>
Words read(const View<Char>& view, const View<Normal>& normalised) {
    Reader reader(view.size);
    if constexpr (sizeof(Char) == 1)
        if (reader.plain(view.data, view.size)) return std::move(reader.words);
    size_t next = 0;  // of the normalised lines
    text::each_line(view, [&](size_t begin, size_t end) {
        const Char *p = view.data + begin, *q = view.data + end;
        if (std::all_of(p, q, [](Char c) { return c < 0x80; })) {
            reader.ascii(p, q);
        } else {
            const size_t stop = normalised.find('\n', next);
            reader.normalised(normalised.data + next, normalised.data + stop);
            next = stop + 1;
        }
    });
    return std::move(reader.words);
}

struct Counts {
    size_t words = 0, distinct = 0;
    uint64_t characters = 0;
    double entropy = 0;
    Repetition repetition;

    explicit Counts(const Words& read) : words(read.number.size()), distinct(read.counter.count.size()), repetition(Ngrams(read).run()) {
        double sum = 0;
        for (size_t i = 0; i < distinct; ++i) {
            const uint32_t times = read.counter.count[i];
            characters += uint64_t(times) * read.length[i];
            if (times > 1) sum += times * std::log(double(times));
        }
        if (words) entropy = std::max(0.0, std::log(double(words)) - sum / double(words));
    }
    py::tuple tuple() const {
        return py::make_tuple(words, characters, distinct, entropy, py::tuple(py::cast(repetition.top)),
                              py::tuple(py::cast(repetition.repeated)));
    }
};

// (words, characters, distinct, entropy, top, repeated); `normalised` is what Python makes of lines_to_normalise(str).
py::tuple count_words(const py::str& str, const py::str& normalised) {
    // Both views are taken with the lock held in turn; the inner call works without it.
    return text::with_view(str, [&](const auto& view) {
        py::gil_scoped_acquire lock;
        return text::with_view(normalised, [&](const auto& normal) { return Counts(read(view, normal)); });
    }).tuple();
}

// The same of a text in which each line is a word.
py::tuple count_word_lines(const py::str& str) {
    return text::with_view(str, [](const auto& view) {
        Reader reader(view.size);
        text::each_line(view, [&](size_t begin, size_t end) { reader.word(view.data + begin, view.data + end); });
        return Counts(reader.words);
    }).tuple();
}

}  // namespace

void add_words(py::module_& m) {
    m.def("count_words", &count_words, py::arg("text"), py::arg("normalised"));
    m.def("count_word_lines", &count_word_lines, py::arg("text"));
}
