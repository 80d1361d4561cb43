// HTML and XML: comments, and the comments of scripts (by the JavaScript lexer) and, in default mode, of style sheets.
// Compat mode follows Pygments: a tag or attribute may run over anything up to its end, a script without an end is one
// line long, and comments in style sheets are code.
#include "lexer.h"

namespace lex {
namespace {

template <class C>
struct Markup {
    const Text<C>& t;
    Spans& out;
    Mode mode;
    bool html;
    Closer cdata{"]]>"}, comment{"-->"}, instruction{"?>"}, declaration{">"}, double_quote{"\""}, single_quote{"'"};
    bool no_script = false, no_style = false;  // no end tag of theirs ahead

    bool is_name(uint32_t c) const { return is_word(c) || c == ':' || c == '-'; }

    // From behind a tag's name: past its `>`.
    size_t tag(size_t i) {
        while (i < t.n) {
            const uint32_t c = t.p[i];
            if (is_space(c)) i = t.skip_space(i);
            else if (c == '>') return i + 1;
            else if (is_name(c) || (!html && c == '.')) {
                while (is_name(t.at(i)) || (!html && t.at(i) == '.')) ++i;
                const size_t j = t.skip_space(i);
                if (t.at(j) != '=') continue;
                i = j + 1;
                bool reset = false;
                i = attribute(t.skip_space(i), &reset);
                if (reset) return i;
            } else ++i;
        }
        return t.n;
    }
    size_t attribute(size_t i, bool* reset) {
        while (i < t.n) {
            const uint32_t c = t.p[i];
            if (c == '"' || c == '\'') {
                const size_t close = (c == '"' ? double_quote : single_quote).find(t, i + 1);
                if (close != kNone) return close + 1;
            }
            if (!is_space(c) && c != '>') {
                while (i < t.n && !is_space(t.p[i]) && t.p[i] != '>') ++i;
                return i;
            }
            if (!mode.compat) return i;
            if (c == '\n' && html) {  // an error token, and a fresh start
                *reset = true;
                return i;
            }
            ++i;
        }
        return t.n;
    }

    // Where `</ name >` begins, from i on; its end in *after.
    size_t closing(size_t i, std::string_view name, size_t* after) const {
        for (; (i = t.find('<', i)) != kNone; ++i) {
            size_t j = t.skip_space(i + 1);
            if (t.at(j) != '/') continue;
            j = t.skip_space(j + 1);
            if (!t.is_nocase(j, name)) continue;
            j = t.skip_space(j + name.size());
            if (t.at(j) == '>') {
                *after = j + 1;
                return i;
            }
        }
        return kNone;
    }
    size_t script(size_t i, std::string_view name) {
        bool& gone = name == "script" ? no_script : no_style;
        size_t after = t.n;
        size_t end = gone ? kNone : closing(i, name, &after);
        gone = end == kNone;
        if (end == kNone) after = end = mode.compat ? std::min(t.line_end(i + 1) + 1, t.n) : t.n;
        if (name == "script") {
            Spans inner;
            const Text<C> part{t.p + i, end - i};
            lex_javascript(part, mode, inner);
            for (Span s : inner) out.push_back({s.begin + i, s.end + i, s.kind});
        } else if (!mode.compat) {
            for (size_t k = i; (k = t.find("/*", k)) != kNone && k < end;) {
                size_t close = t.find("*/", k + 2);
                close = close == kNone || close + 2 > end ? end : close + 2;
                out.push_back({k, close, Kind::comment});
                k = close;
            }
        }
        return after;
    }

    // An element, comment or declaration that starts at i: past it.
    size_t markup(size_t i) {
        if (t.is(i, "<![CDATA[") || (html && t.is_nocase(i, "<![cdata["))) {
            const size_t close = cdata.find(t, i + 9);
            if (close != kNone) return close + 3;
        }
        if (t.is(i, "<!--")) {
            const size_t close = comment.find(t, i + 4);
            if (close != kNone || !mode.compat) {
                const size_t e = close == kNone ? t.n : close + 3;
                out.push_back({i, e, Kind::comment});
                return e;
            }
        }
        if (t.is(i, "<?")) {
            const size_t close = instruction.find(t, i + 2);
            if (close != kNone) return close + 2;
        }
        if (t.is(i, "<!")) {
            const size_t close = declaration.find(t, i + 2);
            return close == kNone ? i + 1 : close + 1;
        }
        const size_t j = t.skip_space(i + 1);
        if (html)
            for (std::string_view name : {"script", "style"})
                if (t.is_nocase(j, name) && (mode.compat || !is_name(t.at(j + name.size()))))
                    return script(tag(t.skip_space(j + name.size())), name);
        if (!is_name(t.at(j)) && t.at(j) != '.') return i + 1;
        size_t e = j;
        while (is_name(t.at(e)) || t.at(e) == '.') ++e;
        return tag(e);
    }

    void run() {
        for (size_t i = 0; (i = t.find('<', i)) != kNone;) i = markup(i);
    }
};

}  // namespace

LEXER(lex_html) { Markup<C>{t, out, mode, true}.run(); }
LEXER(lex_xml) { Markup<C>{t, out, mode, false}.run(); }
INSTANTIATE_LEXER(lex_html)
INSTANTIATE_LEXER(lex_xml)

}  // namespace lex
