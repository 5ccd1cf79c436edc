// Which instructions this processor has, and the request to use fewer (MIMIR_FAST_CPU, see mimir_fast/_native.py).
#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <stdexcept>
#include <string>

#include "functions.h"

namespace mimir {
namespace {

constexpr const char* kNames[] = {"none", "avx2", "avx512", "avx512-bf16", "amx"};

#if defined(__x86_64__)
// Linux gives tile registers to a process that asks for them.
bool given_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Unit widest() {
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (!v3) return Unit::none;
    if (!v4) return Unit::avx2;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return Unit::avx512;
    const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    return has_amx && given_tiles() ? Unit::amx : Unit::avx512_bf16;
}
#else
Unit widest() { return Unit::none; }
#endif

const Unit kWidest = widest();
Unit used = kWidest;

}  // namespace

// Raises ValueError for a name that is none of ours, or of a unit that this processor lacks.
void use_unit(const std::string& name) {
    std::string here;
    for (int i = 0; i <= static_cast<int>(kWidest); ++i) {
        if (name == kNames[i]) {
            used = static_cast<Unit>(i);
            return;
        }
        here += (i ? ", " : "") + std::string(kNames[i]);
    }
    throw std::invalid_argument("MIMIR_FAST_CPU='" + name + "', wanted one of " + here + " on this processor");
}

Unit unit() { return used; }

std::string unit_name(int) { return kNames[static_cast<int>(used)]; }

std::string widest_unit(int) { return kNames[static_cast<int>(kWidest)]; }

}  // namespace mimir
