// parallel_for: a range cut into equal chunks, one per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

namespace mimir {

// Calls body(begin, end) on disjoint ranges that cover [0, n). A chunk has at least `grain` items, since waking a
// thread costs a few microseconds; results must not depend on where the cuts fall. What a chunk throws (there may be no
// memory for it) is thrown here once all have ended: an exception that leaves a thread of OpenMP ends the process.
template <typename Body>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, const Body& body) {
    const std::int64_t chunks = std::clamp<std::int64_t>(n / std::max<std::int64_t>(grain, 1), 1, std::max(threads, 1));
    if (chunks == 1) {
        if (n > 0) body(std::int64_t{0}, n);
        return;
    }
    std::exception_ptr thrown;
#pragma omp parallel for num_threads(static_cast<int>(chunks)) schedule(static, 1)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        try {
            body(n * chunk / chunks, n * (chunk + 1) / chunks);
        } catch (...) {
#pragma omp critical(mimir_parallel_for)
            thrown = std::current_exception();
        }
    }
    if (thrown) std::rethrow_exception(thrown);
}

}  // namespace mimir
