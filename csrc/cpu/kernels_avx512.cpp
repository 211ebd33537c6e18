// x86-64 with AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and later).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
// GCC 12 warns of its own undefined-vector intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define LKA_VECTOR_BYTES 64
#define LKA_F16C
#define LKA_AVX512
#define LKA_TABLE kernels_avx512
#include "kernels_for_isa.h"
#endif
