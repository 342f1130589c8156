# libcairn.a and libcairn.so out of the rooms, and what `cmake --install` puts where.
include(CMakePackageConfigHelpers)

get_property(rooms GLOBAL PROPERTY CAIRN_ROOMS)
get_property(third GLOBAL PROPERTY CAIRN_THIRD)
list(REMOVE_DUPLICATES third)
set(objects)
foreach(room ${rooms})
  list(APPEND objects $<TARGET_OBJECTS:${room}>)
endforeach()

add_library(cairn_static STATIC ${objects})
add_library(cairn_shared SHARED ${objects})
set_target_properties(cairn_static cairn_shared PROPERTIES OUTPUT_NAME cairn LINKER_LANGUAGE C)
set_target_properties(cairn_shared PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION 0 EXPORT_NAME cairn)
add_library(cairn::cairn ALIAS cairn_shared) # the names find_package gives, so that a subproject reads the same
add_library(cairn::cairn_static ALIAS cairn_static)

# FAISS is an archive: it is linked in and stays inside, as every symbol that is not cairn_*.
target_link_options(cairn_shared PRIVATE -Wl,--exclude-libs,ALL -Wl,--version-script,${PROJECT_SOURCE_DIR}/cmake/cairn.map
                                         -Wl,--as-needed)
if(NOT CAIRN_SANITIZE) # a sanitizer's calls are resolved in the program
  target_link_options(cairn_shared PRIVATE -Wl,--no-undefined)
endif()
set_target_properties(cairn_shared PROPERTIES LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/cairn.map)

# Third parties are an affair of the build: the exported targets do not name them. Users of the shared library need
# none; for the static one cairn.pc and cairnConfig.cmake find them on the user's machine.
foreach(lib cairn_static cairn_shared)
  target_include_directories(${lib} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  foreach(dep cairn_options ${third} m)
    target_link_libraries(${lib} PRIVATE $<BUILD_INTERFACE:${dep}>)
  endforeach()
endforeach()

# The same libraries by their plain names, dependents first, for whoever links the static one.
set(CAIRN_STATIC_NAMES)
foreach(dep ${third})
  if(dep STREQUAL "cairn_faiss")
    list(PREPEND CAIRN_STATIC_NAMES faiss)
    if(FAISS_C_LIBRARY)
      list(PREPEND CAIRN_STATIC_NAMES faiss_c)
    endif()
  elseif(dep MATCHES "^PkgConfig::(.*)")
    list(APPEND CAIRN_STATIC_NAMES ${${CMAKE_MATCH_1}_LIBRARIES})
  endif()
endforeach()
list(REMOVE_DUPLICATES CAIRN_STATIC_NAMES)
list(TRANSFORM CAIRN_STATIC_NAMES PREPEND "-l" OUTPUT_VARIABLE flags)
string(JOIN " " CAIRN_STATIC_FLAGS ${flags} -lgomp -lstdc++ -lm -pthread)
string(JOIN " " CAIRN_STATIC_NAMES ${CAIRN_STATIC_NAMES})

# ---- install: library, headers, cairn.pc, find_package(cairn) ----

set(CAIRN_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/cairn)
install(TARGETS cairn_shared cairn_static EXPORT cairnTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/cairn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN *.h)
install(EXPORT cairnTargets NAMESPACE cairn:: DESTINATION ${CAIRN_PACKAGE_DIR})

configure_package_config_file(cmake/cairnConfig.cmake.in ${PROJECT_BINARY_DIR}/cairnConfig.cmake
                              INSTALL_DESTINATION ${CAIRN_PACKAGE_DIR} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cairnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/cairnConfig.cmake ${PROJECT_BINARY_DIR}/cairnConfigVersion.cmake DESTINATION ${CAIRN_PACKAGE_DIR})

# cairn.pc finds its prefix from where it lies, so an installed tree may be moved.
file(RELATIVE_PATH CAIRN_PC_TO_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" CAIRN_PC_TO_PREFIX "${CAIRN_PC_TO_PREFIX}")
configure_file(cmake/cairn.pc.in ${PROJECT_BINARY_DIR}/cairn.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/cairn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
