// SHA-1 of many messages at once: sixteen lanes of AVX-512, one message in each. A block of sixteen messages takes about as
// long as four blocks with the SHA instructions, because those wait for one another.
//
// A lane's message is padded as it is loaded: masked loads read no byte beyond it.
#pragma once
#include "sha1.h"

namespace sha1 {

struct Message {
    const uint8_t* data;
    size_t size;
};

#ifdef OPENCODER_X86

// Block `number` of a message as sixteen numbers, padded but for the length.
WIDE_INLINE __m512i load_block(const Message& m, size_t number) {
    const __m512i swap = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d0e0f08090a0bll, 0x0405060700010203ll));
    const size_t begin = 64 * number;
    __m512i v = _mm512_setzero_si512();
    if (begin <= m.size) {
        const size_t rest = m.size - begin;
        if (rest >= 64) {
            v = _mm512_loadu_si512(m.data + begin);
        } else {
            const uint64_t bit = uint64_t(1) << rest;
            v = _mm512_mask_blend_epi8(bit, _mm512_maskz_loadu_epi8(bit - 1, m.data + begin), _mm512_set1_epi8(-128));
        }
    }
    return _mm512_shuffle_epi8(v, swap);
}

// Sixteen rows of sixteen numbers to sixteen columns.
WIDE_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Ternary logic by truth table: choose, parity, majority.
template <int T>
WIDE_INLINE void round16(__m512i& a, __m512i& b, __m512i& c, __m512i& d, __m512i& e, __m512i (&w)[16]) {
    constexpr int table = T < 20 ? 0xca : T < 40 ? 0x96 : T < 60 ? 0xe8 : 0x96;
    constexpr uint32_t k = T < 20 ? 0x5a827999u : T < 40 ? 0x6ed9eba1u : T < 60 ? 0x8f1bbcdcu : 0xca62c1d6u;
    __m512i& x = w[T % 16];
    if constexpr (T >= 16) {
        x = _mm512_ternarylogic_epi32(x, w[(T + 13) % 16], w[(T + 8) % 16], 0x96);
        x = _mm512_rol_epi32(_mm512_xor_si512(x, w[(T + 2) % 16]), 1);
    }
    const __m512i f = _mm512_ternarylogic_epi32(b, c, d, table);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(e, x), _mm512_add_epi32(f, _mm512_set1_epi32(static_cast<int>(k))));
    b = _mm512_rol_epi32(b, 30);
    e = _mm512_add_epi32(sum, _mm512_rol_epi32(a, 5));
}

template <int T>
WIDE_INLINE void five_rounds(__m512i (&s)[5], __m512i (&w)[16]) {
    round16<T>(s[0], s[1], s[2], s[3], s[4], w);
    round16<T + 1>(s[4], s[0], s[1], s[2], s[3], w);
    round16<T + 2>(s[3], s[4], s[0], s[1], s[2], w);
    round16<T + 3>(s[2], s[3], s[4], s[0], s[1], w);
    round16<T + 4>(s[1], s[2], s[3], s[4], s[0], w);
}

// Digests of sixteen messages of the same number of blocks: out[i][lane] is word i of a lane's digest.
WIDE inline void digest16(const Message (&m)[16], size_t blocks, uint32_t (&out)[5][16]) {
    __m512i state[5];
    for (int i = 0; i < 5; ++i) state[i] = _mm512_set1_epi32(static_cast<int>(kStart[i]));
    alignas(64) uint32_t bits[2][16];  // the length in bits, as the last block's last two words
    for (int lane = 0; lane < 16; ++lane) {
        bits[0][lane] = static_cast<uint32_t>(uint64_t(m[lane].size) >> 29);
        bits[1][lane] = static_cast<uint32_t>(m[lane].size << 3);
    }
    for (size_t n = 0; n < blocks; ++n) {
        __m512i w[16], s[5];
        for (int lane = 0; lane < 16; ++lane) w[lane] = load_block(m[lane], n);
        transpose(w);
        if (n + 1 == blocks) w[14] = _mm512_load_si512(bits[0]), w[15] = _mm512_load_si512(bits[1]);
        for (int i = 0; i < 5; ++i) s[i] = state[i];
        five_rounds<0>(s, w), five_rounds<5>(s, w), five_rounds<10>(s, w), five_rounds<15>(s, w);
        five_rounds<20>(s, w), five_rounds<25>(s, w), five_rounds<30>(s, w), five_rounds<35>(s, w);
        five_rounds<40>(s, w), five_rounds<45>(s, w), five_rounds<50>(s, w), five_rounds<55>(s, w);
        five_rounds<60>(s, w), five_rounds<65>(s, w), five_rounds<70>(s, w), five_rounds<75>(s, w);
        for (int i = 0; i < 5; ++i) state[i] = _mm512_add_epi32(state[i], s[i]);
    }
    for (int i = 0; i < 5; ++i) _mm512_storeu_si512(out[i], state[i]);
}

#endif

// Collects messages and hands (tag, five digest words) to `done`, in any order; the messages must live until `finish`.
template <typename Done>
class Queue {
public:
    explicit Queue(Done done) : done_(done), wide_(cpu::has_wide()) {}

    void add(const uint8_t* data, size_t size, size_t tag) {
#ifdef OPENCODER_X86
        const size_t blocks = blocks_of(size);
        if (wide_ && blocks <= kGroups) {
            Group& g = groups_[blocks - 1];
            g.messages[g.count] = {data, size};
            g.tags[g.count] = tag;
            if (++g.count == 16) flush(g, blocks);
            return;
        }
#endif
        uint32_t state[5];
        digest(data, size, state);
        done_(tag, state);
    }

    void finish() {
        for (size_t b = 0; b < kGroups; ++b)
            if (groups_[b].count != 0) flush(groups_[b], b + 1);
    }

private:
    static constexpr size_t kGroups = 12;  // blocks of the longest messages that share lanes: a band of 128 rows has nine
    struct Group {
        Message messages[16];
        size_t tags[16];
        size_t count = 0;
    };

    void flush(Group& g, size_t blocks) {
#ifdef OPENCODER_X86
        for (size_t lane = g.count; lane < 16; ++lane) g.messages[lane] = g.messages[0];
        uint32_t words[5][16];
        digest16(g.messages, blocks, words);
        for (size_t lane = 0; lane < g.count; ++lane) {
            const uint32_t state[5] = {words[0][lane], words[1][lane], words[2][lane], words[3][lane], words[4][lane]};
            done_(g.tags[lane], state);
        }
#else
        (void)blocks;
#endif
        g.count = 0;
    }

    Done done_;
    bool wide_;
    Group groups_[kGroups];
};

}  // namespace sha1
