"""Kinds of kernels, by names that torch's profiler has given on a GPU."""

import pytest

from harness.benchmark.kernels import KINDS, REST, by_kind, kind

NAMES = {
    "matrix products": [
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN",
        "_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel13GemmUniversal",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
    ],
    "attention": [
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
        "_attend_once",
    ],
    "optimizer and other lists of tensors": [
        "void (anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata>"
    ],
    "compiled, and kernels of ours": [
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_poi_fused__to_copy_add_cat_mul_rsub_sigmoid_split_0",
        "_sum_of_rows",
    ],
    "copies, casts and gathering": [
        "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>",
        "Memcpy DtoD (Device -> Device)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>>",
    ],
    REST: ["void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>>"],
}


@pytest.mark.parametrize("expected", NAMES)
def test_kinds(expected):
    assert {kind(name) for name in NAMES[expected]} == {expected}


def test_seconds_are_added_up():
    seconds = by_kind([("nvjet_1", 1.0), ("nvjet_2", 0.5), ("unknown", 0.25)])
    assert set(NAMES) == {*KINDS, REST}
    assert seconds == {**dict.fromkeys(KINDS, 0.0), "matrix products": 1.5, REST: 0.25}
