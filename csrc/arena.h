// Memory in the largest pages that the kernel gives, on one NUMA node if asked: the weights of all
// experts, and the buffers that grow with a call. Knows nothing of what lies in it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "topology.h"

namespace hybridk2 {

constexpr size_t kGigabytePageBytes = size_t{1} << 30;

// 1 GB pages exist only where somebody reserved them: those on a node, or anywhere, that nobody has
// taken; 0 when the kernel says nothing of them.
size_t free_gigabyte_pages(int node);

// Zeroed, page-aligned memory for the life of the object. Pages are taken at first touch, so that
// the thread that fills a page decides where it lies; on a node that was asked for, the kernel
// takes them from nowhere else.
class Arena {
 public:
  // Throws OutOfMemoryError, naming `purpose` and the bytes. huge_pages: ask for 2 MB pages. node:
  // the kernel's number of the node.
  Arena(const char* purpose, size_t bytes, bool huge_pages, int node = kAnyNode);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Whether the kernel accepted the wish for 2 MB pages; it may still run out of them.
  bool huge_pages() const { return huge_pages_; }

  // The gigabytes [0, this) of an arena of huge pages may lie in 1 GB pages. Each is to be tried
  // once, before it is used, by a thread on the arena's node; different ones at the same time.
  size_t gigabytes_to_try() const { return gigabytes_to_try_; }
  void try_gigabyte_page(size_t index);
  // How many were had.
  int gigabyte_pages() const { return gigabyte_pages_.load(); }

  // What was asked for and not had, in words; empty: nothing.
  const std::string& trouble() const { return trouble_; }

 private:
  void bind(int node);

  const char* purpose_;
  uint8_t* data_ = nullptr;
  size_t bytes_;
  size_t mapping_bytes_;
  bool huge_pages_;
  int bound_node_ = kAnyNode;
  size_t gigabytes_to_try_ = 0;
  std::atomic<int> gigabyte_pages_{0};
  std::string trouble_;
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
