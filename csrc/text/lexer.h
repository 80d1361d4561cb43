// Comments and strings of source text. A lexer walks one text and appends the spans that are comments; everything else
// is code. Texts stay in the width CPython stores them in (1, 2 or 4 bytes a character), so positions are code points
// and nothing is copied.
#pragma once
#include <Python.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lex {

constexpr size_t kNone = SIZE_MAX;
constexpr uint32_t kEnd = 0xffffffff;  // what `at` gives beyond the text: no code point

enum class Kind : uint8_t { comment, doc_string, hashbang };

struct Span {
    size_t begin, end;
    Kind kind;
};

inline bool is_space(uint32_t c) {
    if (c < 128) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f);
    return c != kEnd && _PyUnicode_IsWhitespace(c);
}
inline bool is_digit(uint32_t c) { return c >= '0' && c <= '9'; }
inline bool is_hex(uint32_t c) { return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
inline bool is_letter(uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
// \w of Python's re: letters, digits of every script, underscore.
inline bool is_word(uint32_t c) {
    if (c < 128) return is_letter(c) || is_digit(c) || c == '_';
    return c != kEnd && (_PyUnicode_IsAlpha(c) || _PyUnicode_IsDecimalDigit(c) || _PyUnicode_IsDigit(c) || _PyUnicode_IsNumeric(c));
}
// A word character that is no decimal digit, or an underscore or dollar sign: starts an identifier.
inline bool starts_name(uint32_t c) { return c == '$' || (is_word(c) && !(c < 128 ? is_digit(c) : _PyUnicode_IsDecimalDigit(c))); }
inline uint32_t lower(uint32_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }

// A text and what every lexer asks of it.
template <class C>
struct Text {
    const C* p;
    size_t n;

    uint32_t at(size_t i) const { return i < n ? static_cast<uint32_t>(p[i]) : kEnd; }
    bool is(size_t i, std::string_view s) const {
        if (i > n || s.size() > n - i) return false;
        for (size_t k = 0; k < s.size(); ++k)
            if (p[i + k] != static_cast<C>(static_cast<unsigned char>(s[k]))) return false;
        return true;
    }
    // `s` in lower case.
    bool is_nocase(size_t i, std::string_view s) const {
        if (i > n || s.size() > n - i) return false;
        for (size_t k = 0; k < s.size(); ++k)
            if (lower(p[i + k]) != static_cast<unsigned char>(s[k])) return false;
        return true;
    }
    size_t find(char c, size_t from) const {
        if (from >= n) return kNone;
        const C* hit = std::char_traits<C>::find(p + from, n - from, static_cast<C>(static_cast<unsigned char>(c)));
        return hit ? static_cast<size_t>(hit - p) : kNone;
    }
    size_t find(std::string_view s, size_t from) const {
        while ((from = find(s[0], from)) != kNone) {
            if (is(from, s)) return from;
            ++from;
        }
        return kNone;
    }
    size_t line_end(size_t i) const {  // the newline, or the end of the text
        const size_t e = find('\n', i);
        return e == kNone ? n : e;
    }
    bool line_start(size_t i) const { return i == 0 || (i <= n && p[i - 1] == '\n'); }
    size_t skip_space(size_t i) const {
        while (i < n && is_space(p[i])) ++i;
        return i;
    }
    size_t skip_blanks(size_t i) const {  // white space but no newline
        while (i < n && p[i] != '\n' && is_space(p[i])) ++i;
        return i;
    }
    size_t skip_word(size_t i) const {
        while (i < n && is_word(p[i])) ++i;
        return i;
    }
    size_t skip_name(size_t i) const {  // [\w$]*
        while (i < n && (is_word(p[i]) || p[i] == '$')) ++i;
        return i;
    }
    // The lengths are ASCII: false for other widths of text that do not fit.
    bool word_is(size_t i, size_t end, std::string_view s) const { return end - i == s.size() && is(i, s); }
};

using Spans = std::vector<Span>;

// A closing mark searched for again and again at growing positions: once it is not found, it never is, so that a text full
// of openings stays linear.
struct Closer {
    std::string_view mark;
    bool gone = false;

    template <class C>
    size_t find(const Text<C>& t, size_t from) {
        if (gone) return kNone;
        const size_t hit = t.find(mark, from);
        gone = hit == kNone;
        return hit;
    }
};

// Literals that run over lines are tried this often without finding their end; then the quote counts for itself. Keeps
// texts of unclosed quotes linear.
constexpr int kMaxUnclosed = 32;

// Which parts of a text repeat the release's tokens (Pygments 2.x) rather than the language.
struct Mode {
    bool compat;
};

// A quoted string from its opening quote: past the closing one, or `kNone` if it never closes. A backslash takes the
// next character with it.
template <class C>
size_t close_string(const Text<C>& t, size_t i, uint32_t quote, bool multiline) {
    for (++i; i < t.n; ++i) {
        const uint32_t c = t.p[i];
        if (c == quote) return i + 1;
        if (c == '\\') ++i;
        else if (c == '\n' && !multiline) return kNone;
    }
    return kNone;
}

#define LEXER(name) \
    template <class C> \
    void name(const Text<C>& t, Mode mode, Spans& out)
#define INSTANTIATE_LEXER(name) \
    template void name<Py_UCS1>(const Text<Py_UCS1>&, Mode, Spans&); \
    template void name<Py_UCS2>(const Text<Py_UCS2>&, Mode, Spans&); \
    template void name<Py_UCS4>(const Text<Py_UCS4>&, Mode, Spans&);

LEXER(lex_c);           // lexer_c.cpp; mode.compat only, as the next
LEXER(lex_cpp);
LEXER(lex_python);      // lexer_python.cpp
LEXER(lex_javascript);  // lexer_javascript.cpp
LEXER(lex_typescript);
LEXER(lex_html);        // lexer_markup.cpp
LEXER(lex_xml);
LEXER(lex_java);        // lexer_released.cpp: compat only
LEXER(lex_csharp);
LEXER(lex_go);
LEXER(lex_rust);
LEXER(lex_php);
LEXER(lex_sql);
LEXER(lex_json);
LEXER(lex_nothing);

}  // namespace lex
