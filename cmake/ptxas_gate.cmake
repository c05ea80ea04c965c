# Script of nvcc_check.cmake: compiles SOURCE for ARCHITECTURE and reads what ptxas says of every
# kernel. A spill to local memory fails, and so does a kernel over the ceiling that its file states
# in a comment `// registers <= N`. What ptxas said is kept in REPORT.
execute_process(
  COMMAND "${NVCC}" -arch=sm_${ARCHITECTURE} -std=c++17 -O3 -I "${INCLUDE}" -ccbin "${COMPILER}"
          -Xptxas -v -MD -MF "${REPORT}.d" -MT "${REPORT}" -c "${SOURCE}" -o "${REPORT}.o"
  OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${said}")
endif()
string(REGEX MATCH "[1-9][0-9]* bytes spill (stores|loads)" spill "${said}")
if(spill)
  message(FATAL_ERROR "${SOURCE}: sm_${ARCHITECTURE}: a kernel spills (${spill})\n${said}")
endif()
file(STRINGS "${SOURCE}" stated REGEX "// registers <= [0-9]+")
if(stated)
  string(REGEX MATCH "registers <= ([0-9]+)" stated "${stated}")
  set(ceiling ${CMAKE_MATCH_1})
  string(REGEX MATCHALL "Used [0-9]+ registers" used "${said}")
  foreach(use IN LISTS used)
    string(REGEX MATCH "[0-9]+" registers "${use}")
    if(registers GREATER ceiling)
      message(FATAL_ERROR "${SOURCE}: sm_${ARCHITECTURE}: a kernel uses ${registers} registers, "
                          "stated are at most ${ceiling}\n${said}")
    endif()
  endforeach()
endif()
file(WRITE "${REPORT}" "${said}")
