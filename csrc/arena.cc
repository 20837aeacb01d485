#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "errors.h"

namespace hybridk2 {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

bool kernel_gives_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(file, modes);
  return modes.find("[always]") != std::string::npos ||
         modes.find("[madvise]") != std::string::npos;
}

}  // namespace

// One more huge page than needed, so that the data can begin on a huge page's edge. Memory is
// committed, not merely reserved: a model that can never fit is refused here and not killed later.
Arena::Arena(const char* purpose, size_t bytes, bool huge_pages) : bytes_(bytes) {
  if (bytes > SIZE_MAX / 2) throw OutOfMemoryError(purpose, bytes);
  mapping_bytes_ = std::max<size_t>(bytes, 1) + kHugePageBytes;
  mapping_ =
      mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw OutOfMemoryError(purpose, bytes);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapping_);
  data_ = static_cast<uint8_t*>(mapping_) + (kHugePageBytes - begin % kHugePageBytes);
  huge_pages_ = huge_pages && kernel_gives_huge_pages() &&
                madvise(mapping_, mapping_bytes_, MADV_HUGEPAGE) == 0;
}

Arena::~Arena() { munmap(mapping_, mapping_bytes_); }

uint8_t* GrowingBuffer::reserve(size_t bytes) {
  if (arena_ == nullptr || arena_->bytes() < bytes) {
    arena_.reset();  // first: the old and the new need not fit beside each other
    arena_ = std::make_unique<Arena>(purpose_, bytes, huge_pages_);
  }
  return arena_->data();
}

}  // namespace hybridk2
