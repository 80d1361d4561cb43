// The permutations of MinHash: for each of `perms`, the least image of all hashes of a text.
//
// They dominate the time of a long signature, so each tile of them stays in registers while all hashes pass by. `a`, `b`
// and `out` must be readable (writable) up to the next multiple of 64.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu.h"

namespace permute {

typedef uint32_t Lane32 __attribute__((vector_size(64)));
typedef uint64_t Lane64 __attribute__((vector_size(64)));

constexpr uint64_t kPrime = (uint64_t(1) << 61) - 1;
constexpr uint32_t kEmpty = 0xffffffffu;
constexpr size_t kTile = 64;

inline size_t padded(size_t perms) { return (perms + kTile - 1) / kTile * kTile; }

// Clones of the plain loops. Compiled once per library: this header has one includer that needs them.
CLONES static void affine32_plain(const uint32_t* a, const uint32_t* b, const uint32_t* hashes, size_t count, uint32_t* out,
                                  size_t perms) {
    for (size_t k = 0; k < perms; k += kTile) {
        Lane32 va[4], vb[4];  // copied: a range may begin anywhere, a vector must be aligned
        std::memcpy(va, a + k, sizeof va), std::memcpy(vb, b + k, sizeof vb);
        const Lane32 a0 = va[0], a1 = va[1], a2 = va[2], a3 = va[3], b0 = vb[0], b1 = vb[1], b2 = vb[2], b3 = vb[3];
        Lane32 m0 = Lane32{} - 1, m1 = m0, m2 = m0, m3 = m0;
        for (size_t i = 0; i < count; ++i) {
            const Lane32 h = Lane32{} + hashes[i];
            const Lane32 v0 = a0 * h + b0, v1 = a1 * h + b1, v2 = a2 * h + b2, v3 = a3 * h + b3;
            m0 = v0 < m0 ? v0 : m0;
            m1 = v1 < m1 ? v1 : m1;
            m2 = v2 < m2 ? v2 : m2;
            m3 = v3 < m3 ? v3 : m3;
        }
        const Lane32 m[4] = {m0, m1, m2, m3};
        std::memcpy(out + k, m, sizeof m);
    }
}

CLONES static void legacy_plain(const uint64_t* a, const uint64_t* b, const uint32_t* hashes, size_t count, uint32_t* out,
                                size_t perms) {
    for (size_t k = 0; k < perms; k += 32) {
        Lane64 va[4], vb[4], m[4];
        std::memcpy(va, a + k, sizeof va), std::memcpy(vb, b + k, sizeof vb);
        for (auto& x : m) x = Lane64{} + uint64_t(kEmpty);
        for (size_t i = 0; i < count; ++i) {
            const Lane64 h = Lane64{} + uint64_t(hashes[i]);
            for (int j = 0; j < 4; ++j) {
                const Lane64 v = va[j] * h + vb[j];
                Lane64 s = (v & kPrime) + (v >> 61);
                s = s >= kPrime ? s - kPrime : s;
                s &= 0xffffffffull;
                m[j] = s < m[j] ? s : m[j];
            }
        }
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < 8; ++i) out[k + 8 * j + i] = static_cast<uint32_t>(m[j][i]);
    }
}

// ((a·h + b mod 2⁶⁴) mod 2⁶¹−1) & 2³²−1, without division.
inline uint32_t legacy_value(uint64_t a, uint64_t b, uint32_t h) {
    const uint64_t v = a * h + b;
    uint64_t s = (v & kPrime) + (v >> 61);
    if (s >= kPrime) s -= kPrime;
    return static_cast<uint32_t>(s);
}

#ifdef OPENCODER_X86

WIDE static void affine32_wide(const uint32_t* a, const uint32_t* b, const uint32_t* hashes, size_t count, uint32_t* out,
                               size_t perms) {
    for (size_t k = 0; k < perms; k += kTile) {
        __m512i va[4], vb[4], m[4];
        for (int j = 0; j < 4; ++j) {
            va[j] = _mm512_loadu_si512(a + k + 16 * j);
            vb[j] = _mm512_loadu_si512(b + k + 16 * j);
            m[j] = _mm512_set1_epi32(-1);
        }
        for (size_t i = 0; i < count; ++i) {
            const __m512i h = _mm512_set1_epi32(static_cast<int>(hashes[i]));
            for (int j = 0; j < 4; ++j)
                m[j] = _mm512_min_epu32(m[j], _mm512_add_epi32(_mm512_mullo_epi32(va[j], h), vb[j]));
        }
        for (int j = 0; j < 4; ++j) _mm512_storeu_si512(out + k + 16 * j, m[j]);
    }
}

// Sixteen permutations in thirty-two bits. With v = a·h + b + 1 mod 2⁶⁴, low(v) + (v >> 61) mod 2³² is one more than the
// wanted value, but for the few v next to a multiple of 2⁶¹ and for the value 2³²−1; in all of those it is at most 8. So a
// least value above 8 is right, and a lane with a smaller one is worked out again the plain way (once in 500 documents).
//
// hi(v) = hi(lo(a)·h + b + 1) + hi(a)·h, all mod 2³²: one 32×32→64 product for each of the even and the odd lanes and one
// 32-bit product for all of them, instead of two 64-bit products of three operations each.
WIDE static void legacy_wide(const uint64_t* a, const uint64_t* b, const uint32_t* hashes, size_t count, uint32_t* out,
                             size_t perms) {
    constexpr int kWays = 2;
    constexpr __mmask16 odd = 0xaaaa;
    for (size_t k = 0; k < perms; k += 16 * kWays) {
        __m512i even_a[kWays], odd_a[kWays], high_a[kWays], even_b[kWays], odd_b[kWays], m[kWays];
        for (int j = 0; j < kWays; ++j) {
            alignas(64) uint64_t part[4][8];
            alignas(64) uint32_t high[16];
            for (int i = 0; i < 8; ++i) {
                const size_t even = k + 16 * j + 2 * i;
                part[0][i] = a[even], part[1][i] = a[even + 1];  // the product reads the low halves
                part[2][i] = b[even] + 1, part[3][i] = b[even + 1] + 1;
                high[2 * i] = static_cast<uint32_t>(a[even] >> 32), high[2 * i + 1] = static_cast<uint32_t>(a[even + 1] >> 32);
            }
            even_a[j] = _mm512_load_si512(part[0]), odd_a[j] = _mm512_load_si512(part[1]);
            even_b[j] = _mm512_load_si512(part[2]), odd_b[j] = _mm512_load_si512(part[3]);
            high_a[j] = _mm512_load_si512(high);
            m[j] = _mm512_set1_epi32(-1);
        }
        for (size_t i = 0; i < count; ++i) {
            const __m512i h = _mm512_set1_epi32(static_cast<int>(hashes[i]));
            for (int j = 0; j < kWays; ++j) {
                const __m512i e = _mm512_add_epi64(_mm512_mul_epu32(even_a[j], h), even_b[j]);
                const __m512i o = _mm512_add_epi64(_mm512_mul_epu32(odd_a[j], h), odd_b[j]);
                const __m512i low = _mm512_mask_shuffle_epi32(e, odd, o, _MM_PERM_CCAA);
                const __m512i high = _mm512_mask_shuffle_epi32(o, 0x5555, e, _MM_PERM_DDBB);
                const __m512i top = _mm512_srli_epi32(_mm512_add_epi32(high, _mm512_mullo_epi32(high_a[j], h)), 29);
                m[j] = _mm512_min_epu32(m[j], _mm512_add_epi32(low, top));
            }
        }
        for (int j = 0; j < kWays; ++j) {
            _mm512_storeu_si512(out + k + 16 * j, _mm512_sub_epi32(m[j], _mm512_set1_epi32(1)));
            uint32_t doubtful = _mm512_cmple_epu32_mask(m[j], _mm512_set1_epi32(8));
            for (; doubtful != 0; doubtful &= doubtful - 1) {
                const size_t p = k + 16 * j + static_cast<size_t>(__builtin_ctz(doubtful));
                uint32_t least = kEmpty;
                for (size_t i = 0; i < count; ++i) {
                    const uint32_t value = legacy_value(a[p], b[p], hashes[i]);
                    least = value < least ? value : least;
                }
                out[p] = least;
            }
        }
    }
}

#endif

// min over hashes of a·h + b mod 2³².
inline void affine32(const uint32_t* a, const uint32_t* b, const uint32_t* hashes, size_t count, uint32_t* out, size_t perms) {
#ifdef OPENCODER_X86
    if (cpu::has_wide()) return affine32_wide(a, b, hashes, count, out, perms);
#endif
    affine32_plain(a, b, hashes, count, out, perms);
}

// min over hashes of ((a·h + b mod 2⁶⁴) mod 2⁶¹−1) & 2³²−1; the product wraps first, as in datasketch. Values have 32 bits.
inline void legacy(const uint64_t* a, const uint64_t* b, const uint32_t* hashes, size_t count, uint32_t* out, size_t perms) {
    if (count == 0) {  // no value at all, not the sentinel of the wide loop less one
        std::memset(out, 0xff, padded(perms) * sizeof *out);
        return;
    }
#ifdef OPENCODER_X86
    if (cpu::has_wide()) return legacy_wide(a, b, hashes, count, out, perms);
#endif
    legacy_plain(a, b, hashes, count, out, perms);
}

}  // namespace permute
