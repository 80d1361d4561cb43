// C and C++ as the released filter sees them: the tokens of Pygments' C family lexer, quirks included. A string inside a
// macro is not seen as one, so `//` of a URL there starts a comment; what `#if 0` hides is code; digit separators count.
#include "lexer.h"

namespace lex {
namespace {

template <class C>
struct CFamily {
    const Text<C>& t;
    Spans& out;
    bool cpp;
    Closer quote{"\""}, angle{">"}, block_end{"*/"};
    int unclosed = 0;  // raw strings

    // White space, then at most one comment within a line, then white space again. `comment` is where that comment is.
    size_t skip_ws(size_t i, Span* comment) {
        i = t.skip_space(i);
        comment->begin = comment->end = i;
        if (t.is(i, "/*")) {
            const size_t close = block_end.find(t, i + 2);
            if (close != kNone && close < t.line_end(i)) {
                comment->end = close + 2;
                i = t.skip_space(close + 2);
            }
        }
        return i;
    }
    void add(const Span& s) const {
        if (s.end > s.begin) out.push_back({s.begin, s.end, Kind::comment});
    }

    // Past a multi-line comment that starts at i, or kNone if none does; a backslash-newline may split its marks.
    size_t block_comment(size_t i) const {
        size_t j = i + 1;
        if (t.is(j, "\\\n")) j += 2;
        if (t.at(j) != '*') return kNone;
        for (++j; (j = t.find('*', j)) != kNone; ++j) {
            if (t.at(j + 1) == '/') return j + 2;
            if (t.is(j + 1, "\\\n/")) return j + 4;
        }
        return t.n;
    }
    size_t line_comment(size_t i) const {  // with its newline; continued after a backslash
        size_t e = t.line_end(i);
        while (e + 1 < t.n && t.p[e - 1] == '\\') {
            const size_t next = t.find('\n', e + 1);
            if (next == kNone) break;
            e = next;
        }
        return std::min(e + 1, t.n);
    }

    // Lines hidden by `#if 0`, from behind the 0, to behind the directive that ends them.
    size_t hidden(size_t i) const {
        int depth = 1;
        i = t.line_end(i) + 1;
        while (i < t.n) {
            size_t j = t.skip_space(i);
            const bool directive = t.at(j) == '#';
            size_t e = t.line_end(directive ? j : i);
            if (directive) {
                const bool opens = t.is(j, "#if"), ends = t.is(j, "#endif");
                if (opens || ends)
                    while (e < t.n && t.p[e - 1] == '\\') e = t.line_end(e + 1);
                if (opens) ++depth;
                else if (ends || t.is(j, "#else") || t.is(j, "#elif")) --depth;
                else e = t.line_end(i);
            }
            i = std::min(e + 1, t.n);
            if (depth == 0) return i;
        }
        return t.n;
    }

    // The rest of a directive, from behind its #.
    size_t directive(size_t i) {
        Span first, second;
        size_t j = skip_ws(i, &first);
        if (t.is(j, "include")) {
            j = skip_ws(j + 7, &second);
            const uint32_t open = t.at(j);
            if (open == '"' || open == '<') {
                const size_t close = (open == '"' ? quote : angle).find(t, j + 1);
                if (close != kNone && close > j + 1) {
                    add(first);
                    add(second);
                    i = t.skip_blanks(close + 1);
                    const size_t e = t.line_end(i), slash = std::min(t.find('/', i), e);
                    const size_t end = slash < e && t.at(slash + 1) == '*' ? block_end.find(t, slash + 2) : kNone;
                    if (end != kNone) {
                        out.push_back({i, end + 2, Kind::comment});
                        i = end + 2;
                    } else {
                        add({i, e, Kind::comment});
                        i = e;
                    }
                }
            }
        }
        for (; i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == '\n') {
                if (t.p[i - 1] != '\\') return i + 1;
            } else if (c == '/') {
                if (t.at(i + 1) == '*') {
                    const size_t close = block_end.find(t, i + 2);
                    if (close == kNone) continue;
                    out.push_back({i, close + 2, Kind::comment});
                    i = close + 1;
                } else if (t.at(i + 1) == '/') {
                    const size_t e = std::min(t.line_end(i) + 1, t.n);
                    out.push_back({i, e, Kind::comment});
                    return e;
                }
            }
        }
        return t.n;
    }

    size_t string(size_t i) const {  // from behind the quote; a bare newline ends it and is not taken
        for (; i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == '"') return i + 1;
            if (c == '\n') return i;
            if (c == '\\') {
                const uint32_t next = t.at(i + 1);
                if (next == '"' || next == '\\' || next == '\n' || next == '\'') ++i;
            }
        }
        return t.n;
    }
    size_t character(size_t i) const {  // past a character literal, or past its quote alone
        const uint32_t c = t.at(i + 1);
        if (c == '\\') {
            if (t.at(i + 2) != '\n' && t.at(i + 3) == '\'') return i + 4;
            size_t j = i + 2;
            if (t.at(j) == 'x') {
                for (++j; j < i + 5 && is_hex(t.at(j)); ++j) {}
                return j > i + 3 && t.at(j) == '\'' ? j + 1 : i + 1;
            }
            for (; j < i + 5 && t.at(j) >= '0' && t.at(j) <= '7'; ++j) {}
            return j > i + 2 && t.at(j) == '\'' ? j + 1 : i + 1;
        }
        return c != '\'' && c != '\n' && c != kEnd && t.at(i + 2) == '\'' ? i + 3 : i + 1;
    }
    size_t number(size_t i) const {  // digits and their separators
        const bool hex = t.at(i) == '0' && lower(t.at(i + 1)) == 'x';
        if (hex) i += 2;
        auto digit = [&](uint32_t c) { return hex ? is_hex(c) : is_digit(c); };
        while (digit(t.at(i)) || (t.at(i) == '\'' && i > 0 && digit(t.at(i - 1)) && digit(t.at(i + 1)))) ++i;
        return i;
    }
    size_t raw_string(size_t quote) const {  // past R"x( … )x", or kNone
        size_t j = quote + 1;
        while (j < quote + 18 && j < t.n && t.p[j] != '(' && t.p[j] != ')' && t.p[j] != '\\' && !is_space(t.p[j])) ++j;
        if (t.at(j) != '(') return kNone;
        const size_t width = j - quote - 1;
        for (size_t k = j + 1; (k = t.find(')', k)) != kNone; ++k)
            if (k + width + 1 < t.n && std::equal(t.p + quote + 1, t.p + j, t.p + k + 1) && t.p[k + 1 + width] == '"')
                return k + width + 2;
        return kNone;
    }

    void run() {
        size_t i = 0;
        bool fresh = true;  // at a line start
        while (i < t.n) {
            if (fresh) {
                fresh = false;
                Span comment;
                size_t j = i;
                if (t.at(i) != '#') j = skip_ws(i, &comment);
                else comment.begin = comment.end = 0;
                if (t.at(j) == '#') {
                    add(comment);
                    if (t.is(j, "#if") && is_space(t.at(j + 3)) && t.at(t.skip_space(j + 3)) == '0')
                        i = hidden(t.skip_space(j + 3) + 1);
                    else i = directive(j + 1);
                    fresh = true;
                    continue;
                }
                i = t.skip_space(i);  // the line starts in between would find the same
                continue;
            }
            const uint32_t c = t.p[i];
            if (is_word(c) || c == '$') {
                if (is_digit(c)) {
                    i = number(i);
                    if (i < t.n && !is_word(t.p[i])) continue;
                }
                const size_t e = t.skip_name(i);
                if (cpp && t.at(e) == '"' && e > i && t.p[e - 1] == 'R' && raw_prefix(i, e)) {
                    const size_t close = unclosed < kMaxUnclosed ? raw_string(e) : kNone;
                    unclosed += close == kNone;
                    i = close == kNone ? e : close;
                } else i = e;
            } else if (c == '/') {
                if (t.at(i + 1) == '/') {
                    const size_t e = line_comment(i);
                    if (t.at(e - 1) == '\n') out.push_back({i, e, Kind::comment});
                    fresh = true;
                    i = e;
                } else {
                    const size_t e = block_comment(i);
                    if (e != kNone) out.push_back({i, e, Kind::comment});
                    i = e == kNone ? i + 1 : e;
                }
            } else if (c == '"') i = string(i + 1);
            else if (c == '\'') i = character(i);
            else {
                fresh = c == '\n';
                ++i;
            }
        }
    }
    bool raw_prefix(size_t i, size_t e) const {
        return e - i == 1 || t.word_is(i, e, "LR") || t.word_is(i, e, "uR") || t.word_is(i, e, "UR") || t.word_is(i, e, "u8R");
    }
};

}  // namespace

LEXER(lex_c) {
    (void)mode;
    CFamily<C>{t, out, false}.run();
}
LEXER(lex_cpp) {
    (void)mode;
    CFamily<C>{t, out, true}.run();
}
INSTANTIATE_LEXER(lex_c)
INSTANTIATE_LEXER(lex_cpp)

}  // namespace lex
