# Third parties, one target each. tools/deps.sh installs them from Debian.
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(LMDB REQUIRED IMPORTED_TARGET lmdb)
pkg_check_modules(OPENBLAS REQUIRED IMPORTED_TARGET openblas)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8) # words of byte-pair vocabularies
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(URING IMPORTED_TARGET liburing) # optional: without it batches are read by a thread pool
if(CAIRN_TESTS)
  pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)
endif()

# FAISS through its C API: a real libfaiss_c where there is one, else index/faiss_c_shim.cpp over the C++ library.
find_path(FAISS_INCLUDE faiss/c_api/Index_c.h REQUIRED)
find_library(FAISS_C_LIBRARY faiss_c)
find_library(FAISS_LIBRARY faiss REQUIRED)
add_library(cairn_faiss INTERFACE)
target_include_directories(cairn_faiss SYSTEM INTERFACE ${FAISS_INCLUDE})
if(FAISS_C_LIBRARY)
  set(CAIRN_FAISS_SHIM OFF)
  target_link_libraries(cairn_faiss INTERFACE ${FAISS_C_LIBRARY})
else()
  set(CAIRN_FAISS_SHIM ON)
endif()
add_library(cairn_faiss_library UNKNOWN IMPORTED) # an archive: what it needs must follow it on the link line
set_target_properties(cairn_faiss_library PROPERTIES IMPORTED_LOCATION ${FAISS_LIBRARY})
target_link_libraries(cairn_faiss_library INTERFACE PkgConfig::OPENBLAS -lgomp -lstdc++ -lm)
target_link_libraries(cairn_faiss INTERFACE cairn_faiss_library)
message(STATUS "FAISS C API: ${FAISS_LIBRARY}, shim ${CAIRN_FAISS_SHIM}")
