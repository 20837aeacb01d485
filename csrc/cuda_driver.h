// The few functions of NVIDIA's driver that the extension calls, found when they are first needed:
// nothing of CUDA is there when it is built, nor has to be where it runs without a card. Knows
// nothing of what is done with them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridk2 {

// The driver's own types, by its binary interface (cuda.h, 12.x): handles are pointers, results are
// ints, device addresses are 64-bit integers.
using CudaResult = int;
using CudaDevice = int;
using CudaContext = void*;
using CudaStreamHandle = void*;
using CudaModule = void*;
using CudaFunction = void*;
using CudaAddress = uint64_t;
using CudaHostFunction = void (*)(void*);

// A table, so that tests can give one of their own.
struct CudaDriver {
  CudaResult (*init)(unsigned flags);
  CudaResult (*get_error_name)(CudaResult, const char** name);
  CudaResult (*device_get)(CudaDevice*, int ordinal);
  CudaResult (*primary_context_retain)(CudaContext*, CudaDevice);
  CudaResult (*primary_context_release)(CudaDevice);
  CudaResult (*context_get_current)(CudaContext*);
  CudaResult (*context_set_current)(CudaContext);
  CudaResult (*context_synchronize)();
  CudaResult (*module_load_data)(CudaModule*, const void* image);
  CudaResult (*module_unload)(CudaModule);
  CudaResult (*module_get_function)(CudaFunction*, CudaModule, const char* name);
  CudaResult (*launch_kernel)(CudaFunction, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                              unsigned block_x, unsigned block_y, unsigned block_z,
                              unsigned shared_bytes, CudaStreamHandle, void** parameters,
                              void** extra);
  CudaResult (*launch_host_function)(CudaStreamHandle, CudaHostFunction, void* data);
  CudaResult (*memory_host_allocate)(void**, size_t bytes, unsigned flags);
  CudaResult (*memory_free_host)(void*);
  CudaResult (*memory_host_register)(void*, size_t bytes, unsigned flags);
  CudaResult (*memory_host_unregister)(void*);
  CudaResult (*memory_allocate)(CudaAddress*, size_t bytes);
  CudaResult (*memory_free)(CudaAddress);
  CudaResult (*memory_set)(CudaAddress, unsigned char value, size_t bytes);
  CudaResult (*memory_copy_async)(CudaAddress to, CudaAddress from, size_t bytes, CudaStreamHandle);
  CudaResult (*stream_is_capturing)(CudaStreamHandle, int* status);

  // Loaded once and kept for the life of the process. Throws ConfigurationError when there is no
  // driver, or one without these functions.
  static const CudaDriver& loaded();

  // Throws StateError with the driver's name for a result other than success, and what was tried.
  void check(CudaResult result, const char* what) const;
};

// Makes pages of the host's memory known to the card, so that copies from them run beside other
// work; they stay in place until unpinned. Registering takes time in proportion to the bytes. The
// calling thread needs a current context, which torch sets where it computes. Throw
// ConfigurationError without a driver, StateError with the driver's reason.
void pin_host_memory(uintptr_t address, size_t bytes);
void unpin_host_memory(uintptr_t address);

}  // namespace hybridk2
