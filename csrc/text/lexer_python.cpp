// Python. Comments, and strings that stand at the start of a statement (doc strings). In compat mode the tokens of
// Pygments' Python lexer: a doc string is any triple-quoted string at the start of a line, and expressions inside
// f-strings are followed with a stack of states that an unexpected newline resets.
#include "lexer.h"

namespace lex {
namespace {

struct Prefix {
    size_t length;
    bool raw, format;
};

template <class C>
struct Python {
    const Text<C>& t;
    Spans& out;
    bool compat;
    int depth = 0;  // open brackets, default mode

    // The string prefix at i, if a quote follows it.
    bool prefix(size_t i, Prefix* found) const {
        size_t j = i;
        bool raw = false, format = false, bytes = false, unicode = false;
        for (; j < i + 2; ++j) {
            const uint32_t c = lower(t.at(j));
            if (c == 'r' && !raw) raw = true;
            else if ((c == 'f' || c == 't') && !format && !bytes) format = true;
            else if (c == 'b' && !bytes && !format) bytes = true;
            else if (c == 'u' && j == i) unicode = true;
            else break;
        }
        const uint32_t c = t.at(j);
        if (c != '"' && c != '\'') return false;
        if (unicode && j != i + 1) return false;
        *found = {j - i, raw, format};
        return true;
    }
    bool triple(size_t i) const { return i + 2 < t.n && t.p[i + 1] == t.p[i] && t.p[i + 2] == t.p[i]; }

    // A string without expressions, from its quote: past its end. One on a single line ends before its newline.
    size_t plain(size_t i, bool raw) const {
        const uint32_t quote = t.p[i];
        const bool three = triple(i);
        for (i += three ? 3 : 1; i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == quote && (!three || triple(i))) return i + (three ? 3 : 1);
            // Pygments: raw triple-quoted strings know no escape.
            if (c == '\\' && !(compat && three && raw) && i + 1 < t.n) ++i;
            else if (c == '\n' && !three) return i;
        }
        return t.n;
    }

    // A string with expressions, from its quote. Frames: a string (its quote, whether tripled), an expression, a bracket.
    struct Frame {
        char kind;  // s string, e expression, b bracket inside an expression
        uint32_t quote;
        bool three, raw;
    };
    size_t formatted(size_t i, bool raw) const {
        std::vector<Frame> stack{{'s', static_cast<uint32_t>(t.p[i]), triple(i), raw}};
        i += stack[0].three ? 3 : 1;
        while (i < t.n && !stack.empty()) {
            const Frame f = stack.back();
            const uint32_t c = t.p[i];
            if (f.kind == 's') {
                if (c == f.quote && (!f.three || triple(i))) {
                    stack.pop_back();
                    i += f.three ? 3 : 1;
                } else if (c == '{') {
                    if (t.at(i + 1) == '{') i += 2;
                    else {
                        stack.push_back({'e', 0, false, false});
                        ++i;
                    }
                } else if (c == '\\' && !(compat && f.three && f.raw)) {
                    const size_t close = t.is(i + 1, "N{") && !f.raw ? t.find('}', i + 3) : kNone;
                    i = close != kNone && close < t.line_end(i) ? close + 1 : i + 2;
                    if (i > t.n) i = t.n;
                } else if (c == '\n' && !f.three) return i;  // everything is reset
                else ++i;
                continue;
            }
            Prefix string;
            if (c == '\n' || is_space(c)) ++i;
            else if (c == '{' || c == '(' || c == '[') {
                stack.push_back({'b', 0, false, false});
                ++i;
            } else if (f.kind == 'b' && (c == '}' || c == ')' || c == ']')) {
                stack.pop_back();
                ++i;
            } else if (f.kind == 'e' && ends_expression(i)) {
                i = ends_expression(i);
                stack.pop_back();
            } else if (prefix(i, &string)) {
                i += string.length;
                if (string.format) {
                    stack.push_back({'s', static_cast<uint32_t>(t.p[i]), triple(i), string.raw});
                    i += triple(i) ? 3 : 1;
                } else {
                    i = plain(i, string.raw);
                    if (t.at(i) == '\n' && t.p[i - 1] != '"' && t.p[i - 1] != '\'') return i;
                }
            } else if (is_word(c)) i = is_digit(c) ? number(i) : t.skip_word(i);
            else ++i;
        }
        return i;
    }
    // Past the brace or colon that ends the expression of an f-string here, else 0.
    size_t ends_expression(size_t i) const {
        if (t.at(i) == '=') i = t.skip_space(i + 1);
        if (t.at(i) == '!' && (t.at(i + 1) == 's' || t.at(i + 1) == 'r' || t.at(i + 1) == 'a' || t.at(i + 1) == 'f')) i += 2;
        return t.at(i) == '}' || t.at(i) == ':' ? i + 1 : 0;
    }
    size_t number(size_t i) const {
        if (t.at(i) == '0' && lower(t.at(i + 1)) == 'x') {
            for (i += 2; is_hex(t.at(i)) || t.at(i) == '_'; ++i) {}
            return i;
        }
        while (is_digit(t.at(i)) || (t.at(i) == '_' && is_digit(t.at(i + 1)))) ++i;
        return i;
    }

    // At a line start: a doc string here? Its end, and where the quotes begin.
    size_t doc_string(size_t i, size_t* begin) const {
        if (!compat && depth > 0) return kNone;
        size_t j = t.skip_space(i), k = j;
        while (k < j + 2 && (lower(t.at(k)) == 'r' || lower(t.at(k)) == 'u' || lower(t.at(k)) == 'b')) ++k;
        const uint32_t quote = t.at(k);
        if ((quote != '"' && quote != '\'') || !triple(k)) return kNone;
        *begin = k;
        if (compat) {
            const size_t close = t.find(quote == '"' ? "\"\"\"" : "'''", k + 3);
            return close == kNone ? kNone : close + 3;
        }
        const size_t close = plain(k, lower(t.at(j)) == 'r');
        return close <= t.n && close >= k + 6 ? close : kNone;
    }

    void run() {
        size_t i = 0;
        bool fresh = true;
        while (i < t.n) {
            if (fresh) {
                fresh = false;
                if (i == 0 && t.is(0, "#!")) {
                    const size_t e = t.line_end(0);
                    out.push_back({0, e, Kind::hashbang});
                    i = e;
                    continue;
                }
                size_t begin;
                const size_t close = t.at(i) == '\n' ? kNone : doc_string(i, &begin);
                if (close != kNone) {
                    out.push_back({begin, close, Kind::doc_string});
                    i = close;
                    continue;
                }
            }
            const uint32_t c = t.p[i];
            Prefix string;
            if (c == '\n') {
                fresh = compat || i == 0 || t.p[i - 1] != '\\';
                ++i;
            } else if (c == '#') {
                const size_t e = t.line_end(i);
                out.push_back({i, e, Kind::comment});
                i = e;
            } else if ((c == '"' || c == '\'' || is_letter(c)) && prefix(i, &string)) {
                i += string.length;
                i = string.format ? formatted(i, string.raw) : plain(i, string.raw);
            } else if (is_word(c)) i = is_digit(c) ? number(i) : t.skip_word(i);
            else {
                if (c == '(' || c == '[' || c == '{') ++depth;
                else if ((c == ')' || c == ']' || c == '}') && depth > 0) --depth;
                if (c == '\\' && compat && t.at(i + 1) == '\n') {
                    ++i;
                    fresh = true;
                }
                ++i;
            }
        }
    }
};

}  // namespace

LEXER(lex_python) { Python<C>{t, out, mode.compat}.run(); }
INSTANTIATE_LEXER(lex_python)

}  // namespace lex
