// MIMIR_MULTIVERSION: compile a function for AVX-512, AVX2 and the baseline; the loader picks by the CPU it finds.
//
// So one wheel runs on any x86-64 and is fast on each. The clones need GNU indirect functions (glibc); elsewhere the
// macro is empty and the baseline is built. It goes on plain functions that work on a range: the bodies that OpenMP
// outlines from a loop are not cloned, hence `parallel_for` (parallel.h) calls such a function rather than being one.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__clang__) ? __clang_major__ >= 22 : defined(__GNUC__))
#if defined(__clang__) || __GNUC__ >= 12
#define MIMIR_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MIMIR_MULTIVERSION __attribute__((target_clones("avx2", "default")))
#endif
#else
#define MIMIR_MULTIVERSION
#endif

// For the shared body of several clones: it must be inlined to be compiled for the caller's instruction set.
#if defined(__GNUC__) || defined(__clang__)
#define MIMIR_INLINE inline __attribute__((always_inline))
#else
#define MIMIR_INLINE inline
#endif

// Between the first two, functions are compiled for an instruction set; between the others a multiplication and an
// addition may be one instruction.
#define MIMIR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MIMIR_V3 "avx2,bmi,bmi2,f16c,fma,lzcnt,movbe"
#define MIMIR_V4 "avx512f,avx512bw,avx512cd,avx512dq,avx512vl," MIMIR_V3
#define MIMIR_TARGET(arch) MIMIR_PRAGMA(clang attribute push(__attribute__((target(arch))), apply_to = function))
#define MIMIR_END_TARGET _Pragma("clang attribute pop")
#define MIMIR_CONTRACT _Pragma("clang fp contract(fast)")
#define MIMIR_END_CONTRACT _Pragma("clang fp contract(off)")
#else
#define MIMIR_V3 "arch=x86-64-v3"
#define MIMIR_V4 "arch=x86-64-v4"
#define MIMIR_TARGET(arch) _Pragma("GCC push_options") MIMIR_PRAGMA(GCC target(arch))
#define MIMIR_END_TARGET _Pragma("GCC pop_options")
#define MIMIR_CONTRACT _Pragma("GCC push_options") _Pragma("GCC optimize(\"fp-contract=fast\")")
#define MIMIR_END_CONTRACT _Pragma("GCC pop_options")
#endif
