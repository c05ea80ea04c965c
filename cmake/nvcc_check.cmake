# Target `nvcc-check`: every csrc/**/cuda/*.cu compiles for every architecture, without spills and
# within the registers that its kernels state. No GPU and no torch needed; left out without nvcc.
find_program(LONGROPE_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin PATHS /usr/local/cuda)
if(LONGROPE_NVCC AND cuda_sources)
  file(MAKE_DIRECTORY "${PROJECT_BINARY_DIR}/nvcc")
  set(nvcc_reports)
  foreach(source IN LISTS cuda_sources)
    file(RELATIVE_PATH stem "${PROJECT_SOURCE_DIR}/csrc" "${source}")
    string(REGEX REPLACE "[/.]" "-" stem "${stem}")
    foreach(architecture IN LISTS LONGROPE_CUDA_ARCHITECTURES)
      set(report "${PROJECT_BINARY_DIR}/nvcc/${stem}-sm_${architecture}.txt")
      add_custom_command(
        OUTPUT "${report}"
        COMMAND "${CMAKE_COMMAND}" -DNVCC=${LONGROPE_NVCC} -DSOURCE=${source} -DREPORT=${report}
                -DARCHITECTURE=${architecture} -DINCLUDE=${PROJECT_SOURCE_DIR}/csrc
                -DCOMPILER=${CMAKE_CXX_COMPILER} -P "${PROJECT_SOURCE_DIR}/cmake/ptxas_gate.cmake"
        DEPFILE "${report}.d"
        DEPENDS "${source}" "${PROJECT_SOURCE_DIR}/cmake/ptxas_gate.cmake"
        COMMENT "nvcc sm_${architecture} ${stem}"
        VERBATIM)
      list(APPEND nvcc_reports "${report}")
    endforeach()
  endforeach()
  add_custom_target(nvcc-check DEPENDS ${nvcc_reports})
else()
  message(STATUS "nvcc-check: left out (nvcc: ${LONGROPE_NVCC}; sources: ${cuda_sources})")
endif()
