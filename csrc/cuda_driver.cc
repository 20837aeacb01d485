#include "cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "errors.h"

namespace hybridk2 {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

constexpr unsigned kRegisterPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE: in every context

template <typename Function>
void find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function != nullptr) return;
  throw ConfigurationError(std::string("the NVIDIA driver's ") + kLibrary + " has no " + name +
                           "; install a driver for CUDA 12 or newer");
}

// Names end in _v2 where the plain one is an interface of CUDA 3, kept for old programs.
CudaDriver load() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw ConfigurationError(std::string("no NVIDIA driver: ") + dlerror() +
                             "; install it, or compute on the CPU");
  }
  CudaDriver driver;
  find(library, "cuInit", &driver.init);
  find(library, "cuGetErrorName", &driver.get_error_name);
  find(library, "cuDeviceGet", &driver.device_get);
  find(library, "cuDevicePrimaryCtxRetain", &driver.primary_context_retain);
  find(library, "cuDevicePrimaryCtxRelease_v2", &driver.primary_context_release);
  find(library, "cuCtxGetCurrent", &driver.context_get_current);
  find(library, "cuCtxSetCurrent", &driver.context_set_current);
  find(library, "cuCtxSynchronize", &driver.context_synchronize);
  find(library, "cuModuleLoadData", &driver.module_load_data);
  find(library, "cuModuleUnload", &driver.module_unload);
  find(library, "cuModuleGetFunction", &driver.module_get_function);
  find(library, "cuLaunchKernel", &driver.launch_kernel);
  find(library, "cuLaunchHostFunc", &driver.launch_host_function);
  find(library, "cuMemHostAlloc", &driver.memory_host_allocate);
  find(library, "cuMemFreeHost", &driver.memory_free_host);
  find(library, "cuMemHostRegister_v2", &driver.memory_host_register);
  find(library, "cuMemHostUnregister", &driver.memory_host_unregister);
  find(library, "cuMemAlloc_v2", &driver.memory_allocate);
  find(library, "cuMemFree_v2", &driver.memory_free);
  find(library, "cuMemsetD8_v2", &driver.memory_set);
  find(library, "cuMemcpyAsync", &driver.memory_copy_async);
  find(library, "cuStreamIsCapturing", &driver.stream_is_capturing);
  driver.check(driver.init(0), "starting the NVIDIA driver");
  return driver;
}

}  // namespace

const CudaDriver& CudaDriver::loaded() {
  static const CudaDriver driver = load();  // tried again after an exception
  return driver;
}

void CudaDriver::check(CudaResult result, const char* what) const {
  if (result == 0) return;
  const char* name = nullptr;
  if (get_error_name(result, &name) != 0 || name == nullptr) name = "an unknown error";
  throw StateError(std::string(what) + ": the NVIDIA driver said " + name + " (" +
                   std::to_string(result) + ")");
}

namespace {

// The driver pins in a context, for all of them, and any will do: the thread's own or the first
// card's, which is kept for good then. Were it given back, the pinning might end with it.
const CudaDriver& driver_in_context() {
  const CudaDriver& driver = CudaDriver::loaded();
  CudaContext current = nullptr;
  driver.check(driver.context_get_current(&current), "asking for the thread's context");
  if (current != nullptr) return driver;
  static const CudaContext first = [&driver] {
    CudaDevice device{};
    CudaContext context = nullptr;
    driver.check(driver.device_get(&device, 0), "looking for the first card");
    driver.check(driver.primary_context_retain(&context, device), "using the first card's context");
    return context;
  }();
  driver.check(driver.context_set_current(first), "entering the first card's context");
  return driver;
}

}  // namespace

void pin_host_memory(uintptr_t address, size_t bytes) {
  const CudaDriver& driver = driver_in_context();
  driver.check(
      driver.memory_host_register(reinterpret_cast<void*>(address), bytes, kRegisterPortable),
      ("pinning " + std::to_string(bytes) + " bytes of host memory").c_str());
}

void unpin_host_memory(uintptr_t address) {
  const CudaDriver& driver = driver_in_context();
  driver.check(driver.memory_host_unregister(reinterpret_cast<void*>(address)),
               "unpinning host memory");
}

}  // namespace hybridk2
