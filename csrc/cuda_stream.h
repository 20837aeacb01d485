// The streams of one NVIDIA card, through its driver.
#pragma once

#include "cuda_driver.h"
#include "device_stream.h"

namespace hybridk2 {

class CudaStream : public DeviceStream {
 public:
  // ordinal: the card's number, as CUDA counts. Uses the context that torch uses, the primary one.
  // Throws ConfigurationError without a driver, StateError with what the driver says.
  explicit CudaStream(int ordinal, const CudaDriver& driver = CudaDriver::loaded());
  ~CudaStream() override;
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void* allocate_host(size_t bytes) override;
  void* allocate_device(size_t bytes) override;
  void free_host(void* memory) noexcept override;
  void free_device(void* memory) noexcept override;
  void begin(StreamHandle stream, const BeginArguments& arguments) override;
  void publish(StreamHandle stream, const PublishArguments& arguments) override;
  void await(StreamHandle stream, const AwaitArguments& arguments) override;
  void call_host(StreamHandle stream, void (*function)(void*), void* data) override;
  void copy(StreamHandle stream, void* to, const void* from, size_t bytes) override;
  bool recording(StreamHandle stream) const override;
  void synchronize() override;

 private:
  // The driver takes the calling thread's context, and a thread may have none yet.
  void enter() const;
  void release() noexcept;
  void launch(CudaFunction kernel, unsigned threads, StreamHandle stream, const void* arguments,
              const char* what) const;

  const CudaDriver& driver_;
  CudaDevice device_ = 0;
  CudaContext context_ = nullptr;
  CudaModule module_ = nullptr;
  CudaFunction begin_ = nullptr;
  CudaFunction publish_ = nullptr;
  CudaFunction await_ = nullptr;
};

}  // namespace hybridk2
