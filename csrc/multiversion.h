// MIMIR_MULTIVERSION: compile a function for AVX-512, AVX2 and the baseline; the loader picks by the CPU it finds.
//
// So one wheel runs on any x86-64 and is fast on each. The clones need GNU indirect functions (glibc); elsewhere the
// macro is empty and the baseline is built. It goes on plain functions that work on a range: the bodies that OpenMP
// outlines from a loop are not cloned, hence `parallel_for` (parallel.h) calls such a function rather than being one.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
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
