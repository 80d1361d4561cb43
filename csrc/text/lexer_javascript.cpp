// JavaScript and TypeScript: comments, strings, templates and regular expression literals. Whether a slash divides or
// opens a regular expression follows from the token before it. In compat mode that choice, and what `}` closes inside a
// template, are those of Pygments' lexer.
#include "lexer.h"

namespace lex {
namespace {

// After these a slash opens a regular expression: compat, as Pygments lists them.
constexpr std::string_view kReleasedKeywords[] = {
    "typeof", "instanceof", "in", "void", "delete", "new", "for", "while", "do", "break", "return", "continue", "switch", "case",
    "default", "if", "else", "throw", "try", "catch", "finally", "yield", "await", "async", "this", "of", "static", "export",
    "import", "debugger", "extends", "super", "var", "let", "const", "with", "function", "class"};
constexpr std::string_view kReleasedTypeScript[] = {"abstract", "implements", "private", "protected", "public", "readonly", "enum",
                                                    "interface", "override"};
// And in the language itself.
constexpr std::string_view kKeywords[] = {"typeof", "instanceof", "in", "void", "delete", "new", "do", "return", "case", "default",
                                          "else", "throw", "yield", "await", "of", "extends"};

template <class C>
struct JavaScript {
    const Text<C>& t;
    Spans& out;
    bool compat, typescript;
    bool regex = true;  // may a slash open a regular expression here?
    // Brackets open in each `${`; compat counts none.
    std::vector<int> templates{};
    Closer block{"*/"};
    size_t quiet = 0;    // no annotation starts before here
    size_t divided = 0;  // no regular expression literal starts before here
    int unclosed = 0;

    template <size_t N>
    bool among(size_t i, size_t e, const std::string_view (&words)[N]) const {
        for (const auto& w : words)
            if (t.word_is(i, e, w)) return true;
        return false;
    }

    // Past a regular expression literal at i and its flags, or kNone.
    size_t regex_literal(size_t i) {
        const size_t open = i;
        if (i < divided) return kNone;
        for (++i; i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == '\\') ++i;
            else if (c == '\n') break;
            else if (c == '[') {
                for (++i; i < t.n && t.p[i] != ']' && t.p[i] != '\n'; ++i)
                    if (t.p[i] == '\\') ++i;
                if (t.at(i) != ']') break;
            } else if (c == '/') {
                if (i == open + 1) return kNone;
                size_t e = i + 1;
                if (!compat) return t.skip_name(e);
                while (is_flag(t.at(e))) ++e;
                return is_word(t.at(e)) ? kNone : e;
            }
        }
        divided = i;
        return kNone;
    }
    static bool is_flag(uint32_t c) { return c == 'g' || c == 'i' || c == 'm' || c == 'u' || c == 'y' || c == 's' || c == 'd'; }

    size_t number(size_t i) const {
        const uint32_t kind = lower(t.at(i + 1));
        if (t.p[i] == '0' && (kind == 'x' || kind == 'b' || kind == 'o')) {
            for (i += 2; is_hex(t.at(i)); ++i) {}
            return i;
        }
        while (is_digit(t.at(i))) ++i;
        if (t.at(i) == '.' && is_digit(t.at(i - 1)))
            for (++i; is_digit(t.at(i)); ++i) {}
        return i;
    }

    // Inside a template, from behind its backtick or the brace that closed an expression: past the end, or past `${`.
    size_t template_text(size_t i) {
        for (; i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == '\\') ++i;
            else if (c == '`') {
                regex = false;
                return i + 1;
            } else if (c == '$' && t.at(i + 1) == '{') {
                templates.push_back(0);
                regex = compat ? false : true;
                return i + 2;
            }
        }
        return t.n;
    }

    // TypeScript's `name : type`, one token for Pygments: its end, or kNone. Nothing inside the name starts another.
    size_t annotation(size_t i) {
        if (i < quiet) return kNone;
        auto part = [&](uint32_t c) { return is_word(c) || c == '?' || c == '.' || c == '$'; };
        if (!part(t.at(i))) return kNone;
        while (part(t.at(i))) ++i;
        quiet = i;
        i = t.skip_space(i);
        if (t.at(i) != ':') return kNone;
        i = t.skip_space(i + 1);
        if (!part(t.at(i))) return kNone;
        quiet = 0;
        while (part(t.at(i))) ++i;
        return i;
    }

    size_t slash(size_t i) {
        const uint32_t next = t.at(i + 1);
        if (next == '/') {
            const size_t e = t.line_end(i);
            out.push_back({i, e, Kind::comment});
            return e;
        }
        if (next == '*') {
            const size_t close = block.find(t, i + 2);
            if (close != kNone) {
                out.push_back({i, close + 2, Kind::comment});
                return close + 2;
            }
            if (!compat) {
                out.push_back({i, t.n, Kind::comment});
                return t.n;
            }
        }
        if (regex) {
            const size_t e = regex_literal(i);
            regex = false;
            if (e != kNone) return e;
            return compat ? t.line_end(i) : i + 1;
        }
        regex = true;
        return i + 1;
    }

    size_t word(size_t i) {
        const size_t e = t.skip_word(i);
        const bool member = !compat && i > 0 && t.p[i - 1] == '.' && !(i > 1 && t.p[i - 2] == '.');
        if (compat ? among(i, e, kReleasedKeywords) || (typescript && among(i, e, kReleasedTypeScript))
                   : !member && among(i, e, kKeywords)) {
            regex = true;
            return e;
        }
        regex = false;
        // Pygments lets a name that `() {` follows be followed by a regular expression; the brace says so anyway.
        return t.skip_name(e);
    }

    void run() {
        size_t i = 0;
        regex = !compat;
        if (t.is(0, "#!") && (!compat || t.at(2) == '/' || t.is(2, " /"))) {
            i = t.line_end(0);
            out.push_back({0, i, Kind::hashbang});
        }
        while (i < t.n) {
            const uint32_t c = t.p[i];
            if (compat && t.line_start(i) && (is_space(c) || c == '/' || t.is(i, "<!--"))) {
                regex = true;
            }
            if (is_space(c)) i = t.skip_space(i);
            else if (compat && typescript && i >= quiet && (is_word(c) || c == '?' || c == '.' || c == '$')) {
                const size_t e = t.skip_word(i);
                if (e > i && among(i, e, kReleasedTypeScript)) {
                    regex = true;
                    i = e;
                    continue;
                }
                const size_t end = keyword_type(i, e) ? kNone : annotation(i);
                if (end != kNone) {
                    regex = false;
                    i = end;
                    continue;
                }
                if (is_digit(c)) {
                    i = number(i);
                    regex = false;
                } else if (is_word(c)) i = word(i);
                else {
                    punctuation(i, c);
                    ++i;
                }
            } else if (c == '/') i = slash(i);
            else if (is_digit(c)) {
                i = number(i);
                regex = false;
            } else if (is_word(c)) i = word(i);
            else if (c == '"' || c == '\'') {
                const size_t e = unclosed < kMaxUnclosed ? close_string(t, i, c, compat) : kNone;
                if (e == kNone && compat) ++unclosed;
                regex = false;
                i = e != kNone ? e : compat ? i + 1 : t.line_end(i);
            } else if (c == '`') i = template_text(i + 1);
            else if (c == '}' && !templates.empty() && (compat || templates.back() == 0)) {
                templates.pop_back();
                i = template_text(i + 1);
            } else {
                punctuation(i, c);
                ++i;
            }
        }
    }
    bool keyword_type(size_t i, size_t e) const {
        return t.word_is(i, e, "declare") || t.word_is(i, e, "type") || t.word_is(i, e, "string") || t.word_is(i, e, "boolean") ||
               t.word_is(i, e, "number");
    }
    void punctuation(size_t i, uint32_t c) {
        if (c == '{' || c == '}') {
            if (!templates.empty()) templates.back() += c == '{' ? 1 : -1;
        }
        switch (c) {
            case '}': regex = !compat; break;
            case ')': case ']': case '.': case '$': case '#': case '@': regex = false; break;
            case '+': case '-':  // after ++ and -- a slash divides
                regex = compat || !(i > 0 && t.p[i - 1] == static_cast<C>(c));
                break;
            case '>': regex = !(compat && i > 0 && t.p[i - 1] == '='); break;  // Pygments: not after =>
            case '\\': if (t.at(i + 1) == '\n') regex = true; break;
            case '{': case '(': case '[': case ';': case ',': case '~': case '?': case ':': case '<': case '=': case '!':
            case '*': case '|': case '&': case '%': case '^': regex = true; break;
            default: break;
        }
    }
};

}  // namespace

LEXER(lex_javascript) { JavaScript<C>{t, out, mode.compat, false}.run(); }
LEXER(lex_typescript) { JavaScript<C>{t, out, mode.compat, true}.run(); }
INSTANTIATE_LEXER(lex_javascript)
INSTANTIATE_LEXER(lex_typescript)

}  // namespace lex
