# LONGROPE_BINDINGS: an object library, so that editors and clang-tidy find csrc/bindings in
# compile_commands.json. The extension itself is linked by setup.py.
if(LONGROPE_BINDINGS)
  find_package(Python3 REQUIRED COMPONENTS Interpreter Development.Module)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
            "import torch.utils.cpp_extension as c; print(';'.join(c.include_paths()), end='')"
    OUTPUT_VARIABLE torch_includes
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "LONGROPE_BINDINGS: ${Python3_EXECUTABLE} has no torch; "
                        "name another with -DPython3_EXECUTABLE=...")
  endif()
  add_library(longrope_bindings OBJECT ${bindings_sources})
  target_link_libraries(longrope_bindings PRIVATE longrope_cpu Python3::Module)
  target_include_directories(longrope_bindings SYSTEM PRIVATE ${torch_includes})
  target_compile_features(longrope_bindings PRIVATE cxx_std_20)
  target_compile_definitions(longrope_bindings PRIVATE
    TORCH_API_INCLUDE_EXTENSION_H TORCH_EXTENSION_NAME=_C LONGROPE_VERSION="development")
endif()
