// Counts for Go, and the lines and returns of Python that the released filter counts in its text.
#include "scan.h"

namespace lex {
namespace {

struct GoCounts {
    size_t lines = 0, functions = 0, imports = 0, block_imports = 0, variables = 0, simple_variables = 0, returns = 0, types = 0,
           prints = 0;
};

// func in the first column, perhaps a receiver of name and type, a name, parameters, perhaps results in parentheses or one
// word of brackets and word characters; the match ends behind the white space that follows. Without a body, that word may be
// the next line's `func`: then that one does not count, as in the release.
template <class C>
size_t go_function(const Text<C>& t, size_t i, Next<C>& close) {
    i = word_then_space(t, i, "func");
    if (i == kNone) return kNone;
    if (t.at(i) == '(') {  // the receiver
        const size_t name = t.skip_space(i + 1), name_end = t.skip_word(name);
        size_t type = t.skip_space(name_end);
        if (name_end == name || type == name_end) return kNone;
        if (t.at(type) == '*') ++type;
        const size_t type_end = t.skip_word(type), end = t.skip_space(type_end);
        if (type_end == type || t.at(end) != ')') return kNone;
        i = t.skip_space(end + 1);
    }
    const size_t name_end = t.skip_word(i), open = t.skip_space(name_end);
    if (name_end == i || t.at(open) != '(') return kNone;
    const size_t end = close(open + 1);
    if (end == kNone) return kNone;
    size_t e = t.skip_space(end + 1);
    if (t.at(e) == '(') {
        const size_t results = close(e + 1);
        if (results != kNone && results > e + 1) e = results + 1;
    } else
        while (is_word(t.at(e)) || t.at(e) == '[' || t.at(e) == ']') ++e;
    return t.skip_space(e);
}

// return with nothing or with the rest of a line (which the white space behind it may start), perhaps a semicolon.
template <class C>
size_t go_return(const Text<C>& t, size_t j) {
    if (!t.is(j, "return")) return kNone;
    const size_t r = j + 6, k = t.skip_space(r);
    auto ends = [&](size_t e) {  // perhaps a semicolon, then the line end
        const size_t s = t.skip_space(e);
        if (t.at(s) == ';') {
            const size_t end = rest_is_blank(t, s + 1);
            if (end != kNone) return end;
        }
        return rest_is_blank(t, e);
    };
    if (k > r && k < t.n && t.p[k] != ';') {
        size_t m = k;
        while (m < t.n && t.p[m] != ';' && t.p[m] != '\n') ++m;
        const size_t end = ends(m);
        if (end != kNone) return end;
    }
    return ends(r);
}

// Lines that are `import "path"`, or open a block of imports, and the lines inside such blocks.
template <class C>
void count_imports(const Text<C>& t, GoCounts& n) {
    bool inside = false;
    for (size_t i = 0; i < t.n;) {
        const size_t line_end = t.line_end(i);
        size_t b = t.skip_blanks(i), e = line_end;
        while (e > b && is_space(t.p[e - 1])) --e;
        const Text<C> line{t.p + b, e - b};
        if (inside) {
            if (line.n == 1 && line.p[0] == ')') inside = false;
            else if (line.n > 0) ++n.block_imports;
        } else if (line.n == 8 && line.is(0, "import (")) {
            inside = true;
            ++n.imports;
        } else {
            const size_t q = word_then_space(line, 0, "import");
            if (q != kNone && line.at(q) == '"') n.imports += line.find('"', q + 1) == line.n - 1 && line.n > q + 2;
        }
        i = line_end + 1;
    }
}

// The released expression for variables: var and const declarations with a type or a value, :=, and simple groups.
template <class C>
size_t go_variable(const Text<C>& t, size_t j, Next<C>& close) {
    auto list = [&](size_t i) {  // names with commas between them
        size_t e = t.skip_word(i);
        if (e == i) return kNone;
        for (;;) {
            const size_t comma = t.skip_space(e);
            if (t.at(comma) != ',') return e;
            const size_t name = t.skip_space(comma + 1), end = t.skip_word(name);
            if (end == name) return e;
            e = end;
        }
    };
    auto to_line_end = [&](size_t i) {
        while (i < t.n && t.p[i] != ';' && t.p[i] != '\n') ++i;
        return i;
    };
    size_t name = word_then_space(t, j, "var");
    if (name == kNone) name = word_then_space(t, j, "const");
    if (name != kNone) {
        if (t.at(name) == '(') {
            const size_t end = close(name + 1);
            return end == kNone || t.skip_space(name + 1) == end ? kNone : end + 1;
        }
        const size_t e = list(name);
        if (e == kNone) return kNone;
        const size_t next = t.skip_space(e);
        const uint32_t c = t.at(next);
        if (c == '=') return to_line_end(next + 1);
        if (next > e && (is_word(c) || c == '[' || c == '*')) return to_line_end(next);
    }
    const size_t e = list(j);
    if (e == kNone) return kNone;
    const size_t next = t.skip_space(e);
    return t.is(next, ":=") ? to_line_end(next + 2) : kNone;
}

template <class C>
GoCounts count_go(const Text<C>& t) {
    GoCounts n;
    n.lines = filled_lines(t);
    n.prints = lines_with(t, "fmt.Print");
    count_imports(t, n);
    Next<C> close{t, ')'}, brace{t, '}'};
    for (size_t i = 0; i < t.n;) {  // ^func needs no white space before it
        const size_t e = t.line_start(i) ? go_function(t, i, close) : kNone;
        n.functions += e != kNone;
        if (e != kNone && t.line_start(e)) i = e;
        else i = t.line_end(e == kNone ? i : e) + 1;
    }
    each_line(t, [&](size_t j) {  // type, a name, struct or interface, braces
        const size_t name = word_then_space(t, j, "type");
        if (name == kNone) return kNone;
        const size_t e = t.skip_word(name), kind = t.skip_space(e);
        if (e == name || kind == e) return kNone;
        size_t open = t.is(kind, "struct") ? kind + 6 : t.is(kind, "interface") ? kind + 9 : kNone;
        if (open == kNone) return kNone;
        open = t.skip_space(open);
        const size_t end = t.at(open) == '{' ? brace(open + 1) : kNone;
        if (end == kNone) return kNone;
        ++n.types;
        return end + 1;
    });
    each_line(t, [&](size_t j) {
        const size_t e = go_return(t, j);
        n.returns += e != kNone;
        return e;
    });
    each_line(t, [&](size_t j) {
        const size_t e = go_variable(t, j, close);
        n.variables += e != kNone;
        return e;
    });
    each_line(t, [&](size_t j) {  // var, a name, a type of one word, nothing else
        const size_t name = word_then_space(t, j, "var");
        if (name == kNone) return kNone;
        const size_t e = t.skip_word(name), type = t.skip_space(e), type_end = t.skip_word(type);
        if (e == name || type == e || type_end == type) return kNone;
        const size_t s = t.skip_space(type_end);
        size_t end = t.at(s) == ';' ? rest_is_blank(t, s + 1) : kNone;
        if (end == kNone) end = rest_is_blank(t, type_end);
        n.simple_variables += end != kNone;
        return end;
    });
    return n;
}

struct PythonCounts {
    size_t lines = 0, passes = 0, imports = 0, prints = 0, returns = 0;
};

// return and the rest of the line; the white space behind it may run over a line end, and then takes the next line along.
template <class C>
size_t python_return(const Text<C>& t, size_t j) {
    if (!t.is(j, "return")) return kNone;
    const size_t r = j + 6, k = t.skip_space(r);
    if (k == r && k < t.n) return kNone;
    return k < t.n ? rest_is_blank(t, t.line_end(k)) : rest_is_blank(t, r);
}

template <class C>
bool holds_nocase(const Text<C>& line, std::string_view word) {
    for (size_t i = 0; i + word.size() <= line.n; ++i)
        if (lower(line.p[i]) == static_cast<unsigned char>(word[0]) && line.is_nocase(i, word)) return true;
    return false;
}

template <class C>
PythonCounts count_python(const Text<C>& t, bool strict) {
    PythonCounts n;
    n.lines = filled_lines(t);
    n.prints = lines_with(t, "print", strict);
    for (size_t i = 0; i < t.n;) {
        const size_t e = t.line_end(i);
        const Text<C> line{t.p + i, e - i};
        n.passes += holds_nocase(line, "pass");
        n.imports += holds_nocase(line, "import");
        i = e + 1;
    }
    each_line(t, [&](size_t j) {
        const size_t e = python_return(t, j);
        n.returns += e != kNone;
        return e;
    });
    return n;
}

py::tuple scan_go(const py::str& code) {
    GoCounts n;
    with_text(code, [&](const auto& t) { n = count_go(t); });
    return py::make_tuple(n.lines, n.functions, n.imports, n.block_imports, n.variables, n.simple_variables, n.returns, n.types,
                          n.prints);
}
py::tuple scan_python(const py::str& code, bool strict) {
    PythonCounts n;
    with_text(code, [&](const auto& t) { n = count_python(t, strict); });
    return py::make_tuple(n.lines, n.passes, n.imports, n.prints, n.returns);
}
// Lines that are not blank, and those of them that hold the text.
py::tuple scan_lines(const py::str& code, std::string_view needle) {
    size_t lines = 0, found = 0;
    with_text(code, [&](const auto& t) {
        lines = filled_lines(t);
        found = lines_with(t, needle);
    });
    return py::make_tuple(lines, found);
}

}  // namespace
}  // namespace lex

void add_scan_go(py::module_& m) {
    m.def("scan_go", &lex::scan_go, py::arg("code"),
          "lines, functions, imports, block_imports, variables, simple_variables, returns, types, prints");
    m.def("scan_python", &lex::scan_python, py::arg("code"), py::arg("strict"), "lines, passes, imports, prints, returns");
    m.def("scan_lines", &lex::scan_lines, py::arg("code"), py::arg("needle"), "lines, lines that hold the text");
}
