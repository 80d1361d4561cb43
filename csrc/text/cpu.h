// What the processor at hand can do, asked once. Tests lower it to compare the versions of a function.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define OPENCODER_X86 1
#endif

// Clones of a plain vector loop for wider registers, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// The instructions of Ice Lake and Zen 4 on: compressing bytes, rotating and three-way logic on 64 bytes.
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt,lzcnt")))
#define WIDE_INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt,lzcnt"), always_inline)) inline

namespace cpu {

enum Level { plain = 0, sha = 1, wide = 2 };

inline int detect() {
#ifdef OPENCODER_X86
    __builtin_cpu_init();
    uint32_t eax = 7, ebx = 0, ecx = 0, edx = 0;  // CPUID leaf 7, EBX bit 29: SHA; __builtin_cpu_supports lacks "sha"
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const bool ni = (ebx >> 29 & 1) && __builtin_cpu_supports("sse4.1");
    const bool avx512 = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2");
    return ni && avx512 ? wide : ni ? sha : plain;
#else
    return plain;
#endif
}

inline std::atomic<int> level{detect()};

inline bool has_sha() { return level.load(std::memory_order_relaxed) >= sha; }
inline bool has_wide() { return level.load(std::memory_order_relaxed) >= wide; }

}  // namespace cpu
