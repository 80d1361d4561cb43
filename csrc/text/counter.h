// Counts distinct strings of bytes that lie in one growing buffer (open addressing, powers of two).
#pragma once
#include <cstring>

#include "characters.h"

namespace text {

class Counter {
public:
    std::vector<uint32_t> count;  // of each distinct string, in order of first appearance

    // Makes room for about as many distinct strings, before the first.
    void expect(size_t strings) {
        size_t size = 64;
        while (size < 2 * strings) size *= 2;
        slots.assign(size, Slot{0, kNone, 0});
    }

    // The number of the string in bytes [begin, begin + bytes) of the buffer at `base`; its count goes up. The buffer may
    // move between calls, but what it holds may not change. Padded: 8 bytes behind the string may be read.
    template <bool padded = false>
    uint32_t add(const void* base, size_t begin, size_t bytes) {
        const char* p = static_cast<const char*>(base) + begin;
        const uint64_t h = padded && bytes <= 8 ? mix(bytes * kOdd ^ first(p, bytes)) : hash(p, bytes);
        if (2 * (count.size() + 1) > slots.size()) grow();
        size_t at = h & (slots.size() - 1);
        for (; slots[at].number != kNone; at = (at + 1) & (slots.size() - 1)) {
            const Slot& s = slots[at];
            // Strings of one length up to 8 bytes have hashes of their own.
            if (s.hash != h || s.bytes != bytes) continue;
            if (bytes > 8 && std::memcmp(static_cast<const char*>(base) + begins[s.number], p, bytes) != 0) continue;
            ++count[s.number];
            return s.number;
        }
        slots[at] = {h, uint32_t(count.size()), uint32_t(bytes)};
        begins.push_back(begin);
        count.push_back(1);
        return slots[at].number;
    }

private:
    static constexpr uint32_t kNone = 0xffffffffu;
    struct Slot {
        uint64_t hash;
        uint32_t number, bytes;
    };
    std::vector<Slot> slots;
    std::vector<size_t> begins;

    static constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;
    static uint64_t first(const char* p, size_t n) {  // n from 1 to 8 bytes, without a branch
        return load8(p) & (~uint64_t(0) >> (64 - 8 * n));
    }
    static uint64_t load8(const char* p) {
        uint64_t part;
        std::memcpy(&part, p, 8);
        return part;
    }
    // For n ≤ 8 one mix of all bytes: a bijection. Longer strings end with a load that overlaps the one before.
    static uint64_t hash(const char* p, size_t n) {
        uint64_t h = n * kOdd;
        if (n > 8) {
            const char* last = p + n - 8;
            for (; p < last; p += 8) h = mix(h ^ load8(p));
            return mix(h ^ load8(last));
        }
        uint64_t part = 0;
        if (n == 8) {
            part = load8(p);
        } else if (n >= 4) {
            uint32_t low, high;
            std::memcpy(&low, p, 4);
            std::memcpy(&high, p + n - 4, 4);
            part = uint64_t(high) << 32 | low;
        } else if (n) {
            part = uint64_t(uint8_t(p[0])) | uint64_t(uint8_t(p[n / 2])) << 8 | uint64_t(uint8_t(p[n - 1])) << 16;
        }
        return mix(h ^ part);
    }
    void grow() {
        std::vector<Slot> old(slots.empty() ? 64 : 2 * slots.size(), Slot{0, kNone, 0});
        old.swap(slots);
        for (const Slot& s : old) {
            if (s.number == kNone) continue;
            size_t at = s.hash & (slots.size() - 1);
            while (slots[at].number != kNone) at = (at + 1) & (slots.size() - 1);
            slots[at] = s;
        }
    }
};

}  // namespace text
