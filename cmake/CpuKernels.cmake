# SPDX-License-Identifier: Apache-2.0
# The host kernels. The tile loops are compiled once per instruction set and chosen at run time, never by -march=native.
target_sources(revkernels PRIVATE
  csrc/cpu/loops.cpp csrc/cpu/coupling.cpp csrc/cpu/accumulate.cpp csrc/cpu/norm_plan.cpp csrc/cpu/norm_act.cpp
  csrc/cpu/isa_baseline.cpp)
target_link_libraries(revkernels PRIVATE OpenMP::OpenMP_CXX)
include(CheckCXXCompilerFlag)

# -O3 vectorises; no traps and no errno let it vectorise comparisons and rint, and change no result. Stored floats are
# read back as bits, hence no strict aliasing.
set(loop_flags -O3 -fno-trapping-math -fno-math-errno -fno-strict-aliasing)
# Short loops that straddle two lines of 64 bytes run up to a third slower on some processors (measured on Zen 3).
check_cxx_compiler_flag(-falign-loops=64 REVK_ALIGNS_LOOPS)
if(REVK_ALIGNS_LOOPS)
  list(APPEND loop_flags -falign-loops=64)
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  list(APPEND loop_flags -Wno-pass-failed)  # REVK_INDEPENDENT permits; clang takes it for a demand, and warns
endif()
set_source_files_properties(csrc/cpu/isa_baseline.cpp PROPERTIES COMPILE_OPTIONS "${loop_flags}")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  target_sources(revkernels PRIVATE csrc/cpu/isa_avx2.cpp csrc/cpu/isa_avx512.cpp)
  target_compile_definitions(revkernels PRIVATE REVK_X86_ISAS)
  set(avx2_flags ${loop_flags} -mavx2 -mf16c -mfma)
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND avx512_flags -Wno-maybe-uninitialized -Wno-uninitialized)  # GCC 12 warns of its own intrinsics
  endif()
  set_source_files_properties(csrc/cpu/isa_avx2.cpp PROPERTIES COMPILE_OPTIONS "${avx2_flags}")
  set_source_files_properties(csrc/cpu/isa_avx512.cpp PROPERTIES COMPILE_OPTIONS "${avx512_flags}")
endif()
