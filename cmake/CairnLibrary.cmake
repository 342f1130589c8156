# libcairn.a and libcairn.so out of the rooms, and what `cmake --install` puts where.
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
target_link_options(cairn_shared PRIVATE -Wl,--exclude-libs,ALL) # FAISS is linked in and stays inside
foreach(lib cairn_static cairn_shared)
  target_include_directories(${lib} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_link_libraries(${lib} PRIVATE cairn_options ${third})
endforeach()

install(TARGETS cairn_shared EXPORT cairnTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/cairn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
