// Counts over prose; the definition stands in opencoder/corpus/signals/prose.py.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <unordered_set>

#include "counter.h"

namespace {

using text::View;
using CodePoints = std::vector<uint32_t>;

struct Prose {
    size_t sentences = 0, separators = 0, link_characters = 0, tag_characters = 0, bullet_lines = 0, read_more_lines = 0,
           raw_words = 0, capital_words = 0, brackets = 0, stop_words = 0, filled_lines = 0, filled_characters = 0,
           repeated_lines = 0, repeated_characters = 0;
};

// Short words without capitals or signs, as 16 bytes each.
class WordSet {
public:
    static constexpr size_t kLongest = 15;
    using Key = std::pair<uint64_t, uint64_t>;

    explicit WordSet(const std::vector<std::string>& words) : slots(4096) {
        for (const auto& word : words) {
            if (word.empty() || word.size() > kLongest) throw std::invalid_argument("stop words have 1 to 15 letters: " + word);
            slots[find(key(word.data(), word.size()))] = key(word.data(), word.size());
        }
    }
    template <typename Char>
    static Key key(const Char* p, size_t n) {
        std::array<char, 16> bytes{};
        std::copy(p, p + n, bytes.begin());
        Key k;
        std::memcpy(&k.first, bytes.data(), 8);
        std::memcpy(&k.second, bytes.data() + 8, 8);
        return k;
    }
    bool holds(const Key& k) const { return slots[find(k)] == k; }

private:
    std::vector<Key> slots;  // {0, 0} where empty
    size_t find(const Key& k) const {
        size_t at = text::mix(k.first + k.second * 0x9e3779b97f4a7c15ull) % slots.size();
        while (slots[at] != Key{} && slots[at] != k) at = (at + 1) % slots.size();
        return at;
    }
};

template <typename V>
bool has(const V& view, size_t i, uint16_t bits) {
    return text::class_of(view[i]) & bits;
}

class ProseCounter {
public:
    ProseCounter(const std::vector<std::string>& stop_words, const CodePoints& bullets, std::vector<CodePoints> endings,
                 const CodePoints& closing)
        : stop_words(stop_words), bullets(bullets.begin(), bullets.end()), endings(std::move(endings)),
          closing(closing.begin(), closing.end()) {}
    py::tuple count(const py::str& str) const {
        const Prose p = text::with_view(str, [&](const auto& view) { return count_view(view); });
        return py::make_tuple(p.sentences, p.separators, p.link_characters, p.tag_characters, p.bullet_lines,
                              p.read_more_lines, p.raw_words, p.capital_words, p.brackets, p.stop_words, p.filled_lines,
                              p.filled_characters, p.repeated_lines, p.repeated_characters);
    }

private:
    WordSet stop_words;
    std::unordered_set<uint32_t> bullets;  // none is ASCII
    std::vector<CodePoints> endings;
    std::unordered_set<uint32_t> closing;

    template <typename Char>
    Prose count_view(const View<Char>& view) const {
        Prose found;
        sentences(view, found);
        words(view, found);
        links(view, found);
        text::Counter counter;
        std::vector<size_t> sizes;  // characters of each distinct line
        text::each_line(view, [&](size_t begin, size_t end) {
            tags(view, begin, end, found);
            while (begin < end && has(view, begin, text::kSpace)) ++begin;
            while (end > begin && has(view, end - 1, text::kSpace)) --end;
            if (begin == end) return;
            ++found.filled_lines;
            found.filled_characters += end - begin;
            found.bullet_lines += view[begin] >= 0x80 && bullets.count(view[begin]);
            found.read_more_lines += reads_more(view, begin, end);
            counter.add(view.data, begin * sizeof(Char), (end - begin) * sizeof(Char));
            if (counter.count.size() > sizes.size()) sizes.push_back(end - begin);
        });
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (counter.count[i] < 2) continue;
            found.repeated_lines += counter.count[i];
            found.repeated_characters += counter.count[i] * sizes[i];
        }
        return found;
    }
    template <typename V>
    static void sentences(const V& view, Prose& found) {
        uint16_t before = 0;
        for (size_t i = 0; i < view.size;) {
            const uint16_t k = text::class_of(view[i]);
            if (!((k ^ before) & text::kWord) || k & text::kEnd) {
                before = k;
                ++i;
                continue;
            }
            ++found.sentences;
            while (i < view.size && !has(view, i, text::kEnd)) ++i;
            while (i < view.size && has(view, i, text::kEnd)) ++i;
            before = text::class_of(view[i - 1]);
        }
        for (const auto c : view) found.separators += (c == '.') + (c == '!') + (c == '?') + (c == '\n');
    }
    template <typename V>
    void words(const V& view, Prose& found) const {
        for (size_t i = 0; i < view.size;) {
            const uint16_t k = text::class_of(view[i]);
            if (!(k & text::kPiece) && k & text::kSpace) {
                ++i;
                continue;
            }
            const bool letters = k & text::kPiece;
            const size_t begin = i;
            uint16_t seen = 0;
            uint32_t highest = 0;
            for (; i < view.size; ++i) {
                const uint16_t here = text::class_of(view[i]);
                if (bool(here & text::kPiece) != letters || (!letters && here & text::kSpace)) break;
                seen |= here;
                highest = std::max(highest, view[i]);
            }
            ++found.raw_words;
            found.capital_words += seen & text::kUpper && !(seen & text::kLower);
            found.brackets += i == begin + 1 && (highest == 0x3010 || highest == 0x3011);
            if (letters && highest < 0x80 && !(seen & text::kUpper) && i - begin <= WordSet::kLongest)
                found.stop_words += stop_words.holds(WordSet::key(view.data + begin, i - begin));
        }
    }
    template <typename V>
    static void links(const V& view, Prose& found) {
        size_t end = 0, close = 0;  // of the run without white space last looked at; behind its last )
        for (size_t j = view.find('(', 0); j < view.size; j = view.find('(', j + 1)) {
            const size_t address = behind_scheme(view, j + 1);
            if (!address) continue;
            if (j >= end)
                for (end = j, close = 0; end < view.size && !has(view, end, text::kSpace); ++end)
                    if (view[end] == ')') close = end + 1;
            if (address + 1 >= close) continue;
            found.link_characters += close - j;
            j = close - 1;
        }
    }
    template <typename V>
    static size_t behind_scheme(const V& view, size_t i) {  // behind https?:// at i, or 0
        const auto follows = [&](const char* what) {
            size_t j = i;
            for (; *what; ++what, ++j)
                if (j >= view.size || view[j] != uint32_t(*what)) return size_t(0);
            return j;
        };
        if (const size_t j = follows("http://")) return j;
        return follows("https://");
    }
    template <typename V>
    static void tags(const V& view, size_t begin, size_t end, Prose& found) {
        while ((begin = view.find('<', begin, end)) < end) {
            const size_t close = view.find('>', begin, end);
            if (close == end) return;
            found.tag_characters += close + 1 - begin;
            begin = close + 1;
        }
    }
    template <typename V>
    bool reads_more(const V& view, size_t begin, size_t end) const {
        while (end > begin && closing.count(view[end - 1])) --end;
        for (const CodePoints& ending : endings) {
            if (ending.size() > end - begin) continue;
            size_t j = 0;
            while (j < ending.size() && view[end - ending.size() + j] == ending[j]) ++j;
            if (j == ending.size()) return true;
        }
        return false;
    }
};

}  // namespace

void add_prose(py::module_& m) {
    py::class_<ProseCounter>(m, "ProseCounter")
        .def(py::init<const std::vector<std::string>&, const CodePoints&, std::vector<CodePoints>, const CodePoints&>(),
             py::arg("stop_words"), py::arg("bullets"), py::arg("endings"), py::arg("closing"))
        .def("count", &ProseCounter::count, py::arg("text"));
}
