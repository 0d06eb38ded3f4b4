# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels where nvcc works, and a backend that says why it is missing where it does not. No GPU is asked.
set(cuda_compiler "")
if(NOT REVK_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "REVK_CUDA is \"${REVK_CUDA}\"; AUTO, ON or OFF is needed.")
endif()
if(NOT REVK_CUDA STREQUAL "OFF")
  check_language(CUDA)
  set(cuda_compiler "${CMAKE_CUDA_COMPILER}")
  if(NOT cuda_compiler AND REVK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "REVK_CUDA=ON, but no working nvcc was found. Install the CUDA toolkit 12.0 or later "
                        "(https://developer.nvidia.com/cuda-downloads; conda: conda install cuda-nvcc), put nvcc on PATH "
                        "or name it in the environment variable CUDACXX, or build with REVK_CUDA=OFF.")
  endif()
endif()

if(NOT cuda_compiler)
  message(STATUS "revkernels: built without CUDA kernels (REVK_CUDA=${REVK_CUDA})")
  target_sources(revkernels PRIVATE csrc/cuda/unavailable.cpp)
  return()
endif()

# Machine code for A100, H100 and B200, and PTX of the last for what comes later; as far as this nvcc knows them.
set(CMAKE_CUDA_ARCHITECTURES OFF)  # no default: the target names its own
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(archs 80 90 100)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old: CUDA 12.0 or later is needed. Build with "
                      "REVK_CUDA=OFF to do without CUDA kernels.")
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  set(archs 80 90)
endif()
list(GET archs -1 newest)
list(JOIN archs "\\;" arch_text)
string(APPEND arch_text "\\;ptx${newest}")
list(TRANSFORM archs APPEND "-real")
find_package(CUDAToolkit REQUIRED)
message(STATUS "revkernels: CUDA kernels for ${archs} and PTX, nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

target_sources(revkernels PRIVATE
  csrc/cuda/coupling.cu csrc/cuda/coupling_int16.cu csrc/cuda/accumulate.cu csrc/cuda/norm_act.cu
  csrc/cuda/norm_act_backward.cu csrc/cuda/device.cu)
set_target_properties(revkernels PROPERTIES
  CUDA_ARCHITECTURES "${archs};${newest}-virtual" CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(revkernels PRIVATE CUDA::cudart_static)  # loads where there is no driver
target_compile_definitions(revkernels PRIVATE "REVK_CUDA_ARCHS=\"${arch_text}\"")
# Host and device round alike: no contraction, no fast math.
target_compile_options(revkernels PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xcompiler=-ffp-contract=off,-Wall>)
