# Finds a CUDA compiler for CMake: on PATH, in CUDA_HOME, or in the nvidia-cuda-nvcc wheel of the Python environment.
# Sets JAX_NATTEN_NVCC, empty where there is none, and JAX_NATTEN_CUDA_LIBRARY_DIR where nvcc does not find it itself.
if(CMAKE_CUDA_COMPILER)
  set(JAX_NATTEN_NVCC "${CMAKE_CUDA_COMPILER}")
  return()
endif()
execute_process( # the wheels of one major version share a directory, nvidia/cu13
  COMMAND
    "${Python_EXECUTABLE}" -c
    "import importlib.util as u, pathlib as p; s = u.find_spec('nvidia'); print(';'.join(str(d) for r in (s.submodule_search_locations if s else []) for d in sorted(p.Path(r).glob('cu[0-9]*/bin'))))"
  OUTPUT_VARIABLE wheel_directories OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_program(JAX_NATTEN_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
find_program(JAX_NATTEN_NVCC nvcc PATHS ${wheel_directories} /usr/local/cuda/bin NO_DEFAULT_PATH)

# The wheels have lib where nvcc.profile says lib64. The compiler's own tests in CMake take it from the environment.
get_filename_component(toolkit "${JAX_NATTEN_NVCC}" DIRECTORY)
get_filename_component(toolkit "${toolkit}" DIRECTORY)
if(EXISTS "${toolkit}/lib/libcudart_static.a")
  set(JAX_NATTEN_CUDA_LIBRARY_DIR "${toolkit}/lib")
  set(ENV{LIBRARY_PATH} "${JAX_NATTEN_CUDA_LIBRARY_DIR}:$ENV{LIBRARY_PATH}")
endif()
