// Counts over the lines of code; the definition stands in opencoder/corpus/signals/code_text.py.
#include <algorithm>

#include "counter.h"

namespace {

using text::View;

struct CodeLines {
    size_t lines = 0, repeated = 0, assertions = 0, assertion_words = 0, concatenations = 0;
};

bool is_quote(uint32_t c) { return c == '\'' || c == '"'; }
template <typename V>
bool space_at(const V& view, size_t i) {
    return text::class_of(view[i]) & text::kSpace;
}

// Whether `assert` occurs in the line in any case; `begins_word`: and some occurrence does not follow a letter or digit.
template <typename V>
bool asserts(const V& line, bool& begins_word) {
    static constexpr char mark[] = "assert";
    begins_word = false;
    bool found = false;
    const auto lower = [&](size_t i) { return line[i] >= 'A' && line[i] <= 'Z' ? line[i] + 32 : line[i]; };
    for (size_t i = 0; i + 6 <= line.size; ++i) {
        if (lower(i + 2) != 's') {  // then no ss begins here or one further
            ++i;
            continue;
        }
        if (lower(i + 1) != 's') continue;
        bool equal = true;
        for (size_t j = 0; j < 6 && equal; ++j) equal = lower(i + j) == uint32_t(mark[j]);
        if (!equal) continue;
        found = true;
        const uint32_t before = i ? lower(i - 1) : ' ';
        if (!(before >= 'a' && before <= 'z') && !(before >= '0' && before <= '9')) {
            begins_word = true;
            break;
        }
    }
    return found;
}

template <typename V>
bool concatenates(const V& line) {
    size_t plus = line.find('+', 0);
    if (plus == line.size) return false;
    size_t quote = line.size;  // the first after an = and white space
    for (size_t i = line.find('=', 0); i < line.size && quote == line.size; i = line.find('=', i + 1)) {
        size_t j = i + 1;
        while (j < line.size && space_at(line, j)) ++j;
        if (j < line.size && is_quote(line[j])) quote = j;
        i = j - 1;
    }
    for (; plus < line.size; plus = line.find('+', plus + 1)) {
        size_t left = plus, right = plus + 1;
        while (left > 0 && space_at(line, left - 1)) --left;
        while (right < line.size && space_at(line, right)) ++right;
        if (left == 0 || right == line.size || !is_quote(line[left - 1]) || !is_quote(line[right]) || left - 1 < quote + 2) continue;
        size_t last = line.size;
        while (last > right + 2 && !is_quote(line[last - 1])) --last;
        return last > right + 2;
    }
    return false;
}

template <typename Char>
CodeLines count(const View<Char>& view) {
    CodeLines found;
    std::vector<Char> bare(view.size);  // the lines without white space, one after the other
    text::Counter counter;
    size_t filled = 0;
    text::each_line(view, [&](size_t begin, size_t end) {
        const size_t start = filled;
        for (size_t i = begin; i < end; ++i) {
            bare[filled] = view.data[i];
            filled += !space_at(view, i);
        }
        const size_t size = filled - start;
        if (size == 0) return;
        ++found.lines;
        if (size > 1 && !(size == 2 && bare[start] == '}' && bare[start + 1] == ','))
            counter.add(bare.data(), start * sizeof(Char), size * sizeof(Char));
        const View<Char> line = view.part(begin, end);
        bool begins_word = false;
        found.assertions += asserts(line, begins_word);
        found.assertion_words += begins_word;
        found.concatenations += concatenates(line);
    });
    for (const uint32_t n : counter.count) found.repeated += n > 1 ? n : 0;
    return found;
}

}  // namespace

void add_code_lines(py::module_& m) {
    m.def("count_code_lines", [](const py::str& code) {
        const CodeLines c = text::with_view(code, [](const auto& view) { return count(view); });
        return py::make_tuple(c.lines, c.repeated, c.assertions, c.assertion_words, c.concatenations);
    }, py::arg("code"));
}
