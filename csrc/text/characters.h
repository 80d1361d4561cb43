// Characters as Python sees them: views of a str without a copy, and the classes of code points that Python hands over.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "module.h"

namespace text {

// Bits of a character's class; opencoder/corpus/signals/characters.py has the same.
enum Class : uint16_t {
    kWord = 1,        // \w of re: str.isalnum() or _
    kSpace = 2,       // \s of re: str.isspace()
    kLetter = 4,      // str.isalpha()
    kDigit = 8,       // str.isdigit()
    kUpper = 16,      // str.isupper()
    kLower = 32,      // lower or title case
    kPiece = 64,      // \w of regex: the signals' words are runs of these
    kDeleted = 128,   // normalisation deletes it
    kSpaced = 256,    // normalisation makes it a space
    kEnd = 512,       // ends a sentence; set here, not by Python
};
constexpr size_t kTableSize = 0x40000;
// Code points from here on have no class but these: the supplementary variation selectors belong to words.
constexpr uint32_t kSelectorsBegin = 0xe0100, kSelectorsEnd = 0xe01f0;

extern std::vector<uint16_t> classes;  // kTableSize entries once Python has set them

inline uint16_t class_of(uint32_t c) {
    if (c < kTableSize) return classes[c];
    return c >= kSelectorsBegin && c < kSelectorsEnd ? uint16_t(kPiece) : uint16_t(0);
}

// The code points of a str, in the width Python stores them.
template <typename Char>
struct View {
    const Char* data;
    size_t size;
    uint32_t operator[](size_t i) const { return data[i]; }
    const Char* begin() const { return data; }
    const Char* end() const { return data + size; }
    View part(size_t from, size_t to) const { return {data + from, to - from}; }
    // Position of c in [from, to), or `to`.
    size_t find(uint32_t c, size_t from, size_t to) const {
        for (size_t i = from; i < to; ++i)
            if (data[i] == c) return i;
        return to;
    }
    size_t find(uint32_t c, size_t from) const { return find(c, from, size); }
};

template <>
inline size_t View<uint8_t>::find(uint32_t c, size_t from, size_t to) const {
    if (from >= to) return to;
    const void* at = c < 256 ? __builtin_memchr(data + from, int(c), to - from) : nullptr;
    return at ? size_t(static_cast<const uint8_t*>(at) - data) : to;
}

// Calls f with the View of a str, without the interpreter's lock. The caller holds a reference, and a str never changes.
template <typename F>
auto with_view(const py::str& text, F&& f) {
    if (classes.empty()) throw std::runtime_error("set_character_tables has not been called");
    PyObject* object = text.ptr();
    const auto size = size_t(PyUnicode_GET_LENGTH(object));
    const void* data = PyUnicode_DATA(object);
    const int kind = PyUnicode_KIND(object);
    py::gil_scoped_release release;
    if (kind == PyUnicode_1BYTE_KIND) return f(View<uint8_t>{static_cast<const uint8_t*>(data), size});
    if (kind == PyUnicode_2BYTE_KIND) return f(View<uint16_t>{static_cast<const uint16_t*>(data), size});
    return f(View<uint32_t>{static_cast<const uint32_t*>(data), size});
}

// Calls f(begin, end) for each line; `end` is the position of its newline, or of the end of a last line without one.
template <typename V, typename F>
void each_line(const V& text, F&& f) {
    for (size_t begin = 0; begin < text.size;) {
        const size_t end = text.find('\n', begin);
        f(begin, end);
        begin = end + 1;
    }
}

inline uint64_t mix(uint64_t h) {  // MurmurHash3's finaliser
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

}  // namespace text
