// Counts for C and C++ (the released filter uses the same expressions for both).
#include "scan.h"

namespace lex {
namespace {

struct CCounts {
    size_t lines = 0, functions = 0, includes = 0, variables = 0, returns = 0, classes = 0, mains = 0, go_tos = 0, printfs = 0,
           couts = 0, directives = 0;
    bool any_variable = false;
};

// A gap of white space that may hold stars, from i. `link`: it may stand between two words of a return type (stars in one
// piece, white space behind them). `last`: it may stand before the function's name (the same, then at most one star and
// white space). Gives the gap's end.
template <class C>
size_t gap(const Text<C>& t, size_t i, bool* link, bool* last) {
    const size_t a = t.skip_space(i);
    size_t b = a;
    while (t.at(b) == '*') ++b;
    const size_t c = t.skip_space(b);
    if (b == a) {  // white space alone
        *link = *last = a > i;
        return a;
    }
    *link = c > b;
    // Either the stars belong to the gap, or one star stands behind the white space.
    *last = c > b || (a > i && b == a + 1);
    if (t.at(c) == '*' && c > b) {  // `* *name`
        const size_t d = t.skip_space(c + 1);
        *link = false;
        *last = true;
        return d;
    }
    return c;
}

// Words that neither type nor name a function: `return f(x)` declares nothing.
constexpr std::string_view kKeywords[] = {"return", "else",   "case",    "throw",     "new",      "delete",   "goto",   "if",     "while",
                                          "for",    "switch", "sizeof",  "co_return", "co_yield", "co_await", "define", "defined", "do"};
template <class C>
bool is_keyword(const Text<C>& t, size_t i, size_t e) {
    return std::any_of(std::begin(kKeywords), std::end(kKeywords), [&](auto w) { return t.word_is(i, e, w); });
}

// One or more words linked by gaps, a name with an opening parenthesis directly behind it, up to the next closing one.
template <class C>
size_t count_functions(const Text<C>& t, bool strict) {
    Next<C> close{t, ')'};
    size_t count = 0, i = 0;
    bool linked = false;  // words that may be return types stand before i, and the gap behind them may precede a name
    while (i < t.n) {
        if (!is_word(t.p[i])) {
            linked = false;
            ++i;
            continue;
        }
        const size_t e = t.skip_word(i);
        const bool name = (is_letter(t.p[i]) || t.p[i] == '_') && !(strict && is_keyword(t, i, e));
        if (t.at(e) == '(') {
            if (linked && name) {
                const size_t end = close(e + 1);
                if (end == kNone) return count;
                ++count;
                i = t.skip_space(end + 1);
            } else i = e + 1;
            linked = false;
            continue;
        }
        bool link = false, last = false;
        const size_t next = gap(t, e, &link, &last);
        linked = name && last && next > e;
        // A gap that only a name may follow: the word behind it starts afresh unless it is that name.
        if (linked && !link) {
            const size_t word = t.skip_word(next);
            linked = t.at(word) == '(' && word > next;
        }
        i = std::max(next, e);
    }
    return count;
}

// `main` at a word's start, parentheses up to the first closing one, an opening brace.
template <class C>
size_t count_mains(const Text<C>& t) {
    Next<C> close{t, ')'};
    size_t count = 0;
    for (size_t i = 0; (i = t.find("main", i)) != kNone; i += 4) {
        if (i > 0 && is_word(t.p[i - 1])) continue;
        const size_t open = t.skip_space(i + 4);
        if (t.at(open) != '(') continue;
        const size_t end = close(open + 1);
        if (end == kNone) break;
        if (t.at(t.skip_space(end + 1)) == '{') {
            ++count;
            i = t.skip_space(end + 1) + 1 - 4;
        }
    }
    return count;
}

// Whether somewhere a word is followed by names (with stars, brackets, values) in a list with commas, up to a semicolon.
template <class C>
bool any_variable(const Text<C>& t) {
    Next<C> semicolon{t, ';'};
    auto part = [&](uint32_t c) { return is_word(c) || c == '[' || c == ']'; };
    for (size_t i = 0; i < t.n;) {
        if (!is_word(t.p[i])) {
            ++i;
            continue;
        }
        i = t.skip_word(i);
        if (!is_space(t.at(i))) continue;
        for (size_t j = i;; ++j) {
            j = t.skip_space(j);
            while (t.at(j) == '*') ++j;
            j = t.skip_space(j);
            const size_t name = j;
            while (part(t.at(j))) ++j;
            if (j == name) break;
            j = t.skip_space(j);
            if (t.at(j) == ';') return true;
            if (t.at(j) == '=') return semicolon(j) != kNone;
            if (t.at(j) != ',') break;
        }
    }
    return false;
}

// `return` with nothing, a word or a string, a semicolon, and a line end.
template <class C>
size_t simple_return(const Text<C>& t, size_t j) {
    if (!t.is(j, "return")) return kNone;
    j = t.skip_space(j + 6);
    if (is_word(t.at(j))) j = t.skip_word(j);
    else if (t.at(j) == '"' || t.at(j) == '\'') j = quoted(t, j);
    if (j == kNone) return kNone;
    j = t.skip_space(j);
    return t.at(j) == ';' ? rest_is_blank(t, j + 1) : kNone;
}

// Perhaps unsigned, a type of the list, a name, a semicolon.
template <class C>
size_t simple_variable(const Text<C>& t, size_t j) {
    const size_t behind = word_then_space(t, j, "unsigned");
    if (behind != kNone) j = behind;
    for (std::string_view type : {"int", "float", "double", "char", "bool", "std::string", "auto"}) {
        const size_t name = word_then_space(t, j, type);
        if (name == kNone) continue;
        const size_t e = t.skip_word(name);
        const size_t end = t.skip_space(e);
        return e > name && t.at(end) == ';' ? end + 1 : kNone;
    }
    return kNone;
}

// Whether a line holds a preprocessor directive, `struct` or `using`.
template <class C>
bool is_directive(const Text<C>& t, size_t begin, size_t end, bool strict) {
    const Text<C> line{t.p + begin, end - begin};
    if (lines_with(line, "struct", strict) || lines_with(line, "using", strict)) return true;
    if (strict && line.at(line.skip_space(0)) != '#') return false;
    for (size_t i = 0; (i = line.find('#', i)) != kNone; ++i) {
        const size_t j = line.skip_space(i + 1);
        for (std::string_view name : {"include", "define", "if", "else", "elif", "endif", "error", "pragma", "warning", "undef", "line"})
            if (line.is(j, name)) return true;
    }
    return false;
}

template <class C>
CCounts count_c(const Text<C>& t, bool strict) {
    CCounts n;
    n.functions = count_functions(t, strict);
    n.mains = count_mains(t);
    n.any_variable = any_variable(t);
    n.go_tos = lines_with(t, "goto", strict);
    n.printfs = lines_with(t, "printf", strict);
    n.lines = filled_lines(t);
    for (size_t i = 0; i < t.n;) {
        const size_t e = t.line_end(i);
        const Text<C> line{t.p + i, e - i};
        n.couts += lines_with(line, "cout", strict) || lines_with(line, "printf", strict);
        n.directives += is_directive(t, i, e, strict);
        i = e + 1;
    }
    bool unclosed = false;  // no quote ahead
    each_line(t, [&](size_t j) {  // #include and a name in quotes of either kind
        if (t.p[j] != '#' || unclosed) return kNone;
        const size_t name = word_then_space(t, t.skip_space(j + 1), "include");
        if (name == kNone || (t.at(name) != '"' && t.at(name) != '<')) return kNone;
        size_t e = name + 1;
        while (e < t.n && t.p[e] != '"' && t.p[e] != '>') ++e;
        unclosed = e >= t.n;
        if (unclosed || e == name + 1) return kNone;
        ++n.includes;
        return e + 1;
    });
    Next<C> brace{t, '{'};
    each_line(t, [&](size_t j) {  // class, a name, perhaps a colon and bases, a brace
        const size_t name = word_then_space(t, j, "class");
        if (name == kNone) return kNone;
        size_t e = t.skip_word(name);
        if (e == name) return kNone;
        e = t.skip_space(e);
        if (t.at(e) == ':') e = brace(e);
        if (e == kNone || t.at(e) != '{') return kNone;
        ++n.classes;
        return e + 1;
    });
    each_line(t, [&](size_t j) {
        const size_t e = simple_variable(t, j);
        n.variables += e != kNone;
        return e;
    });
    each_line(t, [&](size_t j) {
        const size_t e = simple_return(t, j);
        n.returns += e != kNone;
        return e;
    });
    return n;
}

py::tuple scan_c(const py::str& code, bool strict) {
    CCounts n;
    with_text(code, [&](const auto& t) { n = count_c(t, strict); });
    return py::make_tuple(n.lines, n.functions, n.includes, n.variables, n.returns, n.classes, n.mains, n.go_tos, n.printfs, n.couts,
                          n.directives, n.any_variable);
}

}  // namespace
}  // namespace lex

void add_scan_c(py::module_& m) {
    m.def("scan_c", &lex::scan_c, py::arg("code"), py::arg("strict"),
          "lines, functions, includes, variables, returns, classes, mains, gotos, printfs, couts, directives, any_variable");
}
