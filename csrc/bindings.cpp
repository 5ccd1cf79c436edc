// The extension module mimir_fast._C: one line per op.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ kernels of mimir_fast for the CPU; call them through mimir_fast._native";
    mimir::bind_crop_resize(module);
    mimir::bind_bf16_attention(module);
    mimir::bind_bf16_layers(module);
    mimir::bind_fp32_attention(module);
    mimir::bind_fp32_layers(module);
    mimir::bind_linf_step(module);
    mimir::bind_masked_loss(module);
    mimir::bind_noisy_patches(module);
    mimir::bind_pair_tiles(module);
    mimir::bind_patches(module);
    mimir::bind_processor(module);
    mimir::bind_random_masks(module);
    mimir::bind_random_uniform(module);
    mimir::bind_tokens(module);
}
