// The tokens of a text: the non-empty parts of re.split(r"\W+", text.lower()) of Python, written one after another with one
// space between, so that a shingle of n tokens is a slice of that buffer and nothing is copied per shingle.
//
// Which code points are word characters and what each becomes in lower case comes from Python itself (set_tables), so that
// both follow one version of Unicode. Lower case is a map of single code points but for the capital sigma, whose lower form
// depends on its neighbours: the caller passes a text that has one after lowering it in Python. Lowering twice changes nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cpu.h"

namespace tokens {

// Filled once, before any text is read.
struct Tables {
    std::vector<uint8_t> word;          // by code point: 1 for a word character (`\w` of Python's re)
    std::vector<uint32_t> lower;        // by code point: its lower case, or kSeveral | index into `several`
    std::vector<std::u32string> several;  // lower cases of more than one code point
    uint8_t ascii[128];                 // lower-cased word character, or 0
    static constexpr uint32_t kSeveral = 0x80000000u;
};
inline Tables tables;

constexpr std::string_view kCapitalSigma = "\xce\xa3";

// The input must be valid UTF-8, surrogates allowed; anything that would read or write out of bounds is refused.
inline uint32_t decode(const uint8_t* p, size_t left, size_t& length) {
    length = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc0 || p[0] >= 0xf8 || length > left) throw std::invalid_argument("text is not valid UTF-8");
    uint32_t c = p[0] & (0xffu >> (length + 1));
    for (size_t j = 1; j < length; ++j) {
        if ((p[j] & 0xc0) != 0x80) throw std::invalid_argument("text is not valid UTF-8");
        c = c << 6 | (p[j] & 0x3fu);
    }
    if (c >= tables.word.size()) throw std::invalid_argument("text is not valid UTF-8");
    return c;
}

inline size_t encode(uint32_t c, uint8_t* out) {
    if (c < 0x80) return out[0] = static_cast<uint8_t>(c), 1;
    const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    static constexpr uint8_t lead[4] = {0, 0xc0, 0xe0, 0xf0};
    out[0] = static_cast<uint8_t>(lead[more] | c >> (6 * more));
    for (int j = 1; j <= more; ++j) out[j] = static_cast<uint8_t>(0x80 | (c >> (6 * (more - j)) & 0x3f));
    return static_cast<size_t>(more) + 1;
}

class Reader {
public:
    static constexpr size_t kSlack = 64;  // readable and writable bytes after the tokens: whole registers are stored

    // Touches about the text's size + 4 bytes per token (address space: 4.5 × the text), kept for the next text.
    void read(std::string_view text) {
        // A code point's lower case takes at most 3 bytes for 2 (İ, two bytes, becomes i and a combining dot, three).
        const size_t room = text.size() + text.size() / 2 + 2 * kSlack;
        if (room > UINT32_MAX) throw std::length_error("a text of more than 2.8 GB has no signature: split it");
        if (room > capacity_) {
            buffer_ = std::make_unique_for_overwrite<uint8_t[]>(room);
            ends_ = std::make_unique_for_overwrite<uint32_t[]>(room / 2 + kSlack);
            capacity_ = room;
        }
        size_ = count_ = 0;
        inside_ = false;
        const auto* p = reinterpret_cast<const uint8_t*>(text.data());
        for (size_t i = 0; i < text.size();) {
#ifdef OPENCODER_X86
            if (wide_) i = ascii_wide(p, i, text.size());
            if (i >= text.size()) break;
#endif
            i = plain(p, i, text.size());
        }
        if (inside_) ends_[count_++] = static_cast<uint32_t>(size_);
        inside_ = false;
    }

    size_t count() const { return count_; }
    const uint8_t* data() const { return buffer_.get(); }
    size_t begin(size_t i) const { return i == 0 ? 0 : ends_[i - 1] + 1; }
    size_t end(size_t i) const { return ends_[i]; }

private:
    void put(uint8_t lowered_or_zero) {
        const bool word = lowered_or_zero != 0;
        buffer_[size_] = word ? lowered_or_zero : ' ';
        ends_[count_] = static_cast<uint32_t>(size_);
        count_ += inside_ & !word;
        size_ += word | inside_;
        inside_ = word;
    }

    void put_code_point(uint32_t c) {
        if (c < 128) return put(tables.ascii[c]);
        if (!tables.word[c]) return put(0);
        size_ += encode(c, buffer_.get() + size_);
        inside_ = true;
    }

    // From i on; stops after 64 bytes of ASCII so that the wide version may take over again.
    size_t plain(const uint8_t* p, size_t i, size_t n) {
        for (size_t ascii = 0; i < n && (ascii < 64 || !wide_);) {
            if (p[i] < 0x80) {
                put(tables.ascii[p[i++]]);
                ++ascii;
                continue;
            }
            ascii = 0;
            size_t length;
            const uint32_t c = decode(p + i, n - i, length);
            const uint32_t low = c < tables.lower.size() ? tables.lower[c] : c;
            if (low & Tables::kSeveral)
                for (const char32_t each : tables.several[low ^ Tables::kSeveral]) put_code_point(each);
            else
                put_code_point(low);
            i += length;
        }
        return i;
    }

#ifdef OPENCODER_X86
    // 64 bytes at a time up to the first block with other than ASCII. A byte stays if it belongs to a word or ends one;
    // those that stay are pressed together, and so is the mask of those that end one.
    WIDE size_t ascii_wide(const uint8_t* p, size_t i, size_t n) {
        const __m512i iota = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928, 0x2726252423222120,
                                              0x1f1e1d1c1b1a1918, 0x1716151413121110, 0x0f0e0d0c0b0a0908, 0x0706050403020100);
        for (; i < n; i += 64) {
            const size_t left = n - i;
            const uint64_t valid = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
            const __m512i v = _mm512_maskz_loadu_epi8(valid, p + i);  // zeros after the end: not of a word
            if (_mm512_movepi8_mask(v) != 0) return i;
            const __mmask64 upper = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('A')), _mm512_set1_epi8(26));
            const __m512i low = _mm512_mask_add_epi8(v, upper, v, _mm512_set1_epi8(32));
            const uint64_t word = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(low, _mm512_set1_epi8('a')), _mm512_set1_epi8(26)) |
                                  _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('0')), _mm512_set1_epi8(10)) |
                                  _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('_'));
            const uint64_t ending = (word << 1 | uint64_t(inside_)) & ~word, stays = word | ending;
            const __m512i spaced = _mm512_mask_blend_epi8(word, _mm512_set1_epi8(' '), low);
            _mm512_storeu_si512(buffer_.get() + size_, _mm512_maskz_compress_epi8(stays, spaced));
            const uint64_t pressed = _pext_u64(ending, stays);
            const auto found = static_cast<size_t>(__builtin_popcountll(pressed));
            __m512i at = _mm512_maskz_compress_epi8(pressed, iota);
            for (size_t done = 0; done < found; done += 16) {
                const __m512i sixteen = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(at));
                _mm512_storeu_si512(ends_.get() + count_ + done, _mm512_add_epi32(sixteen, _mm512_set1_epi32(static_cast<int>(size_))));
                at = _mm512_shuffle_i64x2(at, at, 0x39);  // the next sixteen bytes to the front
            }
            count_ += found;
            size_ += static_cast<size_t>(__builtin_popcountll(stays));
            inside_ = word >> 63;
        }
        return n;
    }
#endif

    std::unique_ptr<uint8_t[]> buffer_;
    std::unique_ptr<uint32_t[]> ends_;  // where each token ends; a space follows
    size_t capacity_ = 0, size_ = 0, count_ = 0;
    bool inside_ = false;
    const bool wide_ = cpu::has_wide();
};

}  // namespace tokens
