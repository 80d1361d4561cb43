// True Jaccard similarity of the shingle sets of texts, without hashing away a difference.
//
// Distinct tokens get consecutive numbers; then the pair (number of the first k tokens, number of the next token) gets one,
// and so on up to n tokens: equal numbers mean equal shingles, byte for byte. n table look-ups per token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "minhash.h"
#include "tokens.h"

namespace jaccard {

// Consecutive numbers for the distinct keys that it is asked for. Open addressing on a mixed 64-bit key.
class Numbers {
public:
    Numbers() : places_(1024, Place{0, 0}) {}
    uint32_t of(uint64_t key) {
        if (2 * count_ >= places_.size()) grow();
        Place& p = places_[find(key)];
        if (p.number == 0) {
            if (count_ == UINT32_MAX - 1) throw std::length_error("more than 2³² distinct shingles in one batch: use smaller batches");
            p = {key, ++count_};
        }
        return p.number - 1;
    }

private:
    struct Place {
        uint64_t key;
        uint32_t number;  // from 1; 0: free
    };
    size_t find(uint64_t key) const {
        const size_t mask = places_.size() - 1;
        size_t at = minhash::fmix64(key) & mask;
        while (places_[at].number != 0 && places_[at].key != key) at = (at + 1) & mask;
        return at;
    }
    void grow() {
        std::vector<Place> old(4 * places_.size(), Place{0, 0});
        old.swap(places_);
        for (const Place& p : old)
            if (p.number != 0) places_[find(p.key)] = p;
    }
    std::vector<Place> places_;
    uint32_t count_ = 0;
};

// Shingle sets of a batch of texts as sorted vectors of numbers. Memory: the tokens' bytes once, about 24 bytes for each
// distinct n-gram of each length, 4 bytes per shingle of each text.
class Sets {
public:
    template <typename Batch>
    Sets(const Batch& texts, size_t ngram) : sets_(texts.size()), lengths_(texts.size()) {
        tokens::Reader reader;
        std::vector<uint32_t> first;
        for (size_t d = 0; d < texts.size(); ++d) {
            reader.read(texts[d]);
            const size_t count = reader.count();
            if (count == 0) continue;
            const size_t n = std::min(ngram, count);
            first.resize(count);
            for (size_t i = 0; i < count; ++i) {
                const auto* p = reinterpret_cast<const char*>(reader.data()) + reader.begin(i);
                first[i] = token(std::string_view(p, reader.end(i) - reader.begin(i)));
            }
            if (pairs_.size() < n) pairs_.resize(n);
            auto& set = sets_[d];
            set.assign(first.begin(), first.begin() + static_cast<std::ptrdiff_t>(count - n + 1));
            for (size_t k = 1; k < n; ++k)
                for (size_t i = 0; i < set.size(); ++i) set[i] = pairs_[k].of(uint64_t(set[i]) << 32 | first[i + k]);
            std::sort(set.begin(), set.end());
            set.erase(std::unique(set.begin(), set.end()), set.end());
            lengths_[d] = n;
        }
    }

    // 1 if neither text has a shingle.
    double similarity(size_t x, size_t y) const {
        const auto &a = sets_[x], &b = sets_[y];
        if (a.empty() && b.empty()) return 1.0;
        size_t common = 0;
        // Sets of shingles of other lengths have nothing in common: numbers of one length say nothing about another.
        if (lengths_[x] == lengths_[y])
            for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
                if (a[i] == b[j]) ++common;
                const bool left = a[i] <= b[j], right = b[j] <= a[i];
                i += left, j += right;
            }
        return static_cast<double>(common) / static_cast<double>(a.size() + b.size() - common);
    }

private:
    uint32_t token(std::string_view t) {
        const auto found = tokens_.find(t);
        if (found != tokens_.end()) return found->second;
        const auto number = static_cast<uint32_t>(tokens_.size());
        tokens_.emplace(std::string(t), number);
        return number;
    }

    struct Hash {
        using is_transparent = void;
        size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
    };
    std::unordered_map<std::string, uint32_t, Hash, std::equal_to<>> tokens_;
    std::vector<Numbers> pairs_;  // by shingle length
    std::vector<std::vector<uint32_t>> sets_;
    std::vector<size_t> lengths_;  // tokens per shingle of each text: fewer than asked for where the text is shorter
};

}  // namespace jaccard
