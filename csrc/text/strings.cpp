// String literals, runs of encoded data and hexadecimal words. The patterns and what is counted stand in
// opencoder/corpus/signals/strings.py; each is matched here in one pass, whatever the text.
#include <algorithm>

#include "characters.h"

namespace {

using text::View;

constexpr size_t kLongLineTokens = 20, kLongWord = 20, kBase64Run = 64, kUnits = 8;

bool is_hex(uint32_t c) { return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'f'); }
bool is_base64(uint32_t c) {
    return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '+' || c == '/' || c == '=' || c == '\n';
}
template <typename V>
bool word_at(const V& view, size_t i) {
    return i < view.size && text::class_of(view[i]) & text::kWord;
}
template <typename V>
bool boundary(const V& view, size_t i) {  // \b of re
    return (i > 0 && word_at(view, i - 1)) != word_at(view, i);
}

// Calls f(begin, end) with the inside of each literal that is not empty.
template <typename V, typename F>
void each_literal(const V& view, bool across_lines, F&& f) {
    // Whether a closing mark of this kind may still come: single and double quote, each once and thrice.
    std::array<std::array<bool, 2>, 2> open{{{true, true}, {true, true}}};
    size_t newline = across_lines ? view.size : 0;  // the next one; looked for again only once passed: a line may hold many quotes
    for (size_t i = 0; i < view.size;) {
        const uint32_t quote = view[i];
        if (quote != '\'' && quote != '"') {
            ++i;
            continue;
        }
        auto& hope = open[quote == '"'];
        size_t next = i + 1;
        bool matched = false;
        if (hope[1] && i + 2 < view.size && view[i + 1] == quote && view[i + 2] == quote) {
            size_t end = i + 3;
            while ((end = view.find(quote, end)) + 2 < view.size && !(view[end + 1] == quote && view[end + 2] == quote)) ++end;
            if (end + 2 < view.size) {
                if (end > i + 3) f(i + 3, end);
                next = end + 3;
                matched = true;
            } else {
                hope[1] = false;
            }
        }
        if (!matched && hope[0]) {
            if (newline <= i) newline = view.find('\n', i + 1);
            const size_t end = view.find(quote, i + 1, newline);
            if (end < newline) {
                if (end > i + 1) f(i + 1, end);
                next = end + 1;
            } else if (newline == view.size) {
                hope[0] = false;
            }
        }
        i = next;
    }
}

// Runs of word characters or of other characters that are not white space in [begin, end).
template <typename V>
size_t pieces(const V& view, size_t begin, size_t end) {
    size_t count = 0;
    uint16_t before = text::kSpace;
    for (size_t i = begin; i < end; ++i) {
        const uint16_t k = text::class_of(view[i]), kind = k & text::kPiece ? text::kPiece : k & text::kSpace;
        count += kind != before && kind != text::kSpace;
        before = kind;
    }
    return count;
}

template <typename V>
bool holds_url(const V& view, size_t begin, size_t end) {  // https?://\S in a word
    const auto ends_in = [&](size_t at, const char* what, size_t n) {
        if (at < begin + n) return false;
        for (size_t j = 0; j < n; ++j)
            if (view[at - n + j] != uint32_t(what[j])) return false;
        return true;
    };
    for (size_t i = view.find(':', begin, end); i < end; i = view.find(':', i + 1, end))
        if (i + 3 < end && view[i + 1] == '/' && view[i + 2] == '/' && (ends_in(i, "http", 4) || ends_in(i, "https", 5))) return true;
    return false;
}

struct Strings {
    size_t long_lines = 0, characters = 0, long_word_characters = 0;
};

template <typename V>
Strings strings(const V& view) {
    Strings found;
    each_literal(view, true, [&](size_t begin, size_t end) {
        for (size_t from = begin; from <= end;) {
            const size_t to = view.find('\n', from, end);
            found.long_lines += to - from > kLongLineTokens && pieces(view, from, to) > kLongLineTokens;
            from = to + 1;
        }
    });
    each_literal(view, false, [&](size_t begin, size_t end) {
        found.characters += end - begin;
        if (end - begin <= kLongWord) return;
        for (size_t from = begin; from < end;) {
            size_t to = from;
            while (to < end && !(text::class_of(view[to]) & text::kSpace)) ++to;
            if (to - from > kLongWord && !holds_url(view, from, to)) found.long_word_characters += to - from;
            from = to + 1;
        }
    });
    return found;
}

struct Encoded {
    size_t longest = 0, characters = 0;
    void add(size_t size) {
        longest = std::max(longest, size);
        characters += size;
    }
};

// End of the hex byte that begins at i with what separates it from the next, or 0.
template <typename V>
size_t hex_byte(const V& view, size_t i) {
    if (!boundary(view, i)) return 0;
    if (i + 1 < view.size && (view[i] == '0' || view[i] == '\\') && view[i + 1] == 'x') i += 2;
    if (i + 1 >= view.size || !is_hex(view[i]) || !is_hex(view[i + 1])) return 0;
    i += 2;
    if (i < view.size && view[i] == ',') return i + 1;
    if (!boundary(view, i)) return 0;
    while (i < view.size && text::class_of(view[i]) & text::kSpace) ++i;
    return i;
}
template <typename V>
size_t unicode_escape(const V& view, size_t i) {
    if (i + 6 > view.size || view[i] != '\\' || view[i + 1] != 'u') return 0;
    for (size_t j = 2; j < 6; ++j)
        if (!is_hex(view[i + j])) return 0;
    return i + 6;
}

// Adds the runs of at least kUnits units that begin in [begin, end). A unit begins inside another of the run only where the
// run's own units do, so a run that is too short need not be tried again from its middle.
template <typename V, typename Unit>
void runs(const V& view, size_t begin, size_t end, Encoded& found, Unit&& unit) {
    while (begin < end) {
        size_t at = begin, count = 0;
        for (size_t next; at < view.size && (next = unit(view, at)); at = next) ++count;
        if (count >= kUnits) found.add(at - begin);
        begin = std::max(at, begin + 1);
    }
}

// Calls f(begin, end) with each longest run of at least `least` characters for which `belongs` holds.
template <typename V, typename Belongs, typename F>
void each_run(const V& view, size_t least, Belongs&& belongs, F&& f) {
    for (size_t i = 0; i + least <= view.size;) {
        // Backwards from where the run would end: the last character that does not belong says where to go on.
        size_t j = i + least;
        while (j > i && belongs(view[j - 1])) --j;
        if (j > i) {
            i = j;
            continue;
        }
        size_t end = i + least;
        while (end < view.size && belongs(view[end])) ++end;
        f(i, end);
        i = end;
    }
}

template <typename V>
Encoded encoded(const V& view) {
    Encoded found;
    each_run(view, kBase64Run, is_base64, [&](size_t begin, size_t end) { found.add(end - begin); });
    // Eight hex bytes, one character between two of them at least, have no other characters than these.
    const auto of_hex_bytes = [](uint32_t c) {
        return is_hex(c) || c == ',' || c == 'x' || c == '\\' || text::class_of(c) & text::kSpace;
    };
    each_run(view, 3 * kUnits - 1, of_hex_bytes, [&](size_t begin, size_t end) {
        runs(view, begin, end, found, [](const V& v, size_t i) { return hex_byte(v, i); });
    });
    for (size_t i = view.find('\\', 0); i < view.size; i = view.find('\\', i)) {
        size_t end = i, count = 0;
        for (size_t next; (next = unicode_escape(view, end)); end = next) ++count;
        if (count >= kUnits) found.add(end - i);
        i = std::max(end, i + 1);
    }
    return found;
}

template <typename V>
size_t hex_words(const V& view) {  // \b0[xX][0-9a-fA-F]+\b
    size_t characters = 0;
    for (size_t i = 0; i + 2 < view.size; ++i) {
        if (view[i] != '0' || (view[i + 1] | 32) != 'x' || !is_hex(view[i + 2]) || !boundary(view, i)) continue;
        size_t end = i + 3;
        while (end < view.size && is_hex(view[end])) ++end;
        if (!word_at(view, end)) characters += end - i;
        i = end - 1;
    }
    return characters;
}

}  // namespace

void add_strings(py::module_& m) {
    m.def("count_strings", [](const py::str& code) {
        const Strings s = text::with_view(code, [](const auto& view) { return strings(view); });
        return py::make_tuple(s.long_lines, s.characters, s.long_word_characters);
    }, py::arg("code"));
    m.def("count_encoded", [](const py::str& text) {
        const Encoded e = text::with_view(text, [](const auto& view) { return encoded(view); });
        return py::make_tuple(e.longest, e.characters);
    }, py::arg("text"));
    m.def("hex_word_characters", [](const py::str& text) {
        return text::with_view(text, [](const auto& view) { return hex_words(view); });
    }, py::arg("text"));
}
