// As kernels_avx512.cpp, for bfloat16 alone, which the processor narrows to (AVX-512 BF16: Cooper
// Lake, Zen 4 and later).
#include "kernel_table.h"
#if defined(LKA_BUILD_AVX512_BF16)
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
// GCC 12 warns of its own undefined-vector intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define LKA_VECTOR_BYTES 64
#define LKA_F16C
#define LKA_AVX512
#define LKA_AVX512_BF16
#define LKA_BFLOAT16_ONLY
#define LKA_TABLE kernels_avx512_bf16
#include "kernels_for_isa.h"
#endif
