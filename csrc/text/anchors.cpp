// Anchors: the places of a text at which an expression is worth trying. One pass finds a set of literals (any case), the
// `@` of e-mail addresses, dotted quads and the head of global IPv6 addresses; the expressions themselves run in Python at
// the few places found. The Python version of the same search is in opencoder/corpus/transform/anchors.py and a test holds
// the two equal.
//
// Of three characters in a row the low five bits each, which are the same for both cases of a letter, are an index of a set
// of 32 Ki bits (4 KiB): at almost every position one load says that no literal starts there.
#include <array>
#include <bitset>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "module.h"

namespace {

using Hit = std::pair<Py_ssize_t, int>;
constexpr int kAt = -1, kQuad = -2, kIpv6 = -3;

constexpr uint8_t kDigit = 1, kWord = 2, kLocal = 4, kHex = 8, kSpecial = 16;
constexpr unsigned kMask = 0x7fff;

struct Literal {
    std::string text;  // lower case, Latin-1
    bool word_start;   // no letter, digit or underscore before it
    int id;
};

class AnchorScanner {
   public:
    explicit AnchorScanner(const std::vector<std::pair<std::string, bool>>& literals) {
        for (int c = 0; c < 256; ++c) {
            const bool digit = c >= '0' && c <= '9', upper = c >= 'A' && c <= 'Z', lower = c >= 'a' && c <= 'z';
            fold_[c] = static_cast<uint8_t>(upper ? c + 32 : c);
            if (digit) kind_[c] |= kDigit | kSpecial;
            if (digit || upper || lower || c == '_') kind_[c] |= kWord | kLocal;
            if (c == '.' || c == '%' || c == '+' || c == '-' || c == '\\') kind_[c] |= kLocal;
            if (digit || (fold_[c] >= 'a' && fold_[c] <= 'f')) kind_[c] |= kHex;
        }
        kind_['@'] |= kSpecial;
        int id = 0;
        for (const auto& [utf8, word_start] : literals) {
            const std::string text = latin1(utf8);
            if (text.size() < 2) throw std::invalid_argument("an anchor must have at least two characters: " + utf8);
            const unsigned pair = (text[0] & 31u) << 10 | (text[1] & 31u) << 5;
            if (text.size() > 2) starts_.set(pair | (text[2] & 31u));
            else
                for (unsigned third = 0; third < 32; ++third) starts_.set(pair | third);
            buckets_[static_cast<uint8_t>(text[0])].push_back({text, word_start, id++});
        }
    }

    std::vector<Hit> scan(const py::str& text) const {
        PyObject* object = text.ptr();
        const Py_ssize_t size = PyUnicode_GET_LENGTH(object);
        const int kind = PyUnicode_KIND(object);
        const void* data = PyUnicode_DATA(object);
        std::vector<Hit> hits;
        py::gil_scoped_release release;  // the caller's reference keeps the text alive, and a str never changes
        if (kind == PyUnicode_1BYTE_KIND) run(static_cast<const uint8_t*>(data), size, hits);
        else if (kind == PyUnicode_2BYTE_KIND) run(static_cast<const uint16_t*>(data), size, hits);
        else run(static_cast<const uint32_t*>(data), size, hits);
        return hits;
    }

   private:
    static std::string latin1(const std::string& utf8) {
        std::string out;
        for (size_t i = 0; i < utf8.size(); ++i) {
            const uint8_t c = utf8[i];
            if (c < 0x80) out += static_cast<char>(c);
            else if ((c & 0xfc) == 0xc0 && i + 1 < utf8.size()) out += static_cast<char>((c & 3) << 6 | (utf8[++i] & 0x3f));
            else throw std::invalid_argument("an anchor must be Latin-1");
        }
        return out;
    }

    template <typename Char>
    bool is(Char c, uint8_t kinds) const {
        if constexpr (sizeof(Char) > 1)
            if (c > 0xff) return false;
        return kind_[c] & kinds;
    }

    // Length of d{1,3}(.d{1,3}){3} at p, or 0.
    template <typename Char>
    Py_ssize_t quad(const Char* p, const Char* end) const {
        const Char* q = p;
        for (int part = 0; part < 4; ++part) {
            if (part && (q == end || *q++ != '.')) return 0;
            int digits = 0;
            while (q < end && digits < 3 && is(*q, kDigit)) ++q, ++digits;
            if (!digits) return 0;
        }
        return q - p;
    }

    // [23]hhh:[h:] at p.
    template <typename Char>
    bool ipv6(const Char* p, const Char* end) const {
        if (end - p < 6 || (*p != '2' && *p != '3') || p[4] != ':') return false;
        return is(p[1], kHex) && is(p[2], kHex) && is(p[3], kHex) && (is(p[5], kHex) || p[5] == ':');
    }

    template <typename Char>
    void special(const Char* data, Py_ssize_t i, Py_ssize_t size, std::vector<Hit>& hits) const {
        if (data[i] == '@') {
            if (i > 0 && i + 1 < size && is(data[i - 1], kLocal) && data[i + 1] != '_' && is(data[i + 1], kWord)) hits.emplace_back(i, kAt);
        } else if (i == 0 || !(is(data[i - 1], kWord) || data[i - 1] == '.')) {
            if (quad(data + i, data + size)) hits.emplace_back(i, kQuad);
            else if ((i == 0 || data[i - 1] != ':') && ipv6(data + i, data + size)) hits.emplace_back(i, kIpv6);
        }
    }

    template <typename Char>
    void run(const Char* data, Py_ssize_t size, std::vector<Hit>& hits) const {
        unsigned next = size > 0 ? (data[0] & 31u) << 5 : 0;
        if (size > 1) next |= data[1] & 31u;
        for (Py_ssize_t i = 0; i < size; ++i) {
            const Char c = data[i];
            next = (next << 5 | (i + 2 < size ? data[i + 2] & 31u : 0)) & kMask;
            if (is(c, kSpecial)) special(data, i, size, hits);
            if (!starts_[next] || (sizeof(Char) > 1 && c > 0xff)) continue;
            for (const Literal& literal : buckets_[fold_[c]]) {
                const auto length = static_cast<Py_ssize_t>(literal.text.size());
                if (size - i < length || (literal.word_start && i > 0 && is(data[i - 1], kWord))) continue;
                Py_ssize_t k = 1;
                for (; k < length; ++k) {
                    const Char x = data[i + k];
                    if constexpr (sizeof(Char) > 1)
                        if (x > 0xff) break;
                    if (fold_[x] != static_cast<uint8_t>(literal.text[k])) break;
                }
                if (k == length) hits.emplace_back(i, literal.id);
            }
        }
    }

    std::array<uint8_t, 256> kind_{};
    std::array<uint8_t, 256> fold_{};
    std::bitset<kMask + 1> starts_;
    std::array<std::vector<Literal>, 256> buckets_;
};

}  // namespace

void add_anchors(py::module_& m) {
    py::class_<AnchorScanner>(m, "AnchorScanner")
        .def(py::init<const std::vector<std::pair<std::string, bool>>&>(), py::arg("literals"))
        .def("scan", &AnchorScanner::scan, py::arg("text"));
}
