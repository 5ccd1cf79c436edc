// The extension module mimir_fast._C: the functions of functions.h under their own names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "functions.h"

// Native functions touch no Python object, so they run without the interpreter lock.
#define DEFINE(name) module.def(#name, &mimir::name, pybind11::call_guard<pybind11::gil_scoped_release>())

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ kernels of mimir_fast for the CPU; call them through mimir_fast._native";
    module.def("unit", &mimir::unit_name, "the unit in use: none, avx2, …, amx");
    module.def("widest_unit", &mimir::widest_unit, "the unit of this processor");
    module.def("use_unit", &mimir::use_unit, "use this unit and none that is wider; before any kernel has run");
    module.def("bf16_unit", &mimir::bf16_unit, "what computes bf16_attention here: amx, avx512 or nothing");
#ifdef MIMIR_BF16_MATRIX
    DEFINE(bf16_attention);
    DEFINE(bf16_attention_backward);
    DEFINE(bf16_pack);
    DEFINE(bf16_linear);
    DEFINE(bf16_linear_backward);
    DEFINE(bf16_mlp);
    DEFINE(bf16_mlp_backward);
#endif
#ifdef MIMIR_VECTORS
    module.def("fp32_lanes", &mimir::fp32_lanes, "numbers in the widest vector that fp32_attention can use here");
    DEFINE(fp32_attention);
    DEFINE(fp32_attention_backward);
#endif
    DEFINE(crop_resize);
    DEFINE(fp32_gelu);
    DEFINE(fp32_gelu_backward);
    DEFINE(fp32_norm);
    DEFINE(fp32_norm_backward);
    DEFINE(linf_step);
    DEFINE(masked_loss);
    DEFINE(noisy_patches);
    DEFINE(kernel_from_gram);
    DEFINE(inner_product);
    DEFINE(pair_weights);
    DEFINE(patchify_gather);
    DEFINE(unpatchify_visible);
    DEFINE(random_masks);
    DEFINE(random_uniform);
    DEFINE(random_start_linf);
    DEFINE(check_ids);
    DEFINE(place_patches);
    DEFINE(add_positions);
    DEFINE(scatter_patches);
}
