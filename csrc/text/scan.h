// Counts over the code of a text: what the published filter counts with regular expressions, found by hand-written scanners
// that look at every character a bounded number of times. They count as `findall` does: leftmost matches that do not
// overlap, where white space may run over line ends.
#pragma once
#include "lexer.h"
#include "module.h"

namespace lex {

// The next occurrence of a character, remembered: `hit` is the first one from `from` on. Asking from growing positions, or
// ones a little behind, is linear altogether.
template <class C>
struct Next {
    const Text<C>& t;
    char c;
    size_t from = 0, hit = 0;
    bool known = false;

    size_t operator()(size_t i) {
        if (known && i < from) {
            const size_t before = Text<C>{t.p, from}.find(c, i);
            if (before != kNone) return before;
            from = i;
        } else if (!known || i > hit) {
            hit = t.find(c, i);
            from = i;
            known = true;
        }
        return hit;
    }
};

// White space and a line end from i: where it ends, or kNone. White space is given back until a line ends there.
template <class C>
size_t rest_is_blank(const Text<C>& t, size_t i) {
    for (size_t j = t.skip_space(i);; --j) {
        if (j == t.n || t.p[j] == '\n') return j;
        if (j == i) return kNone;
    }
}

// Tries item(j) at the first character of each line that has one; the item gives its end, or kNone. After a match the next
// line start counts.
template <class C, class Item>
void each_line(const Text<C>& t, Item&& item) {
    size_t i = 0;
    while (i < t.n) {
        const size_t j = t.skip_space(i);
        if (j >= t.n) return;
        const size_t end = item(j);
        if (end != kNone && end > 0 && t.p[end - 1] == '\n' && end > j) {
            i = end;
            continue;
        }
        const size_t e = t.find('\n', end == kNone ? j : end);
        if (e == kNone) return;
        i = e + 1;
    }
}

template <class C>
size_t filled_lines(const Text<C>& t) {
    size_t count = 0;
    for (size_t i = 0; (i = t.skip_space(i)) < t.n; ++count) {
        i = t.line_end(i);
    }
    return count;
}

// Whether the text at i, `size` long, is not part of a longer word.
template <class C>
bool stands_alone(const Text<C>& t, size_t i, size_t size) {
    return !(i > 0 && is_word(t.p[i - 1])) && !is_word(t.at(i + size));
}

// Lines that hold the text; `whole`: as a word of its own.
template <class C>
size_t lines_with(const Text<C>& t, std::string_view needle, bool whole = false) {
    size_t count = 0;
    for (size_t i = 0; (i = t.find(needle, i)) != kNone;) {
        if (whole && !stands_alone(t, i, needle.size())) {
            i += needle.size();
            continue;
        }
        ++count;
        i = t.line_end(i);
    }
    return count;
}

// Past a quoted string at i that may run over lines, or kNone; a backslash takes the next character along, but no newline.
template <class C>
size_t quoted(const Text<C>& t, size_t i) {
    const C quote = t.p[i];
    for (++i; i < t.n; ++i) {
        if (t.p[i] == quote) return i + 1;
        if (t.p[i] == '\\' && (++i >= t.n || t.p[i] == '\n')) return kNone;
    }
    return kNone;
}

// Past `word` and the white space it needs behind it, or kNone.
template <class C>
size_t word_then_space(const Text<C>& t, size_t i, std::string_view word) {
    if (!t.is(i, word) || !is_space(t.at(i + word.size()))) return kNone;
    return t.skip_space(i + word.size());
}

// Calls work(Text<C>) without the GIL for the width the string is stored in; the caller keeps `text` alive.
template <class F>
void with_text(const py::str& text, F&& work) {
    PyObject* s = text.ptr();
    const auto n = static_cast<size_t>(PyUnicode_GET_LENGTH(s));
    const int kind = PyUnicode_KIND(s);
    const void* data = PyUnicode_DATA(s);
    py::gil_scoped_release release;
    if (kind == PyUnicode_1BYTE_KIND) work(Text<Py_UCS1>{static_cast<const Py_UCS1*>(data), n});
    else if (kind == PyUnicode_2BYTE_KIND) work(Text<Py_UCS2>{static_cast<const Py_UCS2*>(data), n});
    else work(Text<Py_UCS4>{static_cast<const Py_UCS4*>(data), n});
}

}  // namespace lex
