# SPDX-License-Identifier: Apache-2.0
# What the build needs from the machine. A missing piece ends the configure step with its name and how to get it.
include(CheckLanguage)

check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "No C++ compiler found. Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
                      "conda: conda install cxx-compiler) or name one in the environment variable CXX.")
endif()
enable_language(CXX)

find_package(OpenMP QUIET COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  message(FATAL_ERROR "${CMAKE_CXX_COMPILER} does not compile OpenMP (-fopenmp). Install g++, or libomp-dev for clang.")
endif()

if(REVK_PYTHON)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(NOT Python_Interpreter_FOUND)
    message(FATAL_ERROR "No Python interpreter found. Name one with -DPython_EXECUTABLE=..., or build the C library "
                        "alone with -DREVK_PYTHON=OFF.")
  endif()
  set(interpreter "${Python_EXECUTABLE} (Python ${Python_VERSION})")
  set(versioned_package "python${Python_VERSION_MAJOR}.${Python_VERSION_MINOR}-dev")
  find_package(Python QUIET COMPONENTS Interpreter Development.Module)
  if(NOT Python_Development.Module_FOUND)
    message(FATAL_ERROR "Python.h of ${interpreter} not found. Install the headers: Debian, Ubuntu: apt install "
                        "python3-dev (or ${versioned_package}); Fedora: dnf install python3-devel.")
  endif()
endif()
