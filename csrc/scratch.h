// Memory that a thread keeps for its next call: fresh pages cost more than the arithmetic that is done in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mimir {

inline std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Whose memory it is: what all threads of a call share, or what one works in. Two that live at once on one thread must
// differ in this; the next one of a kind reuses the memory of the last.
enum class Use { shared, own };

// Pieces of one block, aligned to 64 bytes.
template <Use kUse>
class Scratch {
  public:
    explicit Scratch(std::int64_t bytes) {
        thread_local struct Memory {
            void* begin = nullptr;
            std::int64_t bytes = 0;
            ~Memory() { std::free(begin); }
        } memory;
        if (memory.bytes < bytes) {
            std::free(memory.begin);
            memory.begin = std::aligned_alloc(kHuge, padded(bytes, kHuge));
            memory.bytes = memory.begin == nullptr ? 0 : bytes;
            if (memory.begin == nullptr) throw std::bad_alloc();
#ifdef __linux__
            madvise(memory.begin, padded(bytes, kHuge), MADV_HUGEPAGE);  // a column then lies on few pages; may fail
#endif
        }
        next_ = static_cast<char*>(memory.begin);
    }
    static constexpr std::int64_t kHuge = 1 << 21;  // bytes of a huge page

    template <typename Number>
    Number* take(std::int64_t count) {
        auto* piece = reinterpret_cast<Number*>(next_);
        next_ += padded(count * static_cast<std::int64_t>(sizeof(Number)), 64);
        return piece;
    }

  private:
    char* next_;
};

}  // namespace mimir
