# Whether the CUDA halves can be built, and for which architectures. Sets
#
#   why_without_cuda           empty where they can; else the reason, without a full stop
#   CMAKE_CUDA_ARCHITECTURES   unless it is given: all that the toolkit knows of those named below
#
# A toolkit that is too old or does not fit the C++ compiler costs the CUDA halves alone.
include(CheckLanguage)

function(find_why_without_cuda result)
  if("$ENV{TOKENCACHE_SKIP_CUDA}" STREQUAL "1")
    set(${result} "TOKENCACHE_SKIP_CUDA=1" PARENT_SCOPE)
    return()
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(${result} "there is no CUDA toolkit, or its nvcc does not run" PARENT_SCOPE)
    return()
  endif()

  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE printed ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" found "${printed}")
  set(cuda_version ${CMAKE_MATCH_1})
  if(NOT cuda_version OR cuda_version VERSION_LESS 12.4)
    set(${result} "CUDA 12.4 or newer is needed, got \"${cuda_version}\"" PARENT_SCOPE)
    return()
  endif()
  set(cuda_version ${cuda_version} PARENT_SCOPE)

  # the kernels' C++ in few lines: whether nvcc takes the host's compiler shows here
  if(CMAKE_CUDA_HOST_COMPILER)
    set(host -ccbin ${CMAKE_CUDA_HOST_COMPILER})
  endif()
  execute_process(
    COMMAND ${CMAKE_CUDA_COMPILER} -std=c++20 ${host} -arch=sm_80 -c
            ${PROJECT_SOURCE_DIR}/cmake/probe.cu -o ${PROJECT_BINARY_DIR}/probe.o
    RESULT_VARIABLE status
    OUTPUT_VARIABLE printed
    ERROR_VARIABLE printed)
  if(NOT status EQUAL 0)
    string(REGEX MATCH "[^\n]*(error|fatal|cannot|unsupported)[^\n]*" line "${printed}")
    string(STRIP "${line}" line)
    set(${result} "CUDA ${cuda_version} does not compile with ${CMAKE_CUDA_HOST_COMPILER}: ${line}"
        PARENT_SCOPE)
    return()
  endif()
  find_package(CUDAToolkit QUIET)
  if(NOT TARGET CUDA::cudart_static)
    set(${result} "the CUDA toolkit has no static runtime (libcudart_static)" PARENT_SCOPE)
    return()
  endif()
  set(${result} "" PARENT_SCOPE)
endfunction()

# one C++ compiler for both halves
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX} AND NOT DEFINED ENV{NVCC_CCBIN})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
find_why_without_cuda(why_without_cuda)
if(why_without_cuda)
  return()
endif()

if(DEFINED ENV{TOKENCACHE_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_ARCHITECTURES $ENV{TOKENCACHE_CUDA_ARCHITECTURES})
elseif(NOT CMAKE_CUDA_ARCHITECTURES)
  # machine code for each, and intermediate code for every other from the oldest on
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real)
  if(cuda_version VERSION_GREATER_EQUAL 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real 120-real)
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES 80-virtual)
endif()
