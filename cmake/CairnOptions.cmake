# Compiler options, and the one way a room is made.

add_library(cairn_options INTERFACE)
target_compile_definitions(cairn_options INTERFACE _GNU_SOURCE)
target_compile_options(cairn_options INTERFACE
  $<$<COMPILE_LANGUAGE:C>:-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wvla>
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  $<$<BOOL:${CAIRN_WERROR}>:-Werror>)
if(CAIRN_SANITIZE STREQUAL "address")
  target_compile_options(cairn_options INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer $<$<NOT:$<CONFIG:Debug>>:-g1>)
  target_link_options(cairn_options INTERFACE -fsanitize=address,undefined)
elseif(CAIRN_SANITIZE STREQUAL "thread")
  target_compile_options(cairn_options INTERFACE -fsanitize=thread $<$<NOT:$<CONFIG:Debug>>:-g1>)
  target_link_options(cairn_options INTERFACE -fsanitize=thread)
elseif(NOT CAIRN_SANITIZE STREQUAL "")
  message(FATAL_ERROR "CAIRN_SANITIZE is '${CAIRN_SANITIZE}': use address or thread")
endif()
if(CAIRN_FUZZ)
  if(NOT CMAKE_C_COMPILER_ID MATCHES "Clang" OR NOT CAIRN_SANITIZE STREQUAL "address")
    message(FATAL_ERROR "CAIRN_FUZZ needs clang (-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++) and CAIRN_SANITIZE=address")
  endif()
  target_compile_options(cairn_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

include(CheckCSourceCompiles)
check_c_source_compiles("#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__\n#error big-endian\n#endif\nint main(void){return 0;}"
                        CAIRN_LITTLE_ENDIAN)
if(NOT CAIRN_LITTLE_ENDIAN)
  message(FATAL_ERROR "tiles are read in place and are little-endian; this machine is not")
endif()

# cairn_room(name SOURCES ... LINK ...): one folder, one target, its own folder the only include path it
# lends to those who link it. LINK names rooms ("cairn_base") and third parties.
set_property(GLOBAL PROPERTY CAIRN_ROOMS "")
set_property(GLOBAL PROPERTY CAIRN_THIRD "")
function(cairn_room name)
  cmake_parse_arguments(ROOM "" "" "SOURCES;LINK" ${ARGN})
  add_library(cairn_${name} OBJECT ${ROOM_SOURCES})
  target_include_directories(cairn_${name} PUBLIC ${CMAKE_CURRENT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include)
  target_link_libraries(cairn_${name} PRIVATE cairn_options)
  foreach(dep ${ROOM_LINK})
    if(dep MATCHES "^cairn_" AND NOT dep STREQUAL "cairn_faiss") # that one is CairnDeps' name for FAISS
      target_link_libraries(cairn_${name} PUBLIC ${dep})
    else()
      target_link_libraries(cairn_${name} PRIVATE ${dep})
      set_property(GLOBAL APPEND PROPERTY CAIRN_THIRD ${dep})
    endif()
  endforeach()
  set_property(GLOBAL APPEND PROPERTY CAIRN_ROOMS cairn_${name})
endfunction()
