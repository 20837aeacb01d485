#include "cuda_stream.h"

#include <cstring>
#include <string>

#include "errors.h"

namespace hybridk2 {
namespace {

// CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP: pinned for every context, and the card
// reaches it at the host's own address, as all 64-bit systems have one address space.
constexpr unsigned kSharedMemory = 1 | 2;
constexpr CudaResult kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY

CudaStreamHandle handle(StreamHandle stream) { return reinterpret_cast<CudaStreamHandle>(stream); }

}  // namespace

CudaStream::CudaStream(int ordinal, const CudaDriver& driver) : driver_(driver) {
  driver_.check(driver_.device_get(&device_, ordinal),
                ("looking for card " + std::to_string(ordinal)).c_str());
  driver_.check(driver_.primary_context_retain(&context_, device_), "using the card's context");
  try {
    enter();
    driver_.check(driver_.module_load_data(&module_, kMailboxPtx), "loading the mailbox's kernels");
    for (const auto& [kernel, name] :
         {std::pair{&begin_, "hybridk2_begin"}, std::pair{&publish_, "hybridk2_publish"},
          std::pair{&await_, "hybridk2_await"}}) {
      driver_.check(driver_.module_get_function(kernel, module_, name), name);
    }
  } catch (...) {
    release();
    throw;
  }
}

CudaStream::~CudaStream() { release(); }

// Results are not looked at: at the end of a process the driver may have gone before us.
void CudaStream::release() noexcept {
  if (module_ != nullptr && driver_.context_set_current(context_) == 0) {
    driver_.module_unload(module_);
  }
  driver_.primary_context_release(device_);
}

void CudaStream::enter() const {
  CudaContext current = nullptr;
  driver_.check(driver_.context_get_current(&current), "asking for the thread's context");
  if (current != context_) {
    driver_.check(driver_.context_set_current(context_), "entering the card's context");
  }
}

void* CudaStream::allocate_host(size_t bytes) {
  enter();
  void* memory = nullptr;
  const CudaResult result = driver_.memory_host_allocate(&memory, bytes, kSharedMemory);
  if (result == kOutOfMemory) throw OutOfMemoryError("pinned buffers of the host", bytes);
  driver_.check(result, "allocating pinned memory");
  std::memset(memory, 0, bytes);
  return memory;
}

void* CudaStream::allocate_device(size_t bytes) {
  enter();
  CudaAddress memory = 0;
  const CudaResult result = driver_.memory_allocate(&memory, bytes);
  if (result == kOutOfMemory) throw OutOfMemoryError("the mailbox's state on the card", bytes);
  driver_.check(result, "allocating the mailbox's state");
  driver_.check(driver_.memory_set(memory, 0, bytes), "clearing the mailbox's state");
  return reinterpret_cast<void*>(memory);
}

void CudaStream::free_host(void* memory) noexcept {
  if (driver_.context_set_current(context_) == 0) driver_.memory_free_host(memory);
}

void CudaStream::free_device(void* memory) noexcept {
  if (driver_.context_set_current(context_) == 0) {
    driver_.memory_free(reinterpret_cast<CudaAddress>(memory));
  }
}

// The driver copies the arguments before it returns.
void CudaStream::launch(CudaFunction kernel, unsigned threads, StreamHandle stream,
                        const void* arguments, const char* what) const {
  enter();
  void* parameters[] = {const_cast<void*>(arguments)};
  driver_.check(
      driver_.launch_kernel(kernel, 1, 1, 1, threads, 1, 1, 0, handle(stream), parameters, nullptr),
      what);
}

void CudaStream::begin(StreamHandle stream, const BeginArguments& arguments) {
  launch(begin_, 1, stream, &arguments, "beginning a step on the card");
}

void CudaStream::publish(StreamHandle stream, const PublishArguments& arguments) {
  launch(publish_, kMailboxThreads, stream, &arguments, "launching the publish kernel");
}

void CudaStream::await(StreamHandle stream, const AwaitArguments& arguments) {
  launch(await_, kMailboxThreads, stream, &arguments, "launching the await kernel");
}

void CudaStream::call_host(StreamHandle stream, void (*function)(void*), void* data) {
  enter();
  driver_.check(driver_.launch_host_function(handle(stream), function, data),
                "enqueuing a function of the host");
}

void CudaStream::copy(StreamHandle stream, void* to, const void* from, size_t bytes) {
  enter();
  driver_.check(
      driver_.memory_copy_async(reinterpret_cast<CudaAddress>(to),
                                reinterpret_cast<CudaAddress>(from), bytes, handle(stream)),
      "enqueuing a copy");
}

bool CudaStream::recording(StreamHandle stream) const {
  enter();
  int status = 0;  // CU_STREAM_CAPTURE_STATUS_NONE
  driver_.check(driver_.stream_is_capturing(handle(stream), &status), "asking for a recording");
  return status != 0;
}

void CudaStream::synchronize() {
  enter();
  driver_.check(driver_.context_synchronize(), "waiting for the card");
}

}  // namespace hybridk2
