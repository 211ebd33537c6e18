// x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#define LKA_VECTOR_BYTES 32
#define LKA_F16C
#define LKA_TABLE kernels_avx2
#include "kernels_for_isa.h"
#endif
