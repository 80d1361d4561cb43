// The visible text of an HTML page as BeautifulSoup's get_text() over Python's html.parser gives it: its length is what the
// filter's HTML signals need. Written after the documented behaviour of html.parser of Python 3.11 (character references
// kept apart) and of BeautifulSoup 4: white space between two marks shrinks to one character outside pre and textarea, the
// texts of script, style, template, rt and rp do not count, CDATA sections do, a page with an unknown marked section is
// refused.
#include <pybind11/stl.h>

#include <string>
#include <unordered_map>

#include "scan.h"

namespace lex {
namespace {

using Entities = std::unordered_map<std::string, std::u32string>;

constexpr std::string_view kVoid[] = {"area",   "base",     "br",    "col",    "embed", "hr",       "img",    "input",   "keygen",
                                      "link",   "menuitem", "meta",  "param",  "source", "track",   "wbr",    "basefont", "bgsound",
                                      "command", "frame",   "image", "isindex", "nextid", "spacer"};
constexpr std::string_view kKeepsSpace[] = {"pre", "textarea"};
constexpr std::string_view kHidden[] = {"script", "style", "template", "rt", "rp"};

template <size_t N>
bool among(const std::string& name, const std::string_view (&words)[N]) {
    return std::find(std::begin(words), std::end(words), name) != std::end(words);
}

struct Rejected {};

// The tree, reduced to the open elements and the length of what is visible.
class Tree {
public:
    size_t length = 0;

    void data(uint32_t c) {
        started_ = true;
        ++run_;
        if (!(c == ' ' || c == '\n' || c == '\t' || c == '\f' || c == '\r')) blank_ = false;
    }
    template <class C>
    void data(const C* begin, const C* end) {
        started_ = true;
        for (; begin < end; ++begin) data(*begin);
    }
    // Ends a run of text; `cdata` counts even where other text is hidden.
    void end_data(bool cdata = false) {
        if (started_ && (hidden_ == 0 || cdata)) length += blank_ && keeps_space_ == 0 ? 1 : run_;
        started_ = false;
        blank_ = true;
        run_ = 0;
    }
    // Text of a comment or declaration: ends the run and is nothing visible.
    void mark() { end_data(); }

    void start(const std::string& name, bool self_closing) {
        end_data();
        stack_.push_back(name);
        ++open_[name];
        keeps_space_ += among(name, kKeepsSpace);
        hidden_ += among(name, kHidden);
        if (self_closing) close(name);
        else if (among(name, kVoid)) {
            close(name);
            ++already_closed_[name];
        }
    }
    void end(const std::string& name) {
        if (auto known = already_closed_.find(name); known != already_closed_.end() && known->second > 0) --known->second;
        else close(name);
    }

private:
    void close(const std::string& name) {
        end_data();
        if (open_[name] == 0) return;
        for (bool found = false; !found && !stack_.empty();) {
            const std::string top = std::move(stack_.back());
            stack_.pop_back();
            --open_[top];
            keeps_space_ -= among(top, kKeepsSpace);
            hidden_ -= among(top, kHidden);
            found = top == name;
        }
    }

    bool started_ = false, blank_ = true;
    size_t run_ = 0;
    int keeps_space_ = 0, hidden_ = 0;
    std::vector<std::string> stack_;
    std::unordered_map<std::string, int> open_, already_closed_;
};

template <class C>
struct HtmlParser {
    const Text<C>& t;
    const Entities& entities;
    Tree tree{};
    std::string raw_element{};  // script or style, while inside
    Next<C> greater{t, '>'};
    size_t no_quote[2] = {kNone, kNone};  // from here on there is no ' or "
    size_t no_semicolon = kNone;

    static bool is_name(uint32_t c) {  // of a tag, behind its first letter
        return c != '\t' && c != '\n' && c != '\r' && c != '\f' && c != ' ' && c != '/' && c != '>' && c != 0 && c != kEnd;
    }
    std::string lowered(size_t i, size_t e) const {
        std::string s;
        for (; i < e; ++i) s += t.p[i] < 128 ? static_cast<char>(lower(t.p[i])) : '?';
        return s;
    }
    size_t find_quote(uint32_t quote, size_t i) {
        size_t& none = no_quote[quote == '"'];
        if (none != kNone && i >= none) return kNone;
        const size_t hit = t.find(static_cast<char>(quote), i);
        if (hit == kNone) none = std::min(none, i);
        return hit;
    }
    // (?:\s|/(?!>))*
    size_t skip_filler(size_t i) const {
        while (is_space(t.at(i)) || (t.at(i) == '/' && t.at(i + 1) != '>')) ++i;
        return i;
    }
    // An attribute at i with the filler behind it: its end, or kNone.
    size_t attribute(size_t i) {
        const uint32_t before = i > 0 ? t.p[i - 1] : 0, c = t.at(i);
        if (!(before == '\'' || before == '"' || before == '/' || is_space(before))) return kNone;
        if (c == kEnd || is_space(c) || c == '/' || c == '>') return kNone;
        for (++i; i < t.n && !is_space(t.p[i]) && t.p[i] != '/' && t.p[i] != '=' && t.p[i] != '>'; ++i) {}
        size_t v = t.skip_space(i);
        if (t.at(v) != '=') return skip_filler(i);
        const size_t sign = v;
        while (t.at(v) == '=') ++v;
        const size_t signs_end = v;
        v = t.skip_space(v);
        const uint32_t quote = t.at(v);
        if (quote == '\'' || quote == '"') {
            const size_t close = find_quote(quote, v + 1);
            if (close != kNone) return skip_filler(close + 1);
            // The quote may not start a bare value; white space or a sign given back leaves room for one before it.
            if (v > signs_end) return skip_filler(v - 1);
            if (signs_end > sign + 1) return skip_filler(bare(signs_end - 1));
            return skip_filler(i);
        }
        return skip_filler(bare(v));
    }
    size_t bare(size_t i) const {
        while (i < t.n && t.p[i] != '>' && !is_space(t.p[i])) ++i;
        return i;
    }

    size_t start_tag(size_t i) {  // its end, or kNone if it is not complete
        if (greater(i) == kNone) return kNone;
        size_t name_end = i + 2;
        while (is_name(t.at(name_end))) ++name_end;
        size_t j = name_end;
        while (is_space(t.at(j)) || t.at(j) == '/') ++j;
        for (size_t e; (e = attribute(j)) != kNone;) j = e;
        j = t.skip_space(j);
        const uint32_t next = t.at(j);
        size_t end = j;
        if (next == '>') end = j + 1;
        else if (next == '/') {
            if (t.at(j + 1) != '>') return kNone;
            end = j + 2;
        } else if (next == kEnd || is_letter(next) || next == '=') return kNone;
        // Once more as the parser reads the attributes: what then remains must be > or />.
        size_t k = skip_filler(name_end);
        for (size_t e; k < end && (e = attribute(k)) != kNone;) k = e;
        size_t b = std::min(k, end), f = end;
        while (b < f && is_space(t.p[b])) ++b;
        while (f > b && is_space(t.p[f - 1])) --f;
        const bool empty = f - b == 2 && t.is(b, "/>");
        if (!empty && !(f - b == 1 && t.p[b] == '>')) {
            tree.data(t.p + i, t.p + end);
            return end;
        }
        const std::string name = lowered(i + 1, name_end);
        tree.start(name, empty);
        if (!empty && (name == "script" || name == "style")) raw_element = name;
        return end;
    }

    size_t end_tag(size_t i) {
        const size_t close = greater(i + 1);
        if (close == kNone) return kNone;
        size_t b = t.skip_space(i + 2), e = b;
        if (is_letter(t.at(b)))
            for (++e; is_letter(t.at(e)) || is_digit(t.at(e)) || t.at(e) == '-' || t.at(e) == '.' || t.at(e) == ':' || t.at(e) == '_'; ++e) {}
        if (e > b && t.at(t.skip_space(e)) == '>') {
            tree.end(lowered(b, e));
            raw_element.clear();
            return close + 1;
        }
        if (!is_letter(t.at(i + 2))) {
            if (t.at(i + 2) == '>') return i + 3;
            tree.mark();
            return greater(i + 2) + 1;
        }
        for (e = i + 3; is_name(t.at(e)); ++e) {}
        tree.end(lowered(i + 2, e));
        return greater(e) + 1;
    }

    // Past a mark of `first`, white space and > (--\s*>, ]\s*]\s*>), from i; *begin is where it starts.
    size_t closing(size_t i, std::string_view first, bool spaced, size_t* begin) {
        for (; (i = t.find(first[0], i)) != kNone; ++i) {
            size_t j = i + 1;
            if (first.size() == 2) {
                if (spaced) j = t.skip_space(j);
                if (t.at(j) != static_cast<unsigned char>(first[1])) continue;
                ++j;
            }
            j = t.skip_space(j);
            if (t.at(j) != '>') continue;
            *begin = i;
            return j + 1;
        }
        return kNone;
    }
    bool no_comment_end = false, no_standard_end = false, no_section_end = false;

    size_t marked_section(size_t i) {
        size_t b = i + 3, e = b;
        if (b >= t.n) return kNone;
        if (!is_letter(t.p[b])) throw Rejected{};
        while (is_letter(t.at(e)) || is_digit(t.at(e)) || t.at(e) == '-' || t.at(e) == '_' || t.at(e) == '.') ++e;
        if (t.skip_space(e) >= t.n) return kNone;
        const std::string name = lowered(b, e);
        const bool standard = name == "temp" || name == "cdata" || name == "ignore" || name == "include" || name == "rcdata";
        if (!standard && name != "if" && name != "else" && name != "endif") throw Rejected{};
        size_t begin = 0;
        bool& gone = standard ? no_standard_end : no_section_end;
        const size_t end = gone ? kNone : closing(b, standard ? "]]" : "]", true, &begin);
        gone = end == kNone;
        if (end == kNone) return kNone;
        tree.mark();
        if (t.is_nocase(b, "cdata[")) {
            tree.data(t.p + b + 6, t.p + std::max(begin, b + 6));
            tree.end_data(true);
        }
        return end;
    }

    size_t declaration(size_t i) {
        if (t.is(i, "<![")) return marked_section(i);
        const size_t close = greater(t.is_nocase(i, "<!doctype") ? i + 9 : i + 2);
        if (close == kNone) return kNone;
        tree.mark();
        return close + 1;
    }
    size_t comment(size_t i) {
        size_t begin;
        const size_t end = no_comment_end ? kNone : closing(i + 4, "--", false, &begin);
        no_comment_end = end == kNone;
        if (end != kNone) tree.mark();
        return end;
    }

    size_t markup(size_t i) {
        if (is_letter(t.at(i + 1))) return start_tag(i);
        if (t.at(i + 1) == '/') return end_tag(i);
        if (t.is(i, "<!--")) return comment(i);
        if (t.at(i + 1) == '?') {
            const size_t close = greater(i + 2);
            if (close != kNone) tree.mark();
            return close == kNone ? kNone : close + 1;
        }
        return declaration(i);
    }

    // A character reference at i (&): past it; kNone where the parser stops for good, *resume then tells from where the rest
    // counts as text.
    size_t reference(size_t i, bool last, size_t* resume) {
        *resume = i;
        if (t.at(i + 1) == '#') {
            size_t b = i + 2;
            const bool hex = t.at(b) == 'x' || t.at(b) == 'X';
            if (hex) ++b;
            size_t e = b;
            uint32_t value = 0;
            for (; hex ? is_hex(t.at(e)) : is_digit(t.at(e)); ++e) {
                const uint32_t d = is_digit(t.p[e]) ? t.p[e] - '0' : lower(t.p[e]) - 'a' + 10;
                value = std::min<uint32_t>(value * (hex ? 16 : 10) + d, 0x110000);
            }
            if (e > b && e < t.n && !is_hex(t.p[e])) {
                tree.data(value);
                return t.p[e] == ';' ? e + 1 : e;
            }
            if (no_semicolon == kNone || i < no_semicolon) {
                if (t.find(';', i) == kNone) no_semicolon = i;
                else {
                    tree.data('&');
                    tree.data('#');
                    *resume = i + 2;
                }
            }
            return kNone;
        }
        if (is_letter(t.at(i + 1))) {
            auto part = [&](uint32_t c) { return is_letter(c) || is_digit(c) || c == '-' || c == '.'; };
            size_t e = i + 2;
            while (part(t.at(e))) ++e;
            if (e >= t.n)
                for (--e; e > i + 1 && (is_letter(t.p[e]) || is_digit(t.p[e])); --e) {}
            if (e > i + 1) {
                const auto known = entities.find(name(i + 1, e));
                if (known == entities.end()) tree.data(t.p + i, t.p + e);
                else
                    for (const char32_t c : known->second) tree.data(c);
                return t.p[e] == ';' ? e + 1 : e;
            }
            if (last && i + 2 == t.n) *resume = i + 1;
            return kNone;
        }
        if (i + 1 >= t.n) return kNone;
        tree.data('&');
        return i + 1;
    }
    std::string name(size_t i, size_t e) const {
        std::string s;
        for (; i < e; ++i) s += static_cast<char>(t.p[i]);
        return s;
    }

    // One pass of the parser; `last`: nothing follows, so what is incomplete is text. Gives where it stopped.
    size_t pass(size_t i, bool last) {
        while (i < t.n) {
            size_t j = i;
            if (!raw_element.empty()) {
                for (; (j = t.find("</", j)) != kNone; ++j) {
                    const size_t b = t.skip_space(j + 2);
                    if (t.is_nocase(b, raw_element) && t.at(t.skip_space(b + raw_element.size())) == '>') break;
                }
                if (j == kNone) return i;
            } else
                while (j < t.n && t.p[j] != '<' && t.p[j] != '&') ++j;
            if (i < j) tree.data(t.p + i, t.p + j);
            i = j;
            if (i == t.n) break;
            if (t.p[i] == '&') {
                size_t resume;
                const size_t e = reference(i, last, &resume);
                if (e == kNone) {
                    i = resume;
                    break;
                }
                i = e;
                continue;
            }
            const uint32_t next = t.at(i + 1);
            if (next == kEnd) break;
            if (!is_letter(next) && next != '/' && next != '?' && next != '!') {
                tree.data('<');
                ++i;
                continue;
            }
            size_t k = markup(i);
            if (k == kNone) {
                if (!last) break;
                k = greater(i + 1);
                if (k != kNone) ++k;
                else k = t.find('<', i + 1);
                if (k == kNone) k = i + 1;
                tree.data(t.p + i, t.p + k);
            }
            i = k;
        }
        if (last && i < t.n && raw_element.empty()) {
            tree.data(t.p + i, t.p + t.n);
            i = t.n;
        }
        return i;
    }

    size_t run() {
        const size_t i = pass(0, false);
        pass(i, true);
        tree.end_data();
        return tree.length;
    }
};

class HtmlText {
public:
    explicit HtmlText(Entities entities) : entities_(std::move(entities)) {}

    py::object length(const py::str& text) const {
        size_t length = 0;
        bool rejected = false;
        with_text(text, [&](const auto& t) {
            using C = std::remove_cvref_t<decltype(t.p[0])>;
            try {
                length = HtmlParser<C>{t, entities_}.run();
            } catch (const Rejected&) {
                rejected = true;
            }
        });
        if (rejected) return py::none();
        return py::int_(length);
    }

private:
    Entities entities_;
};

}  // namespace
}  // namespace lex

void add_html_text(py::module_& m) {
    py::class_<lex::HtmlText>(m, "HtmlText", "Length of the visible text of a page; see opencoder.corpus.signals.languages.html.")
        .def(py::init<lex::Entities>(), py::arg("entities"))
        .def("length", &lex::HtmlText::length, py::arg("text"), "Characters, or None if the page is refused.");
}
