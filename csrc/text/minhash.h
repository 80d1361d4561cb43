// From the tokens of a text to its signature: hashes of the distinct shingles, then the least image under each permutation.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "permute.h"
#include "sha1_lanes.h"
#include "tokens.h"

namespace minhash {

constexpr uint64_t kBase = 0x9e3779b97f4a7c15ull;  // multiplier of the rolling hash (`fast`): odd, bits well spread

enum class Scheme { legacy, affine32, fast };

inline Scheme scheme_of(const std::string& name) {
    if (name == "legacy") return Scheme::legacy;
    if (name == "affine32") return Scheme::affine32;
    if (name == "fast") return Scheme::fast;
    throw std::invalid_argument("scheme must be legacy, affine32 or fast, not " + name);
}

inline uint32_t fmix32(uint32_t h) {  // MurmurHash3's finaliser
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}
inline uint64_t fmix64(uint64_t h) {
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

// Eight bytes at a time, little-endian, the last ones padded with zeros; the length keeps "a" and "a\0" apart. At least
// eight bytes after the token must be readable.
inline uint64_t token_hash(const uint8_t* p, size_t n) {
    uint64_t h = uint64_t(n) * kBase;
    for (;; p += 8, n -= 8) {
        uint64_t chunk;
        std::memcpy(&chunk, p, 8);
        if (n < 8) chunk &= (uint64_t(1) << (8 * n)) - 1;
        h = (h ^ chunk) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
        if (n <= 8) return h * 0xc4ceb9fe1a85ec53ull;
    }
}

// 64-bit hashes of the n-token shingles: fmix64 of Σ t[i+j]·base^(n−1−j) mod 2⁶⁴, t the token hashes.
inline void rolling_hashes(const tokens::Reader& r, size_t n, std::vector<uint64_t>& t, std::vector<uint64_t>& out) {
    const size_t count = r.count();
    t.resize(count);
    for (size_t i = 0, begin = 0; i < count; begin = r.end(i) + 1, ++i) t[i] = token_hash(r.data() + begin, r.end(i) - begin);
    uint64_t beyond = 1, h = 0;  // the factor that the leaving token has after one more step
    for (size_t j = 0; j < n; ++j) beyond *= kBase, h = h * kBase + t[j];
    out.resize(count - n + 1);
    out[0] = h;
    for (size_t i = n; i < count; ++i) out[i - n + 1] = h = h * kBase + (t[i] - t[i - n] * beyond);
    for (auto& x : out) x = fmix64(x);
}

// Drops repeated numbers, keeping the first, with a table that fits the caches; numbers are spread evenly (hashes). A run of
// kProbes full places leaves a number in although it may be a repetition, which costs time, never a wrong minimum: so no
// input makes this slow.
class Distinct {
public:
    void filter(std::vector<uint32_t>& hashes) {
        constexpr size_t kProbes = 16;
        int bits = 6;
        while ((size_t(1) << bits) < 2 * hashes.size() && bits < 31) ++bits;
        table_.assign((size_t(1) << bits) + kProbes, 0);
        bool zero = false;
        size_t kept = 0;
        for (const uint32_t h : hashes) {
            if (h == 0) {  // 0 marks a free place
                if (!zero) hashes[kept++] = 0;
                zero = true;
                continue;
            }
            size_t at = h >> (32 - bits);
            const size_t end = at + kProbes;
            while (at < end && table_[at] != 0 && table_[at] != h) ++at;
            if (at < end && table_[at] == h) continue;
            if (at < end) table_[at] = h;
            hashes[kept++] = h;
        }
        hashes.resize(kept);
    }

private:
    std::vector<uint32_t> table_;
};

// Hashes of the shingles of one text after another; the vectors are kept between texts.
class Shingler {
public:
    Shingler(Scheme scheme, size_t ngram, bool distinct) : scheme_(scheme), ngram_(ngram), distinct_(distinct) {
        if (ngram == 0) throw std::invalid_argument("ngram must be at least 1");
    }

    // 32-bit hashes ready for the permutations. None for a text without tokens; a text of fewer than n is one shingle.
    std::vector<uint32_t>& hashes(std::string_view text) {
        reader_.read(text);
        out_.clear();
        const size_t count = reader_.count();
        if (count == 0) return out_;
        const size_t n = std::min(ngram_, count);
        out_.resize(count - n + 1);
        if (scheme_ == Scheme::fast) {
            rolling_hashes(reader_, n, token_hashes_, wide_);
            for (size_t i = 0; i < out_.size(); ++i) out_[i] = static_cast<uint32_t>(wide_[i]);
        } else {
            uint32_t* out = out_.data();
            auto first_word = [out](size_t i, const uint32_t* state) { out[i] = sha1::swap_bytes(state[0]); };
            sha1::Queue queue(first_word);
            for (size_t i = 0; i < out_.size(); ++i) {
                const size_t begin = reader_.begin(i);
                queue.add(reader_.data() + begin, reader_.end(i + n - 1) - begin, i);
            }
            queue.finish();
        }
        finish();
        return out_;
    }

    // The same of given shingles.
    std::vector<uint32_t>& hashes(const std::vector<std::string_view>& shingles) {
        out_.resize(shingles.size());
        uint32_t* out = out_.data();
        auto first_word = [out](size_t i, const uint32_t* state) { out[i] = sha1::swap_bytes(state[0]); };
        sha1::Queue queue(first_word);
        for (size_t i = 0; i < shingles.size(); ++i)
            queue.add(reinterpret_cast<const uint8_t*>(shingles[i].data()), shingles[i].size(), i);
        queue.finish();
        finish();
        return out_;
    }

private:
    void finish() {
        if (distinct_) unique_.filter(out_);
        if (scheme_ == Scheme::affine32)
            for (auto& h : out_) h = fmix32(h);
    }

    Scheme scheme_;
    size_t ngram_;
    bool distinct_;
    tokens::Reader reader_;
    Distinct unique_;
    std::vector<uint32_t> out_;
    std::vector<uint64_t> token_hashes_, wide_;
};

// Permutations ready for the kernels. Values of every scheme have 32 bits.
class Permutations {
public:
    Permutations(const uint64_t* a, const uint64_t* b, size_t perms, Scheme scheme) : scheme_(scheme), perms_(perms) {
        // One tile beyond the end: a range may begin anywhere and is worked on in whole tiles.
        const size_t room = permute::padded(perms) + permute::kTile;
        if (scheme == Scheme::legacy) {
            a64_.assign(a, a + perms), b64_.assign(b, b + perms);
            a64_.resize(room), b64_.resize(room);
        } else {
            a32_.resize(room), b32_.resize(room);
            for (size_t k = 0; k < perms; ++k)
                a32_[k] = static_cast<uint32_t>(a[k]), b32_[k] = static_cast<uint32_t>(b[k]);
        }
        out_.resize(room + permute::kTile);
    }

    // Slots [begin, end) of the signature, at the same places of the answer.
    const uint32_t* run(const std::vector<uint32_t>& hashes, size_t begin, size_t end) {
        const size_t n = end - begin;
        if (scheme_ == Scheme::legacy)
            permute::legacy(a64_.data() + begin, b64_.data() + begin, hashes.data(), hashes.size(), out_.data() + begin, n);
        else
            permute::affine32(a32_.data() + begin, b32_.data() + begin, hashes.data(), hashes.size(), out_.data() + begin, n);
        return out_.data();
    }

    size_t size() const { return perms_; }

private:
    Scheme scheme_;
    size_t perms_;
    std::vector<uint32_t> a32_, b32_, out_;
    std::vector<uint64_t> a64_, b64_;
};

}  // namespace minhash
