// The tables of characters, what is counted character by character, and the lines that need Python's own normalisation.
#include "characters.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string_view>

namespace text {
std::vector<uint16_t> classes;
}

namespace {

using text::View;

struct Counts {
    size_t space = 0, letters = 0, digits = 0, replacements = 0, brackets = 0, lines = 0, longest = 0;
    void add(uint32_t c, size_t times) {
        const uint16_t k = text::class_of(c);
        space += k & text::kSpace ? times : 0;
        letters += k & text::kLetter ? times : 0;
        digits += k & text::kDigit ? times : 0;
        replacements += c == 0xfffd ? times : 0;
        brackets += c == '{' || c == '}' ? times : 0;
    }
};

template <typename Char>
Counts count(const View<Char>& view) {
    Counts counts;
    if constexpr (sizeof(Char) == 1) {
        // A histogram first: 256 classes to look at instead of one per character. Four of them, because runs of one
        // character would wait for their own stores.
        std::array<std::array<uint32_t, 256>, 4> seen{};
        size_t i = 0;
        for (; i + 4 <= view.size; i += 4)
            for (size_t j = 0; j < 4; ++j) ++seen[j][view.data[i + j]];
        for (; i < view.size; ++i) ++seen[0][view.data[i]];
        for (uint32_t c = 0; c < 256; ++c)
            if (const size_t n = size_t(seen[0][c]) + seen[1][c] + seen[2][c] + seen[3][c]) counts.add(c, n);
    } else {
        for (const Char c : view) counts.add(c, 1);
    }
    text::each_line(view, [&](size_t begin, size_t end) {
        ++counts.lines;
        counts.longest = std::max(counts.longest, std::min(end + 1, view.size) - begin);
    });
    return counts;
}

py::tuple count_characters(const py::str& str) {
    const Counts c = text::with_view(str, [](const auto& view) { return count(view); });
    return py::make_tuple(c.space, c.letters, c.digits, c.replacements, c.brackets, c.lines, c.longest);
}

// The lines that hold a character beyond ASCII, each with a newline, deletions and spaces of the normalisation done.
template <typename Char>
std::vector<Char> to_normalise(const View<Char>& view) {
    std::vector<Char> out;
    text::each_line(view, [&](size_t begin, size_t end) {
        if (std::all_of(view.data + begin, view.data + end, [](Char c) { return c < 0x80; })) return;
        for (size_t i = begin; i < end; ++i) {
            const uint16_t k = text::class_of(view[i]);
            if (!(k & text::kDeleted)) out.push_back(k & text::kSpaced ? Char(' ') : view.data[i]);
        }
        out.push_back('\n');
    });
    return out;
}

py::str lines_to_normalise(const py::str& str) {
    std::vector<uint8_t> narrow;
    std::vector<uint16_t> middle;
    std::vector<uint32_t> wide;
    const auto keep = [&](auto&& view) {
        if constexpr (sizeof(view.data[0]) == 1) narrow = to_normalise(view);
        else if constexpr (sizeof(view.data[0]) == 2) middle = to_normalise(view);
        else wide = to_normalise(view);
        return 0;
    };
    text::with_view(str, keep);
    const auto make = [](int kind, const void* data, size_t size) {
        return py::reinterpret_steal<py::str>(PyUnicode_FromKindAndData(kind, data, Py_ssize_t(size)));
    };
    if (!middle.empty()) return make(PyUnicode_2BYTE_KIND, middle.data(), middle.size());
    if (!wide.empty()) return make(PyUnicode_4BYTE_KIND, wide.data(), wide.size());
    return make(PyUnicode_1BYTE_KIND, narrow.data(), narrow.size());
}

void set_character_tables(const py::bytes& table, const std::vector<uint32_t>& spaced, const std::vector<uint32_t>& deleted) {
    const std::string_view bits = table;
    if (bits.size() != text::kTableSize) throw std::invalid_argument("the table of characters must have 0x40000 entries");
    std::vector<uint16_t> classes(text::kTableSize);
    for (size_t i = 0; i < bits.size(); ++i) classes[i] = uint8_t(bits[i]);
    for (const uint32_t c : spaced) classes.at(c) |= text::kSpaced;
    for (const uint32_t c : deleted) classes.at(c) |= text::kDeleted;
    for (const uint32_t c : {0x2eu, 0x21u, 0x3fu, 0x3002u, 0xff01u, 0xff1fu, 0x61fu}) classes[c] |= text::kEnd;  // . ! ? 。 ！ ？ ؟
    text::classes = std::move(classes);
}

}  // namespace

void add_characters(py::module_& m) {
    m.def("set_character_tables", &set_character_tables, py::arg("classes"), py::arg("spaced"), py::arg("deleted"));
    m.def("count_characters", &count_characters, py::arg("text"));
    m.def("lines_to_normalise", &lines_to_normalise, py::arg("text"));
}
