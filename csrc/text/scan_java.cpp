// Counts for Java and C#.
#include "scan.h"

namespace lex {
namespace {

struct JavaCounts {
    size_t lines = 0, functions = 0, imports = 0, simple_variables = 0, variables = 0, returns = 0, classes = 0, prints = 0;
    // Of the functions: with an access word in their match, and with an ASCII letter as the match's second character (that is
    // what the released name check looks at); likewise variables with a small letter; classes with a well-formed name.
    size_t accessible = 0, function_letters = 0, variable_letters = 0, class_names = 0;
    // Default mode: names themselves.
    size_t function_names = 0, variable_names = 0, accessible_classes = 0;
};

constexpr std::string_view kAccess[] = {"public", "protected", "private"};
constexpr std::string_view kNoType[] = {"public", "private", "protected", "else", "if"};  // a type may not begin so
// Default mode: words that begin a statement, so that `return f(x)` declares nothing.
constexpr std::string_view kStatements[] = {"return", "new", "throw", "else", "if", "case", "assert", "await", "yield", "using", "goto"};
constexpr std::string_view kModifiers[] = {"public", "protected", "private", "static", "final"};

template <class C, size_t N>
bool begins_with_any(const Text<C>& t, size_t i, const std::string_view (&words)[N]) {
    return std::any_of(std::begin(words), std::end(words), [&](auto w) { return t.is(i, w); });
}
template <class C, size_t N>
bool is_any(const Text<C>& t, size_t i, size_t e, const std::string_view (&words)[N]) {
    return std::any_of(std::begin(words), std::end(words), [&](auto w) { return t.word_is(i, e, w); });
}
// Nothing but ASCII letters and digits.
template <class C>
bool is_alphanumeric(const Text<C>& t, size_t i, size_t e) {
    for (; i < e; ++i)
        if (!is_letter(t.p[i]) && !is_digit(t.p[i])) return false;
    return true;
}

struct Signature {
    size_t name, name_end, end;  // end: behind the closing parenthesis; kNone if there is no match
};

// A type that does not begin with one of kNoType (behind an optional <T>), white space, a name, and parentheses up to the
// first closing one; i is where the type starts.
template <class C>
Signature signature(const Text<C>& t, size_t i, Next<C>& close, bool strict) {
    const Signature none{0, 0, kNone};
    if (strict && is_any(t, i, t.skip_word(i), kStatements)) return none;
    if (begins_with_any(t, i, kNoType)) return none;
    if (t.at(i) == '<') {
        const size_t e = t.skip_word(i + 1);
        if (e == i + 1 || t.at(e) != '>') return none;
        i = t.skip_space(e + 1);
    }
    const size_t type_end = t.skip_word(i), name = t.skip_space(type_end), name_end = t.skip_word(name);
    if (type_end == i || name == type_end || name_end == name) return none;
    const size_t open = t.skip_space(name_end);
    if (t.at(open) != '(') return none;
    const size_t end = close(open + 1);
    return end == kNone ? none : Signature{name, name_end, end + 1};
}

// First on a line: any number of public, protected, private and static, a signature, and the list behind `throws`.
template <class C>
Signature java_function(const Text<C>& t, size_t j, Next<C>& close, bool strict) {
    std::vector<size_t> starts{j};  // behind each number of modifiers
    for (size_t i = j;;) {
        const size_t e = t.skip_word(i), next = t.skip_space(e);
        const bool is_modifier = t.word_is(i, e, "public") || t.word_is(i, e, "protected") || t.word_is(i, e, "private") ||
                                 t.word_is(i, e, "static");
        if (!is_modifier || next == e) break;
        starts.push_back(i = next);
    }
    // The last modifiers may be given back: `static` can be taken for the type, and nothing before it.
    for (size_t back = 0; back < std::min(starts.size(), size_t(3)); ++back) {
        Signature found = signature(t, starts[starts.size() - 1 - back], close, strict);
        if (found.end == kNone) continue;
        const size_t list = word_then_space(t, t.skip_space(found.end), "throws");
        if (list != kNone) {
            size_t e = list;
            while (is_word(t.at(e)) || t.at(e) == ',' || t.at(e) == ' ') ++e;
            if (e > list) found.end = e;
        }
        return found;
    }
    return {0, 0, kNone};
}

// Modifiers, a primitive type of the list or one that starts with a capital, white space: where the name starts, or kNone.
template <class C>
size_t declared_name(const Text<C>& t, size_t j) {
    for (;;) {
        const size_t e = t.skip_word(j), next = t.skip_space(e);
        if (!is_any(t, j, e, kModifiers) || next == e) break;
        j = next;
    }
    size_t e = j;
    while (is_word(t.at(e)) || t.at(e) == '<' || t.at(e) == '>') ++e;
    const bool known = (t.at(j) >= 'A' && t.at(j) <= 'Z') || t.word_is(j, e, "int") || t.word_is(j, e, "float") ||
                       t.word_is(j, e, "boolean") || t.word_is(j, e, "char") || t.word_is(j, e, "double");
    return known && e > j && is_space(t.at(e)) ? t.skip_space(e) : kNone;
}

// `return;` at a line's end, or a return of nothing, a word or a string with white space around the semicolon.
template <class C>
size_t java_return(const Text<C>& t, size_t j) {
    if (!t.is(j, "return")) return kNone;
    j += 6;
    if (t.at(j) == ';') return j + 1 == t.n || t.p[j + 1] == '\n' ? j + 1 : kNone;
    if (!is_space(t.at(j))) return kNone;
    j = t.skip_space(j);
    j = t.at(j) == '"' ? quoted(t, j) : t.skip_word(j);
    if (j == kNone) return kNone;
    j = t.skip_space(j);
    return t.at(j) == ';' ? rest_is_blank(t, j + 1) : kNone;
}

template <class C>
void count_functions(const Text<C>& t, JavaCounts& n, bool strict) {
    Next<C> close{t, ')'};
    each_line(t, [&](size_t j) {
        const Signature f = java_function(t, j, close, strict);
        if (f.end == kNone) return kNone;
        ++n.functions;
        n.function_letters += is_letter(t.at(j + 1));
        n.function_names += is_letter(t.p[f.name]) && is_alphanumeric(t, f.name, f.name_end);
        const Text<C> match{t.p + j, f.end - j};
        n.accessible += std::any_of(std::begin(kAccess), std::end(kAccess), [&](auto w) { return match.find(w, 0) != kNone; });
        return f.end;
    });
}

template <class C>
void count_variables(const Text<C>& t, JavaCounts& n) {
    Next<C> semicolon{t, ';'};
    each_line(t, [&](size_t j) {  // without a value
        const size_t name = declared_name(t, j);
        if (name == kNone) return kNone;
        const size_t e = t.skip_word(name), end = t.skip_space(e);
        if (e == name || t.at(end) != ';') return kNone;
        ++n.simple_variables;
        return end + 1;
    });
    each_line(t, [&](size_t j) {  // with or without
        const size_t name = declared_name(t, j);
        if (name == kNone) return kNone;
        const size_t e = t.skip_word(name);
        size_t end = t.skip_space(e);
        if (e > name && t.at(end) == '=') {
            const size_t value = end + 1;
            end = semicolon(value);
            if (end == value) end = kNone;
        }
        if (e == name || end == kNone || t.at(end) != ';') return kNone;
        ++n.variables;
        n.variable_letters += t.at(j + 1) >= 'a' && t.at(j + 1) <= 'z';
        n.variable_names += t.p[name] >= 'a' && t.p[name] <= 'z' && is_alphanumeric(t, name, e);
        return end + 1;
    });
}

template <class C>
JavaCounts count_java(const Text<C>& t, bool strict) {
    JavaCounts n;
    n.lines = filled_lines(t);
    n.prints = lines_with(t, "System.out.print");
    count_functions(t, n, strict);
    count_variables(t, n);
    each_line(t, [&](size_t j) {  // one dotted name and nothing behind it
        const size_t name = word_then_space(t, j, "import");
        if (name == kNone) return kNone;
        size_t e = name;
        while (is_word(t.at(e)) || t.at(e) == '.' || t.at(e) == '*') ++e;
        const size_t end = t.skip_space(e);
        const size_t blank = e > name && t.at(end) == ';' ? rest_is_blank(t, end + 1) : kNone;
        n.imports += blank != kNone;
        return blank;
    });
    each_line(t, [&](size_t j) {
        const size_t e = java_return(t, j);
        n.returns += e != kNone;
        return e;
    });
    each_line(t, [&](size_t j) {  // at most one access word, then final or abstract, then class and a name
        bool access = false;
        for (std::string_view w : kAccess)
            if (const size_t next = word_then_space(t, j, w); next != kNone) {
                j = next;
                access = true;
                break;
            }
        for (std::string_view w : {"final", "abstract"})
            if (const size_t next = word_then_space(t, j, w); next != kNone) {
                j = next;
                break;
            }
        const size_t name = word_then_space(t, j, "class");
        if (name == kNone) return kNone;
        size_t e = name;
        while (is_word(t.at(e)) || t.at(e) == '<' || t.at(e) == '>') ++e;
        if (e == name) return kNone;
        ++n.classes;
        n.accessible_classes += access;
        n.class_names += t.p[name] >= 'A' && t.p[name] <= 'Z' && is_alphanumeric(t, name, e);
        return e;
    });
    return n;
}

struct CSharpCounts {
    size_t lines = 0, functions = 0, usings = 0, simple_variables = 0, variables = 0, returns = 0, classes = 0, prints = 0;
};

constexpr std::string_view kCSharpTypes[] = {"int",   "float",  "double", "char", "string", "bool", "byte",
                                             "sbyte", "short",  "ushort", "uint", "long",   "ulong", "decimal"};
constexpr std::string_view kCSharpAccess[] = {"public", "protected", "private", "internal"};
constexpr std::string_view kCSharpModifiers[] = {"static", "virtual", "override", "abstract", "async"};
constexpr std::string_view kClassModifiers[] = {"publicclass",  "privateclass",  "protectedclass", "internalclass",
                                                "staticclass", "abstractclass", "sealedclass"};

// First on a line: at most one access word and one modifier, then a signature; either may be taken for the type instead.
template <class C>
size_t csharp_function(const Text<C>& t, size_t j, Next<C>& close, bool strict) {
    const size_t first = t.skip_word(j), second = t.skip_space(first);
    const bool access = is_any(t, j, first, kCSharpAccess) && second > first;
    for (const size_t base : {access ? second : j, j}) {
        const size_t e = t.skip_word(base), next = t.skip_space(e);
        if (is_any(t, base, e, kCSharpModifiers) && next > e)
            if (const Signature f = signature(t, next, close, strict); f.end != kNone) return f.end;
        if (const Signature f = signature(t, base, close, strict); f.end != kNone) return f.end;
        if (!access) break;
    }
    return kNone;
}

// The word return, what is on the line up to a semicolon; the semicolon may follow on a later line.
template <class C>
size_t csharp_return(const Text<C>& t, size_t j) {
    if (!t.is(j, "return") || is_word(t.at(j + 6))) return kNone;
    size_t e = t.skip_space(j + 6);
    if (t.at(e) == ';') return e + 1;
    if (e == j + 6) return kNone;
    while (e < t.n && t.p[e] != ';' && t.p[e] != '\n') ++e;
    e = t.skip_space(e);
    return t.at(e) == ';' ? e + 1 : kNone;
}

// Words that no variable's type is: `return x;` declares nothing.
constexpr std::string_view kNotTypes[] = {"return", "new",   "using", "namespace", "goto", "throw", "await",  "yield",     "else",  "case",
                                          "class",  "struct", "enum", "interface", "is",   "as",    "in",     "operator",  "record", "delegate",
                                          "public", "private", "protected", "internal", "static", "partial", "not", "and", "or"};

// Whether the word from i to e is declared as a variable or property there: a type and white space before it, a value, a
// semicolon or accessors behind it.
template <class C>
bool is_declared(const Text<C>& t, size_t i, size_t e) {
    const size_t next = t.skip_space(e);
    const uint32_t c = t.at(next);
    if (c == '{') {
        const size_t accessor = t.skip_space(next + 1);
        if (!t.is(accessor, "get") && !t.is(accessor, "set") && !t.is(accessor, "init")) return false;
    } else if (c != ';' && !(c == '=' && t.at(next + 1) != '=' && t.at(next + 1) != '>')) return false;
    size_t b = i;
    while (b > 0 && is_space(t.p[b - 1])) --b;
    if (b == i || b == 0) return false;
    if (!is_word(t.p[b - 1]))  // List<T>, T[], T?
        return (t.p[b - 1] == '>' || t.p[b - 1] == ']' || t.p[b - 1] == '?') && b > 1 && !is_space(t.p[b - 2]);
    size_t start = b;
    while (start > 0 && is_word(t.p[start - 1])) --start;
    return !is_digit(t.p[start]) && !is_any(t, start, b, kNotTypes);
}

template <class C>
void csharp_words(const Text<C>& t, CSharpCounts& n) {
    size_t class_end = 0, simple_end = 0, variable_end = 0;
    for (size_t i = 0; i < t.n;) {
        if (!is_word(t.p[i])) {
            ++i;
            continue;
        }
        const size_t e = t.skip_word(i), next = t.skip_space(e), end = t.skip_word(next);
        if (next > e && end > next) {
            if (i >= class_end && (t.word_is(i, e, "class") || is_any(t, i, e, kClassModifiers))) {
                ++n.classes;
                class_end = end;
            }
            const bool type = is_any(t, i, e, kCSharpTypes);
            if (type && i >= simple_end && t.at(t.skip_space(end)) == ';') {
                ++n.simple_variables;
                simple_end = t.skip_space(end) + 1;
            }
            if ((type || t.word_is(i, e, "var")) && i >= variable_end) {
                ++n.variables;
                variable_end = end;
            }
        }
        if (i >= variable_end && is_declared(t, i, e)) {
            ++n.variables;
            variable_end = e;
        }
        i = e;
    }
}

template <class C>
CSharpCounts count_csharp(const Text<C>& t, bool strict) {
    CSharpCounts n;
    n.lines = filled_lines(t);
    n.prints = lines_with(t, "Console.WriteLine");
    csharp_words(t, n);
    Next<C> close{t, ')'};
    each_line(t, [&](size_t j) {
        const size_t e = csharp_function(t, j, close, strict);
        n.functions += e != kNone;
        return e;
    });
    each_line(t, [&](size_t j) {  // a dotted ASCII name
        const size_t name = word_then_space(t, j, "using");
        if (name == kNone) return kNone;
        size_t e = name;
        while (is_letter(t.at(e)) || is_digit(t.at(e)) || t.at(e) == '_' || t.at(e) == '.') ++e;
        const size_t end = t.skip_space(e);
        if (e == name || t.at(end) != ';') return kNone;
        ++n.usings;
        return end + 1;
    });
    each_line(t, [&](size_t j) {
        const size_t e = csharp_return(t, j);
        n.returns += e != kNone;
        return e;
    });
    return n;
}

py::tuple scan_java(const py::str& code, bool strict) {
    JavaCounts n;
    with_text(code, [&](const auto& t) { n = count_java(t, strict); });
    return py::make_tuple(n.lines, n.functions, n.imports, n.simple_variables, n.variables, n.returns, n.classes, n.prints,
                          n.accessible, n.function_letters, n.variable_letters, n.class_names, n.function_names, n.variable_names, n.accessible_classes);
}
py::tuple scan_csharp(const py::str& code, bool strict) {
    CSharpCounts n;
    with_text(code, [&](const auto& t) { n = count_csharp(t, strict); });
    return py::make_tuple(n.lines, n.functions, n.usings, n.simple_variables, n.variables, n.returns, n.classes, n.prints);
}

}  // namespace
}  // namespace lex

void add_scan_java(py::module_& m) {
    m.def("scan_java", &lex::scan_java, py::arg("code"), py::arg("strict"),
          "lines, functions, imports, simple_variables, variables, returns, classes, prints, accessible, function_letters, "
          "variable_letters, class_names, function_names, variable_names, accessible_classes");
    m.def("scan_csharp", &lex::scan_csharp, py::arg("code"), py::arg("strict"),
          "lines, functions, usings, simple_variables, variables, returns, classes, prints");
}
