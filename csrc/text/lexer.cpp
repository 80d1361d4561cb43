// The lexers for Python: one object per language, made from a table or by the name of a lexer written for it.
#include "lexer.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "lexer_table.h"
#include "scan.h"

namespace {

using lex::Kind;
using lex::Mode;
using lex::Spans;
using lex::Syntax;
using lex::Text;
using lex::with_text;

template <class C>
using Function = void (*)(const Text<C>&, Mode, Spans&);

struct Functions {
    Function<Py_UCS1> narrow;
    Function<Py_UCS2> wide;
    Function<Py_UCS4> full;
};

#define NAMED(name) {#name, {&lex::lex_##name<Py_UCS1>, &lex::lex_##name<Py_UCS2>, &lex::lex_##name<Py_UCS4>}}
const std::pair<std::string_view, Functions> kNamed[] = {
    NAMED(c), NAMED(cpp), NAMED(python), NAMED(javascript), NAMED(typescript), NAMED(html), NAMED(xml), NAMED(java),
    NAMED(csharp), NAMED(go), NAMED(rust), NAMED(php), NAMED(sql), NAMED(json), NAMED(nothing),
};

template <class C>
py::str to_str(const std::basic_string<C>& s) {
    PyObject* result = PyUnicode_FromKindAndData(sizeof(C), s.data(), static_cast<Py_ssize_t>(s.size()));
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(result);
}

class Lexer {
   public:
    explicit Lexer(std::string_view name) {
        for (const auto& [known, functions] : kNamed)
            if (known == name) {
                functions_ = functions;
                return;
            }
        throw std::invalid_argument("no lexer is called " + std::string(name));
    }
    explicit Lexer(Syntax syntax) : syntax_(std::move(syntax)) { syntax_.prepare(); }

    template <class C>
    void run(const Text<C>& t, Mode mode, Spans& out) const {
        if constexpr (sizeof(C) == 1) functions_.narrow ? functions_.narrow(t, mode, out) : lex::lex_table(t, syntax_, out);
        else if constexpr (sizeof(C) == 2) functions_.wide ? functions_.wide(t, mode, out) : lex::lex_table(t, syntax_, out);
        else functions_.full ? functions_.full(t, mode, out) : lex::lex_table(t, syntax_, out);
    }

    py::list spans(const py::str& text, bool compat) const {
        Spans found;
        with_text(text, [&](const auto& t) { run(t, Mode{compat}, found); });
        py::list result;
        for (const auto& s : found) result.append(py::make_tuple(s.begin, s.end, static_cast<int>(s.kind)));
        return result;
    }

    py::tuple split(const py::str& text, bool compat) const {
        py::str code, comments;
        const int kind = PyUnicode_KIND(text.ptr());
        if (kind == PyUnicode_1BYTE_KIND) split_as<Py_UCS1>(text, compat, &code, &comments);
        else if (kind == PyUnicode_2BYTE_KIND) split_as<Py_UCS2>(text, compat, &code, &comments);
        else split_as<Py_UCS4>(text, compat, &code, &comments);
        return py::make_tuple(code, comments);
    }

   private:
    template <class C>
    void split_as(const py::str& text, bool compat, py::str* code, py::str* comments) const {
        std::basic_string<C> outside, inside;
        with_text(text, [&](const auto& t) {
            if constexpr (std::is_same_v<std::decay_t<decltype(t)>, Text<C>>) {
                Spans found;
                run(t, Mode{compat}, found);
                outside.reserve(t.n);
                if (compat) cut(t, found, &outside, &inside);
                else cut_lines(t, found, &outside, &inside);
            }
        });
        *code = to_str(outside);
        *comments = to_str(inside);
    }

    // The release: what is a comment goes to one side, the rest to the other, character by character.
    template <class C>
    static void cut(const Text<C>& t, const Spans& found, std::basic_string<C>* code, std::basic_string<C>* comments) {
        size_t at = 0;
        for (const auto& s : found) {
            code->append(t.p + at, s.begin - at);
            comments->append(t.p + s.begin, s.end - s.begin);
            at = s.end;
        }
        code->append(t.p + at, t.n - at);
    }

    // Default: a comment is followed by a newline (which stands for the white space behind it, so that the comments are never
    // longer than the whole), and lines that hold only comments leave the code altogether.
    template <class C>
    static void cut_lines(const Text<C>& t, const Spans& found, std::basic_string<C>* code, std::basic_string<C>* comments) {
        size_t at = 0;
        for (const auto& s : found) {
            code->append(t.p + at, s.begin - at);
            comments->append(t.p + s.begin, s.end - s.begin);
            at = s.end;
            const bool spaced = lex::is_space(t.at(s.end));
            if (spaced && (s.end == s.begin || t.p[s.end - 1] != '\n')) comments->push_back('\n');
            if (t.at(s.end) != '\n') continue;
            size_t indent = code->size();
            while (indent > 0 && (*code)[indent - 1] != '\n' && lex::is_space((*code)[indent - 1])) --indent;
            if (indent == 0 || (*code)[indent - 1] == '\n') {
                code->resize(indent);
                ++at;
            }
        }
        code->append(t.p + at, t.n - at);
    }

    Functions functions_{};
    Syntax syntax_;
};

lex::Where where(const std::string& name) {
    if (name == "anywhere") return lex::Where::anywhere;
    if (name == "word") return lex::Where::word;
    if (name == "indent") return lex::Where::indent;
    if (name == "column") return lex::Where::column;
    if (name == "column7") return lex::Where::column7;
    throw std::invalid_argument("line comments stand anywhere, word, indent, column or column7; not " + name);
}

Lexer from_table(const std::vector<std::pair<std::string, std::string>>& lines,
                 const std::vector<std::tuple<std::string, std::string, bool, bool>>& blocks,
                 const std::vector<std::tuple<std::string, std::string, bool, bool, bool, std::string>>& strings,
                 const std::vector<std::string>& features) {
    Syntax s;
    for (const auto& [mark, place] : lines) s.lines.push_back({mark, where(place)});
    for (const auto& [open, close, nested, whole] : blocks) s.blocks.push_back({open, close, nested, whole});
    for (const auto& [open, close, escape, multiline, doc, insert] : strings)
        s.strings.push_back({open, close, escape, multiline, doc, insert});
    for (const auto& [mark, _] : lines)
        if (mark.empty()) throw std::invalid_argument("a comment mark is empty");
    for (const auto& name : features) {
        if (name == "ignore_case") s.ignore_case = true;
        else if (name == "escape_outside") s.escape_outside = true;
        else if (name == "character") s.character = true;
        else if (name == "regex") s.regex = true;
        else if (name == "cpp_raw") s.cpp_raw = true;
        else if (name == "rust_raw") s.rust_raw = true;
        else if (name == "verbatim") s.verbatim = true;
        else if (name == "long_brackets") s.long_brackets = true;
        else if (name == "pod") s.pod = true;
        else if (name == "here_shell") s.here = 's';
        else if (name == "here_ruby") s.here = 'r';
        else if (name == "here_perl") s.here = 'p';
        else if (name == "here_php") s.here = 'h';
        else if (name == "inside_php") s.only_between = "php";
        else throw std::invalid_argument("unknown feature of a comment syntax: " + name);
    }
    return Lexer(std::move(s));
}

}  // namespace

void add_lexer(py::module_& m) {
    py::class_<Lexer>(m, "Lexer", "Tells comments from code; see opencoder.corpus.lexing.")
        .def(py::init<std::string_view>(), py::arg("name"))
        .def_static("from_table", &from_table, py::arg("lines"), py::arg("blocks"), py::arg("strings"), py::arg("features"))
        .def("spans", &Lexer::spans, py::arg("text"), py::arg("compat"), "(begin, end, kind) of each comment, in order.")
        .def("split", &Lexer::split, py::arg("text"), py::arg("compat"), "(code, comments) of a text.");
}
