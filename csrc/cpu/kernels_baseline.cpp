// Any processor: four float lanes, which every x86-64 and AArch64 has.
#define LKA_VECTOR_BYTES 16
#define LKA_TABLE kernels_baseline
#include "kernels_for_isa.h"
