// The extension module mimir_fast._C. Each file of csrc/ named here defines `bind_<file>`, which adds its functions.
#include "bindings.h"

#define MIMIR_FILES(DO) \
    DO(bf16_attention)  \
    DO(bf16_layers)     \
    DO(crop_resize)     \
    DO(fp32_attention)  \
    DO(fp32_layers)     \
    DO(linf_step)       \
    DO(masked_loss)     \
    DO(noisy_patches)   \
    DO(pair_tiles)      \
    DO(patches)         \
    DO(processor)       \
    DO(random_masks)    \
    DO(random_uniform)  \
    DO(tokens)

#define MIMIR_DECLARE(file) void bind_##file(pybind11::module_& module);
#define MIMIR_BIND(file) mimir::bind_##file(module);

namespace mimir {
MIMIR_FILES(MIMIR_DECLARE)
}  // namespace mimir

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ kernels of mimir_fast for the CPU; call them through mimir_fast._native";
    MIMIR_FILES(MIMIR_BIND)
}
