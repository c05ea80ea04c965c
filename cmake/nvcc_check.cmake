# Target `nvcc-check`: every csrc/*/cuda/*.cu compiles for every architecture, and csrc/*/cuda/sm90/*.cu
# for sm_90a, without spills and within the registers that its kernels state. No GPU and no torch needed; left out without nvcc.
find_program(LONGROPE_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin PATHS /usr/local/cuda)
find_package(Python3 COMPONENTS Interpreter)
if(LONGROPE_NVCC AND Python3_FOUND)
  add_custom_target(nvcc-check
    COMMAND "${Python3_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/.ci/nvcc_check.py"
    USES_TERMINAL VERBATIM)
else()
  message(STATUS "nvcc-check: left out (nvcc: ${LONGROPE_NVCC}; Python: ${Python3_EXECUTABLE})")
endif()
