// The lexer of the default mode for every language that is described by a table: line comments, block comments, strings,
// here documents and the raw strings of C++, Rust, C# and Lua. One pass; what cannot start anything is skipped in a tight
// loop. An unclosed block comment runs to the end of the text, an unclosed string to the end of its line.
#include "lexer_table.h"

namespace lex {

void Syntax::prepare() {
    auto add = [&](const std::string& mark) {
        if (mark.empty()) return;
        const auto c = static_cast<unsigned char>(mark[0]);
        interesting[c] = true;
        if (ignore_case && is_letter(c)) interesting[c ^ 32] = true;
    };
    auto longer = [](const auto& a, const auto& b) { return a.open.size() > b.open.size(); };
    std::stable_sort(blocks.begin(), blocks.end(), longer);
    std::stable_sort(strings.begin(), strings.end(), longer);
    for (const auto& r : lines) add(r.mark);
    for (const auto& r : blocks) add(r.open);
    for (const auto& r : strings) add(r.open);
    if (escape_outside) add("\\");
    if (character) add("'");
    if (regex) add("/");
    if (cpp_raw || rust_raw || verbatim) add("\"");
    if (long_brackets) add("[");
    if (pod) add("=");
    if (here) add("<"), add("\n");
}

namespace {

template <class C>
struct Table {
    const Text<C>& t;
    const Syntax& s;
    Spans& out;
    std::vector<Closer> block_ends{}, string_ends{};
    std::vector<std::basic_string<C>> pending{};  // here documents whose text starts at the next line
    int unclosed = 0;

    bool mark(size_t i, const std::string& m) const { return s.ignore_case ? t.is_nocase(i, m) : t.is(i, m); }

    bool first_on_line(size_t i) const {
        while (i > 0 && t.p[i - 1] != '\n') {
            if (!is_space(t.p[i - 1])) return false;
            --i;
        }
        return true;
    }
    bool allowed(size_t i, Where where) const {
        switch (where) {
            case Where::anywhere: return true;
            case Where::indent: return first_on_line(i);
            case Where::column: return t.line_start(i);
            case Where::column7: return i >= 6 && t.line_start(i - 6) && t.line_end(i - 6) > i;
            case Where::word: break;
        }
        if (i == 0) return true;
        const uint32_t before = t.p[i - 1];
        return is_space(before) || (before < 128 && std::string_view(";()[]},|&`").find(static_cast<char>(before)) != std::string_view::npos);
    }

    size_t block(size_t i, size_t rule) {
        const BlockRule& r = s.blocks[rule];
        size_t j = i + r.open.size();
        if (r.nested) {
            for (int depth = 1; j < t.n;) {
                if (t.is(j, r.close)) {
                    j += r.close.size();
                    if (--depth == 0) return j;
                } else if (t.is(j, r.open)) ++depth, j += r.open.size();
                else ++j;
            }
            return t.n;
        }
        if (s.ignore_case) {
            while (j < t.n && !mark(j, r.close)) ++j;
            return std::min(j + r.close.size(), t.n);
        }
        if (r.lines) {
            while ((j = block_ends[rule].find(t, j)) != kNone && !t.line_start(j)) ++j;
            return j == kNone ? t.n : t.line_end(j);
        }
        j = block_ends[rule].find(t, j);
        return j == kNone ? t.n : j + r.close.size();
    }

    // Past the bracket that closes an expression inside a string, or `i` if none does nearby.
    size_t inserted(size_t i, const std::string& insert) const {
        const char open = insert.back(), close = open == '(' ? ')' : '}';
        const size_t limit = std::min(t.n, i + 4096);
        int depth = 1;
        for (size_t j = i; j < limit; ++j) {
            if (t.p[j] == static_cast<C>(open)) ++depth;
            else if (t.p[j] == static_cast<C>(close) && --depth == 0) return j + 1;
        }
        return i;
    }

    size_t string(size_t i, const StringRule& r) {
        const size_t start = i;
        const uint32_t first = static_cast<unsigned char>(r.close[0]);
        for (i += r.open.size(); i < t.n; ++i) {
            const uint32_t c = t.p[i];
            if (c == first && t.is(i, r.close)) return i + r.close.size();
            if (c == '\\' && r.escape) {
                if (!r.insert.empty() && r.insert[0] == '\\' && t.is(i, r.insert)) i = inserted(i + r.insert.size(), r.insert) - 1;
                else ++i;
            } else if (c == '\n' && !r.multiline) return i;
            else if (!r.insert.empty() && t.is(i, r.insert)) {
                const size_t e = inserted(i + r.insert.size(), r.insert);
                if (e > i + r.insert.size()) i = e - 1;
            }
        }
        // A quote that never closes is not a string; the text is tried again behind it, a bounded number of times.
        return ++unclosed < kMaxUnclosed ? start + r.open.size() : t.n;
    }

    size_t character(size_t i) const {
        if (t.at(i + 1) == '\\') {
            for (size_t j = i + 3; j < i + 13 && j < t.n && t.p[j] != '\n'; ++j)
                if (t.p[j] == '\'') return j + 1;
            return i + 2;
        }
        return t.at(i + 2) == '\'' && t.at(i + 1) != '\n' && t.at(i + 1) != kEnd ? i + 3 : i + 1;
    }

    // The strings that a prefix or a length marks: past one that starts at i, or i.
    size_t special_string(size_t i) {
        const uint32_t c = t.p[i], before = i > 0 ? t.p[i - 1] : ' ';
        if (c == '"' && s.verbatim && (before == '@' || (before == '$' && i > 1 && t.p[i - 2] == '@'))) {
            for (++i; i < t.n; ++i) {
                if (t.p[i] != '"') continue;
                if (t.at(i + 1) != '"') return i + 1;
                ++i;
            }
            return t.n;
        }
        if (c == '"' && s.cpp_raw && before == 'R') {
            size_t j = i + 1;
            while (j < i + 18 && j < t.n && t.p[j] != '(' && !is_space(t.p[j])) ++j;
            if (t.at(j) != '(') return i;
            return delimited(j + 1, ')', std::basic_string<C>(t.p + i + 1, t.p + j), '"');
        }
        if (c == '"' && s.rust_raw) {
            size_t hashes = 0;
            while (hashes < i && t.p[i - 1 - hashes] == '#') ++hashes;
            if (i <= hashes || t.p[i - 1 - hashes] != 'r') return i;
            return delimited(i + 1, '"', std::basic_string<C>(hashes, static_cast<C>('#')), 0);
        }
        if (c == '[' && s.long_brackets) {
            size_t j = i + 1;
            while (t.at(j) == '=') ++j;
            if (t.at(j) != '[') return i;
            const size_t e = delimited(j + 1, ']', std::basic_string<C>(t.p + i + 1, t.p + j), ']');
            if (i >= 2 && t.p[i - 1] == '-' && t.p[i - 2] == '-') out.push_back({i - 2, e, Kind::comment});
            return e;
        }
        return i;
    }
    // Past open + tail + last (0: none), searched from i; the end of the text if it never comes.
    size_t delimited(size_t i, char open, const std::basic_string<C>& tail, char last) const {
        for (; (i = t.find(open, i)) != kNone; ++i) {
            if (tail.size() > t.n - i - 1 || !std::equal(tail.begin(), tail.end(), t.p + i + 1)) continue;
            const size_t e = i + 1 + tail.size();
            if (last == 0) return e;
            if (t.at(e) == static_cast<uint32_t>(last)) return e + 1;
        }
        return t.n;
    }

    // A here document announced at i (`<<`): behind its name; its text is skipped from the next line on.
    size_t announce(size_t i) {
        if (t.at(i + 1) != '<') return i + 1;
        size_t j = i + 2;
        if (s.here == 'h') {
            if (t.at(j) != '<') return j;
            ++j;
        } else if (t.at(j) == '<') return j + 1;
        const bool tolerant = t.at(j) == '-' || t.at(j) == '~';
        if (tolerant) ++j;
        if (s.here == 's') j = t.skip_blanks(j);
        if (t.at(j) == '\\') ++j;
        const bool quoted = t.at(j) == '"' || t.at(j) == '\'' || t.at(j) == '`';
        if (quoted) ++j;
        const size_t e = t.skip_word(j);
        if (e == j || is_digit(t.p[j])) return i + 2;
        if (s.here != 's' && s.here != 'h' && !tolerant && !quoted && !(t.p[j] >= 'A' && t.p[j] <= 'Z')) return i + 2;
        pending.emplace_back(t.p + j, t.p + e);
        return e + (quoted ? 1 : 0);
    }
    size_t here_documents(size_t i) {  // from a line start
        for (const auto& name : pending) {
            while (i < t.n) {
                const size_t e = t.line_end(i);
                size_t b = t.skip_blanks(i);
                const bool ends = e - b >= name.size() && b <= e && std::equal(name.begin(), name.end(), t.p + b) &&
                                  (b + name.size() == e || !is_word(t.p[b + name.size()]));
                i = std::min(e + 1, t.n);
                if (ends) break;
            }
        }
        pending.clear();
        return i;
    }

    // A slash that opens a regular expression on this line: past it, or i.
    size_t regex(size_t i) const {
        size_t b = i;
        while (b > 0 && (t.p[b - 1] == ' ' || t.p[b - 1] == '\t') && i - b < 64) --b;
        const uint32_t before = b > 0 ? t.p[b - 1] : '\n';
        if (is_word(before) || before == ')' || before == ']' || before == '}' || before == '"' || before == '\'') {
            // A method call without parentheses: `split /x/`, but not `a / b`.
            if (b == i || is_space(t.at(i + 1)) || t.at(i + 1) == '=' || !is_word(before)) return i;
        }
        for (size_t j = i + 1; j < t.n && j < i + 512 && t.p[j] != '\n'; ++j) {
            if (t.p[j] == '\\') ++j;
            else if (t.p[j] == '/') return j + 1;
        }
        return i;
    }

    // What starts at i, if anything: past it. Else i.
    size_t start(size_t i) {
        const uint32_t c = t.p[i];
        if (c == '\n') return pending.empty() ? i : here_documents(i + 1);
        if (s.pod && c == '=' && t.line_start(i) && is_letter(t.at(i + 1))) {
            size_t e = i;
            while (e < t.n && !(t.is(e, "=cut") && e > i)) e = t.line_end(e) + 1;
            e = e >= t.n ? t.n : t.line_end(e);
            out.push_back({i, e, Kind::comment});
            return e;
        }
        if (s.cpp_raw || s.rust_raw || s.verbatim || s.long_brackets) {
            const size_t e = special_string(i);
            if (e > i) return e;
        }
        for (size_t k = 0; k < s.blocks.size(); ++k)
            if (mark(i, s.blocks[k].open) && (!s.blocks[k].lines || t.line_start(i))) {
                const size_t e = block(i, k);
                out.push_back({i, e, Kind::comment});
                return e;
            }
        for (const auto& r : s.lines) {
            if (!mark(i, r.mark) || !allowed(i, r.where)) continue;
            // `--[[` of Lua is a block: its bracket decides.
            if (s.long_brackets && t.at(i + r.mark.size()) == '[') {
                const size_t e = special_string(i + r.mark.size());
                if (e > i + r.mark.size()) return e;
            }
            if (is_letter(static_cast<unsigned char>(r.mark.back())) && is_word(t.at(i + r.mark.size()))) continue;
            size_t e = t.line_end(i);
            if (s.character || s.cpp_raw)  // C: a backslash continues the line
                while (e < t.n && e > i && t.p[e - 1] == '\\') e = t.line_end(e + 1);
            out.push_back({i, e, i == 0 && t.is(0, "#!") ? Kind::hashbang : Kind::comment});
            return e;
        }
        for (const auto& r : s.strings)
            if (t.is(i, r.open)) {
                const size_t e = string(i, r);
                if (r.doc && first_on_line(i)) out.push_back({i, e, Kind::doc_string});
                return e;
            }
        if (c == '\'' && s.character) return character(i);
        if (c == '\\' && s.escape_outside) return std::min(i + 2, t.n);
        if (c == '/' && s.regex) return regex(i);
        if (c == '<' && s.here) return announce(i);
        return i;
    }

    void run() {
        for (const auto& r : s.blocks) block_ends.push_back({r.close});
        size_t i = 0;
        if (t.is(0, "#!") && t.at(2) != '[') {
            i = t.line_end(0);
            out.push_back({0, i, Kind::hashbang});
        }
        while (i < t.n) {
            while (i < t.n && (static_cast<uint32_t>(t.p[i]) >= 128 || !s.interesting[static_cast<unsigned char>(t.p[i])])) ++i;
            if (i >= t.n) break;
            const size_t e = start(i);
            i = e > i ? e : i + 1;
        }
    }
};

}  // namespace

template <class C>
void lex_table(const Text<C>& t, const Syntax& syntax, Spans& out) {
    if (syntax.only_between != "php") return Table<C>{t, syntax, out}.run();
    for (size_t i = 0; (i = t.find("<?", i)) != kNone;) {
        // The closing mark inside a string would need the lexer; it is rare, and costs one misread stretch.
        const size_t close = t.find("?>", i + 2), end = close == kNone ? t.n : close;
        Spans inner;
        const Text<C> part{t.p + i + 2, end - i - 2};
        Table<C>{part, syntax, inner}.run();
        for (Span s : inner) out.push_back({s.begin + i + 2, s.end + i + 2, s.kind});
        i = end;
    }
}
template void lex_table<Py_UCS1>(const Text<Py_UCS1>&, const Syntax&, Spans&);
template void lex_table<Py_UCS2>(const Text<Py_UCS2>&, const Syntax&, Spans&);
template void lex_table<Py_UCS4>(const Text<Py_UCS4>&, const Syntax&, Spans&);

}  // namespace lex
