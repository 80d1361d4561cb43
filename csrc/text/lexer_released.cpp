// The tokens of Pygments for more languages, as far as they tell comments from code: Java, C#, Go, Rust, PHP, SQL, JSON and
// those it knows no comments of (CSS, where they count as code). Compat mode only; the default mode reads its tables.
#include "lexer.h"

namespace lex {
namespace {

// The end of a literal whose backslash takes the next character along, over lines; quotes that never close are counted.
template <class C>
size_t literal(const Text<C>& t, size_t i, int* unclosed) {
    if (*unclosed >= kMaxUnclosed) return i + 1;
    const size_t e = close_string(t, i, t.p[i], true);
    if (e != kNone) return e;
    ++*unclosed;
    return i + 1;
}

// 'x' or '\x', any x; else past the quote alone.
template <class C>
size_t short_character(const Text<C>& t, size_t i) {
    if (t.at(i + 1) == '\\') return t.at(i + 3) == '\'' ? i + 4 : i + 1;
    return t.at(i + 2) == '\'' && t.at(i + 1) != kEnd ? i + 3 : i + 1;
}

}  // namespace

// Behind `class`, `interface`, `module`, and `record` at a line start everything up to a name is skipped.
LEXER(lex_java) {
    (void)mode;
    Closer block{"*/"};
    auto to_name = [&](size_t i) {
        while (i < t.n && !starts_name(t.p[i])) ++i;
        return t.skip_name(i);
    };
    auto is_modifier = [&](size_t i, size_t e) {
        return t.word_is(i, e, "public") || t.word_is(i, e, "private") || t.word_is(i, e, "protected") || t.word_is(i, e, "static") ||
               t.word_is(i, e, "strictfp");
    };
    size_t i = 0;
    bool fresh = true;  // only white space and modifiers since the line start
    while (i < t.n) {
        const uint32_t c = t.p[i];
        if (is_space(c)) {
            if (c == '\n') fresh = true;
            ++i;
            continue;
        }
        const bool first = fresh;
        fresh = false;
        if (c == '/' && t.at(i + 1) == '/') {
            const size_t e = t.line_end(i);
            if (e < t.n) out.push_back({i, e, Kind::comment});
            i = e;
        } else if (c == '/' && t.at(i + 1) == '*') {
            const size_t close = block.find(t, i + 2);
            if (close != kNone) out.push_back({i, close + 2, Kind::comment});
            i = close == kNone ? i + 2 : close + 2;
        } else if (c == '@' && starts_name(t.at(i + 1)) && t.at(i + 1) != '$') {
            for (++i; is_word(t.at(i)) || t.at(i) == '.'; ++i) {}
        } else if (c == '.' && starts_name(t.at(i + 1))) i = t.skip_name(i + 1);
        else if (starts_name(c)) {
            const size_t e = t.skip_name(i), w = t.skip_word(i);
            if (t.word_is(i, w, "class") || t.word_is(i, w, "interface") || t.word_is(i, w, "module") ||
                (first && t.word_is(i, w, "record"))) {
                // `void record(` is a method: its name follows a type.
                const bool call = !t.word_is(i, w, "class") && !first && t.at(t.skip_space(e)) == '(';
                i = call ? e : to_name(w);
            } else {
                fresh = first && is_modifier(i, e);
                i = e;
            }
        } else if (c == '"') {
            const bool text = t.is(i, "\"\"\"\n");
            for (i += text ? 4 : 1; i < t.n; ++i) {
                if (t.p[i] == '\\' && (t.at(i + 1) == '\\' || t.at(i + 1) == '"')) ++i;
                else if (text ? t.is(i, "\"\"\"") : t.p[i] == '"') break;
            }
            i = std::min(i + (text ? 3 : 1), t.n);
        } else if (c == '\'') {
            size_t e = short_character(t, i);
            if (e == i + 1 && t.is(i + 1, "\\u") && t.at(i + 7) == '\'') e = i + 8;
            i = e;
        } else ++i;
    }
}

LEXER(lex_csharp) {
    (void)mode;
    Closer block{"*/"}, bracket{"]"}, triple{"\"\"\""};
    size_t i = 0;
    bool fresh = true;
    while (i < t.n) {
        const uint32_t c = t.at(i);
        if (fresh) {  // an attribute list, whatever is in it
            fresh = false;
            const size_t j = t.skip_space(i);
            const size_t close = t.at(j) == '[' ? bracket.find(t, j) : kNone;
            i = close == kNone ? j : close + 1;  // the line starts in between would find the same
            continue;
        }
        if (c == '\n') {
            fresh = true;
            ++i;
        } else if (c == '/' && t.at(i + 1) == '/') {
            const size_t e = t.line_end(i);
            if (e < t.n) out.push_back({i, e + 1, Kind::comment});
            i = e + 1;
            fresh = true;
        } else if (c == '/' && t.at(i + 1) == '*') {
            const size_t close = block.find(t, i + 2);
            if (close != kNone) out.push_back({i, close + 2, Kind::comment});
            i = close == kNone ? i + 2 : close + 2;
        } else if (is_word(c)) i = t.skip_word(i);
        else if (c == '"' && t.is(i, "\"\"\"") && !triple.gone) {
            size_t close = triple.find(t, i + 3);
            if (close == kNone) continue;
            for (close += 3; t.at(close) == '"'; ++close) {}
            i = close;
        } else if (c == '"' || ((c == '@' || c == '$') && (t.at(i + 1) == '"' || ((t.is(i, "$@") || t.is(i, "@$")) && t.at(i + 2) == '"')))) {
            const size_t quote = t.find('"', i);
            if (c == '$' && t.is(quote, "\"\"\"") && !triple.gone) {
                i = quote;
                continue;
            }
            if (c == '@' || quote == i + 2) {  // verbatim: two quotes are one
                for (i = quote + 1; i < t.n; ++i) {
                    if (t.p[i] != '"') continue;
                    if (t.at(i + 1) != '"') break;
                    ++i;
                }
                i = std::min(i + 1, t.n);
            } else {  // ends with its line at the latest
                size_t j = quote + 1;
                for (; j < t.n && t.p[j] != '"' && t.p[j] != '\n'; ++j)
                    if (t.p[j] == '\\') ++j;
                i = std::min(j + 1, t.n);
                fresh = t.p[i - 1] == '\n';
            }
        } else if (c == '\'') i = short_character(t, i);
        else if (c == '#') {
            const size_t j = t.skip_blanks(i + 1), e = t.skip_word(j);
            bool directive = false;
            for (std::string_view name : {"if", "endif", "else", "elif", "define", "undef", "line", "error", "warning", "region",
                                          "endregion", "pragma"})
                directive = directive || t.word_is(j, e, name);
            if (!directive) ++i;
            else {
                i = std::min(t.line_end(e) + 1, t.n);
                fresh = true;
            }
        } else ++i;
    }
}

LEXER(lex_go) {
    (void)mode;
    Closer block{"*/"}, raw{"`"};
    int unclosed = 0;
    size_t i = 0;
    while (i < t.n) {
        const uint32_t c = t.p[i];
        if (c == '/' && t.at(i + 1) == '/') {
            const size_t e = t.line_end(i);
            out.push_back({i, e, Kind::comment});
            i = e;
        } else if (c == '/' && t.at(i + 1) == '*') {
            const size_t close = block.find(t, i + 2);
            if (close != kNone) out.push_back({i, close + 2, Kind::comment});
            i = close == kNone ? i + 2 : close + 2;
        } else if (c == '`') {
            const size_t close = raw.find(t, i + 1);
            i = close == kNone ? i + 1 : close + 1;
        } else if (c == '"') i = literal(t, i, &unclosed);
        else if (c == '\'') {
            size_t j = i + 1;
            if (t.at(j) == '\\') {
                const uint32_t kind = t.at(j + 1);
                j += kind == 'x' ? 4 : kind == 'u' ? 6 : kind == 'U' ? 10 : 2;
                if (kind >= '0' && kind <= '7')
                    while (j < i + 5 && t.at(j) >= '0' && t.at(j) <= '7') ++j;
            } else ++j;
            i = t.at(j) == '\'' ? j + 1 : i + 1;
        } else i = is_word(c) ? t.skip_word(i) : i + 1;
    }
}

// Documentation comments are Pygments' doc strings: comments for the filter as well. Block comments nest.
LEXER(lex_rust) {
    (void)mode;
    size_t i = 0;
    int unclosed = 0;
    if (t.is(0, "#!") && t.at(2) != '[' && t.at(2) != '\n') i = t.line_end(0);
    auto nested = [&](size_t j) {
        for (int depth = 1; j < t.n;) {
            if (t.is(j, "/*")) ++depth, j += 2;
            else if (t.is(j, "*/")) {
                j += 2;
                if (--depth == 0) return j;
            } else ++j;
        }
        return t.n;
    };
    auto attribute = [&](size_t j) {  // from behind #[ to behind its bracket; only strings are seen
        for (int depth = 1; j < t.n; ++j) {
            if (t.p[j] == '"') {
                const size_t e = close_string(t, j, '"', true);
                if (e == kNone) return t.n;
                j = e - 1;
            } else if (t.p[j] == '[') ++depth;
            else if (t.p[j] == ']' && --depth == 0) return j + 1;
        }
        return t.n;
    };
    auto raw = [&](size_t quote, size_t hashes) {
        for (size_t j = quote + 1; (j = t.find('"', j)) != kNone; ++j) {
            size_t k = 0;
            while (k < hashes && t.at(j + 1 + k) == '#') ++k;
            if (k == hashes) return j + 1 + k;
        }
        return kNone;
    };
    while (i < t.n) {
        const uint32_t c = t.p[i];
        if (c == '/' && t.at(i + 1) == '/') {
            const size_t e = t.line_end(i);
            if (e < t.n) out.push_back({i, e + 1, Kind::comment});
            i = e + 1;
        } else if (c == '/' && t.at(i + 1) == '*') {
            const size_t e = nested(i + 2);
            out.push_back({i, e, Kind::comment});
            i = e;
        } else if (c == '#' && (t.at(i + 1) == '[' || (t.at(i + 1) == '!' && t.at(i + 2) == '['))) {
            i = attribute(i + (t.at(i + 1) == '[' ? 2 : 3));
        } else if (c == '"') {
            const size_t e = close_string(t, i, '"', true);
            i = e == kNone ? t.n : e;
        } else if (is_word(c)) {
            size_t e = t.skip_word(i);
            const size_t r = e - 1;
            if (t.p[r] == 'r' && (e - i == 1 || (e - i == 2 && t.p[i] == 'b')) && (t.at(e) == '"' || t.at(e) == '#')) {
                size_t quote = e;
                while (t.at(quote) == '#') ++quote;
                const size_t close = t.at(quote) == '"' && unclosed < kMaxUnclosed ? raw(quote, quote - e) : kNone;
                if (close != kNone) e = close;
                else if (t.at(quote) == '"') ++unclosed;
            }
            i = e;
        } else if (c == '\'') {
            size_t j = i + 1;
            const uint32_t kind = t.at(j + 1);
            if (t.at(j) == '\\' && kind == 'u' && t.at(j + 2) == '{') {
                for (j += 3; is_hex(t.at(j)); ++j) {}
                ++j;
            } else if (t.at(j) == '\\') j += kind == 'x' ? 4 : 2;
            else if (t.at(j) != '\n') ++j;
            i = t.at(j) == '\'' ? j + 1 : i + 1;
        } else ++i;
    }
}

namespace {
template <class C>
struct Php {
    const Text<C>& t;
    Spans& out;
    Closer block{"*/"};
    int unclosed = 0;
    std::vector<char> brackets{};  // '[' an attribute, '(' its parameters, '{' ${

    bool starts_ident(uint32_t c) const { return c == '_' || is_letter(c) || (c > 127 && c != kEnd); }
    size_t ident(size_t i, bool backslash) const {
        while (is_word(t.at(i)) || (t.at(i) > 127 && i < t.n) || (backslash && t.at(i) == '\\')) ++i;
        return i;
    }
    // Past the line that ends a here document opened at i, or kNone.
    size_t here_document(size_t i) {
        size_t j = i + 3;
        const uint32_t quote = t.at(j) == '"' || t.at(j) == '\'' ? t.at(j) : kEnd;
        if (quote != kEnd) ++j;
        if (!starts_ident(t.at(j)) || unclosed >= kMaxUnclosed) return kNone;
        const size_t end = ident(j, false), length = end - j;
        size_t k = end;
        if (quote != kEnd && t.at(k++) != quote) return kNone;
        if (t.at(k) != '\n') return kNone;
        for (k = t.line_end(k + 1); k < t.n; k = t.line_end(k + 1)) {  // at least one line, then the name on its own
            size_t m = t.skip_space(k);
            if (m + length > t.n) continue;
            bool same = true;
            for (size_t q = 0; q < length; ++q) same = same && lower(t.p[m + q]) == lower(t.p[j + q]);
            m += length;
            if (t.at(m) == ';') ++m;
            if (same && t.at(m) == '\n') return m + 1;
        }
        ++unclosed;
        return kNone;
    }
    size_t string(size_t i) const {
        for (; i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == '"') return i + 1;
            if (c == '\\' && (t.at(i + 1) == '"' || t.at(i + 1) == '\\' || t.at(i + 1) == '$')) ++i;
            else if (c == '{' && t.at(i + 1) == '$') {  // {$a["b"]}
                const size_t close = t.find('}', i);
                if (close != kNone) i = close;
            } else if (c == '$' && starts_ident(t.at(i + 1))) {
                size_t e = ident(i + 1, false);
                if (t.at(e) == '[') {  // [\S+?\]
                    size_t k = e + 2;
                    while (k < t.n && t.p[k] != ']' && !is_space(t.p[k])) ++k;
                    if (t.at(k) == ']' && !is_space(t.at(e + 1))) e = k + 1;
                }
                i = e - 1;
            }
        }
        return t.n;
    }

    // From behind <?php: past ?>.
    size_t code(size_t i) {
        while (i < t.n) {
            const uint32_t c = t.p[i];
            const char top = brackets.empty() ? 0 : brackets.back();
            if (top == '[' && c == ']') brackets.pop_back(), ++i;
            else if (top == '[' && c == '(') brackets.push_back('('), ++i;
            else if (top == '(' && c == ')') brackets.pop_back(), ++i;
            else if (top == '{' && c == '}') brackets.pop_back(), ++i;
            else if (c == '?' && t.at(i + 1) == '>') {
                i += 2;
                if (brackets.empty()) return i;
                brackets.pop_back();
            } else if (c == '<' && t.is(i, "<<<")) {
                const size_t e = here_document(i);
                if (e != kNone) i = e;
                else i = operators(i);
            } else if (c == '#' && t.at(i + 1) == '[') brackets.push_back('['), i += 2;
            else if (c == '#' || (c == '/' && t.at(i + 1) == '/')) {
                const size_t e = t.line_end(i);
                if (e < t.n) out.push_back({i, e + 1, Kind::comment});
                i = std::min(e + 1, t.n);
            } else if (c == '/' && t.at(i + 1) == '*') {
                const bool empty = t.is(i, "/**/");
                const size_t close = empty ? i + 2 : block.find(t, i + (t.at(i + 2) == '*' ? 3 : 2));
                if (close != kNone) out.push_back({i, close + 2, Kind::comment});
                i = close == kNone ? operators(i) : close + 2;
            } else if (is_operator(c)) i = operators(i);
            else if (starts_ident(c) || c == '\\') {
                const size_t e = ident(i, true);
                i = e;
                if (t.is_nocase(e - 5, "class") && e >= 5 && is_space(t.at(e)))  // up to the next name
                    for (i = t.skip_space(e); i < t.n && !starts_ident(t.p[i]) && t.p[i] != '\\' && t.p[i] != '\n'; ++i) {}
            } else if (c == '$' && t.at(i + 1) == '{') brackets.push_back('{'), i += 2;
            else if (c == '\'' || c == '`') i = literal(t, i, &unclosed);
            else if (c == '"') i = string(i + 1);
            else ++i;
        }
        return t.n;
    }
    static bool is_operator(uint32_t c) {
        return c < 128 && std::string_view("~!%^&*+=|:.<>/@-").find(static_cast<char>(c)) != std::string_view::npos;
    }
    // A run of operators is one token: a comment mark that follows one directly is not seen.
    size_t operators(size_t i) const {
        while (is_operator(t.at(i))) ++i;
        return i;
    }
};
}  // namespace

LEXER(lex_php) {
    (void)mode;
    Php<C> php{t, out};
    for (size_t i = 0; (i = t.find("<?", i)) != kNone;) {
        i += 2;
        if (t.is_nocase(i, "php")) i += 3;
        i = php.code(i);
    }
}

LEXER(lex_sql) {
    (void)mode;
    Closer quote[2] = {{"'"}, {"\""}};
    size_t i = 0;
    while (i < t.n) {
        const uint32_t c = t.p[i];
        if (c == '-' && t.at(i + 1) == '-') {
            const size_t e = std::min(t.line_end(i) + 1, t.n);
            out.push_back({i, e, Kind::comment});
            i = e;
        } else if (c == '/' && t.at(i + 1) == '*') {
            size_t j = i + 2;
            for (int depth = 1; j < t.n && depth > 0;) {
                if (t.is(j, "/*")) ++depth, j += 2;
                else if (t.is(j, "*/")) --depth, j += 2;
                else ++j;
            }
            out.push_back({i, j, Kind::comment});
            i = j;
        } else if (c == '\'' || c == '"') {
            const size_t close = quote[c == '"'].find(t, i + 1);
            i = close == kNone ? i + 1 : close + 1;
        } else ++i;
    }
}

LEXER(lex_json) {
    (void)mode;
    size_t i = 0;
    while (i < t.n) {
        const uint32_t c = t.p[i];
        if (c == '"') {
            const size_t e = close_string(t, i, '"', true);
            i = e == kNone ? t.n : e;
        } else if (c == '/' && t.at(i + 1) == '/') {
            const size_t e = t.line_end(i);
            out.push_back({i, e, Kind::comment});
            i = e;
        } else if (c == '/' && t.at(i + 1) == '*') {
            const size_t close = t.find("*/", i + 2);
            const size_t e = close == kNone ? t.n : close + 2;
            if (close != kNone) out.push_back({i, e, Kind::comment});
            i = e;
        } else ++i;
    }
}

LEXER(lex_nothing) {
    (void)t;
    (void)mode;
    (void)out;
}

INSTANTIATE_LEXER(lex_java)
INSTANTIATE_LEXER(lex_csharp)
INSTANTIATE_LEXER(lex_go)
INSTANTIATE_LEXER(lex_rust)
INSTANTIATE_LEXER(lex_php)
INSTANTIATE_LEXER(lex_sql)
INSTANTIATE_LEXER(lex_json)
INSTANTIATE_LEXER(lex_nothing)

}  // namespace lex
