// SHA-1 (FIPS 180-4), one message at a time: portable, or with the CPU's SHA instructions. Many short messages at once are
// faster still with AVX-512: sha1_lanes.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu.h"

namespace sha1 {

constexpr uint32_t kStart[5] = {0x67452301u, 0xefcdab89u, 0x98badcfeu, 0x10325476u, 0xc3d2e1f0u};

inline uint32_t rotate(uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }
inline uint32_t big_endian(const uint8_t* p) {
    return uint32_t(p[0]) << 24 | uint32_t(p[1]) << 16 | uint32_t(p[2]) << 8 | uint32_t(p[3]);
}
inline uint32_t swap_bytes(uint32_t h) { return h >> 24 | (h >> 8 & 0xff00u) | (h << 8 & 0xff0000u) | h << 24; }

inline void block_portable(uint32_t state[5], const uint8_t* data) {
    uint32_t w[80];
    for (int t = 0; t < 16; ++t) w[t] = big_endian(data + 4 * t);
    for (int t = 16; t < 80; ++t) w[t] = rotate(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16], 1);
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
    for (int t = 0; t < 80; ++t) {
        uint32_t f, k;
        if (t < 20) f = (b & c) | (~b & d), k = 0x5a827999u;
        else if (t < 40) f = b ^ c ^ d, k = 0x6ed9eba1u;
        else if (t < 60) f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdcu;
        else f = b ^ c ^ d, k = 0xca62c1d6u;
        const uint32_t next = rotate(a, 5) + f + e + k + w[t];
        e = d, d = c, c = rotate(b, 30), b = a, a = next;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e;
}

#ifdef OPENCODER_X86
// Twenty groups of four rounds. Message words are kept in a ring of four registers; from group 4 on each is made from the
// four before it.
template <int Group>
__attribute__((target("sha,sse4.1"), always_inline)) inline void four_rounds(__m128i& abcd, __m128i& e, __m128i (&w)[4]) {
    __m128i& current = w[Group % 4];
    if constexpr (Group >= 4) {
        current = _mm_sha1msg1_epu32(current, w[(Group + 1) % 4]);
        current = _mm_xor_si128(current, w[(Group + 2) % 4]);
        current = _mm_sha1msg2_epu32(current, w[(Group + 3) % 4]);
    }
    const __m128i before = abcd;
    e = Group == 0 ? _mm_add_epi32(e, current) : _mm_sha1nexte_epu32(e, current);
    abcd = _mm_sha1rnds4_epu32(abcd, e, Group / 5);
    e = before;
}

__attribute__((target("sha,sse4.1"))) inline void block_ni(uint32_t state[5], const uint8_t* data) {
    const __m128i swap = _mm_set_epi64x(0x0001020304050607ll, 0x08090a0b0c0d0e0fll);
    __m128i abcd = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state)), 0x1b);
    __m128i e = _mm_set_epi32(static_cast<int>(state[4]), 0, 0, 0);
    const __m128i abcd_in = abcd, e_in = e;
    __m128i w[4];
    for (int i = 0; i < 4; ++i)
        w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 16 * i)), swap);
    four_rounds<0>(abcd, e, w), four_rounds<1>(abcd, e, w), four_rounds<2>(abcd, e, w), four_rounds<3>(abcd, e, w);
    four_rounds<4>(abcd, e, w), four_rounds<5>(abcd, e, w), four_rounds<6>(abcd, e, w), four_rounds<7>(abcd, e, w);
    four_rounds<8>(abcd, e, w), four_rounds<9>(abcd, e, w), four_rounds<10>(abcd, e, w), four_rounds<11>(abcd, e, w);
    four_rounds<12>(abcd, e, w), four_rounds<13>(abcd, e, w), four_rounds<14>(abcd, e, w), four_rounds<15>(abcd, e, w);
    four_rounds<16>(abcd, e, w), four_rounds<17>(abcd, e, w), four_rounds<18>(abcd, e, w), four_rounds<19>(abcd, e, w);
    abcd = _mm_add_epi32(abcd, abcd_in);
    e = _mm_sha1nexte_epu32(e, e_in);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_shuffle_epi32(abcd, 0x1b));
    state[4] = static_cast<uint32_t>(_mm_extract_epi32(e, 3));
}
#endif

inline void block(uint32_t state[5], const uint8_t* data) {
#ifdef OPENCODER_X86
    if (cpu::has_sha()) return block_ni(state, data);
#endif
    block_portable(state, data);
}

// 64-byte blocks of a padded message.
inline size_t blocks_of(size_t size) { return (size + 8) / 64 + 1; }

inline void digest(const uint8_t* data, size_t size, uint32_t state[5]) {
    std::memcpy(state, kStart, sizeof kStart);
    size_t at = 0;
    for (; at + 64 <= size; at += 64) block(state, data + at);
    uint8_t tail[128] = {};
    const size_t rest = size - at;
    if (rest != 0) std::memcpy(tail, data + at, rest);  // data may be null where size is 0
    tail[rest] = 0x80;
    const size_t padded = rest < 56 ? 64 : 128;
    const uint64_t bits = uint64_t(size) * 8;
    for (int i = 0; i < 8; ++i) tail[padded - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
    block(state, tail);
    if (padded == 128) block(state, tail + 64);
}

}  // namespace sha1
