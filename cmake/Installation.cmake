# SPDX-License-Identifier: Apache-2.0
# Everything lands in the package folder, so that a wheel holds it: library and module side by side (RPATH $ORIGIN),
# the header, a CMake package and a pkg-config file.
include(CMakePackageConfigHelpers)

set(package_dir "${REVK_PACKAGE_DIR}")
install(TARGETS revkernels EXPORT revkernelsTargets
  LIBRARY DESTINATION "${package_dir}" NAMELINK_SKIP RUNTIME DESTINATION "${package_dir}")
install(FILES csrc/include/revkernels/revkernels.h DESTINATION "${package_dir}/include/revkernels")
install(EXPORT revkernelsTargets NAMESPACE revkernels:: DESTINATION "${package_dir}/cmake")
configure_package_config_file(cmake/revkernelsConfig.cmake.in revkernelsConfig.cmake
  INSTALL_DESTINATION "${package_dir}/cmake" NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(revkernelsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/revkernelsConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/revkernelsConfigVersion.cmake" DESTINATION "${package_dir}/cmake")
configure_file(cmake/revkernels.pc.in revkernels.pc.in @ONLY)
file(GENERATE OUTPUT revkernels.pc INPUT "${CMAKE_CURRENT_BINARY_DIR}/revkernels.pc.in")
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/revkernels.pc" DESTINATION "${package_dir}/pkgconfig")
if(REVK_PYTHON)
  install(TARGETS _native LIBRARY DESTINATION "${package_dir}")
endif()
