// Memory in 2 MB pages where the kernel gives them: the weights of all experts, and the buffers
// that grow with a call. Knows nothing of what lies in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace hybridk2 {

// Zeroed, page-aligned memory for the life of the object. Pages are taken at first touch, so that
// the thread that fills a page decides where it lies.
class Arena {
 public:
  // Throws OutOfMemoryError, naming `purpose` and the bytes. huge_pages: ask for 2 MB pages.
  Arena(const char* purpose, size_t bytes, bool huge_pages);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Whether the kernel accepted the wish for 2 MB pages; it may still run out of them.
  bool huge_pages() const { return huge_pages_; }

 private:
  void* mapping_;
  size_t mapping_bytes_;
  uint8_t* data_;
  size_t bytes_;
  bool huge_pages_;
};

// An arena that is replaced when more is asked of it; contents are lost then.
class GrowingBuffer {
 public:
  GrowingBuffer(const char* purpose, bool huge_pages)
      : purpose_(purpose), huge_pages_(huge_pages) {}

  // At least `bytes` bytes. Throws OutOfMemoryError; the buffer is empty then.
  uint8_t* reserve(size_t bytes);

 private:
  const char* purpose_;
  bool huge_pages_;
  std::unique_ptr<Arena> arena_;
};

}  // namespace hybridk2
