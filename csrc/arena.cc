#include "arena.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <vector>

#include "errors.h"

namespace hybridk2 {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr int kOrdinary = MAP_PRIVATE | MAP_ANONYMOUS;
constexpr int kGigabytePage = kOrdinary | MAP_HUGETLB | 30 << MAP_HUGE_SHIFT;
constexpr int kPopulate = 23;  // MADV_POPULATE_WRITE, younger (Linux 5.14) than some headers

bool kernel_gives_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(file, modes);
  return modes.find("[always]") != std::string::npos ||
         modes.find("[madvise]") != std::string::npos;
}

std::string node_folder(int node) { return "/sys/devices/system/node/node" + std::to_string(node); }

// What a node can give: free memory, and that of files, which the kernel drops when asked.
size_t available_bytes(int node) {
  std::ifstream file(node_folder(node) + "/meminfo");
  size_t bytes = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string node_word, number, name;
    size_t kilobytes = 0;
    words >> node_word >> number >> name >> kilobytes;
    const bool counts = name == "MemFree:" || name == "Active(file):" || name == "Inactive(file):";
    if (words && counts) bytes += kilobytes * 1024;
  }
  return bytes;
}

std::string gigabytes(size_t bytes) {
  return std::to_string((bytes + 500'000'000) / 1'000'000'000) + " GB";
}

// Takes pages of the range from this node alone. Returns 0 or an errno.
int bind_to_node(uint8_t* begin, size_t bytes, int node) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(node / kBits + 1, 0);
  mask[node / kBits] = 1ul << node % kBits;
  // The kernel wants one bit more than it reads.
  const long result =
      syscall(SYS_mbind, begin, bytes, MPOL_BIND, mask.data(), mask.size() * kBits + 1, 0);
  return result == 0 ? 0 : errno;
}

}  // namespace

size_t free_gigabyte_pages(int node) {
  const std::string folder = node == kAnyNode ? "/sys/kernel/mm" : node_folder(node);
  std::ifstream file(folder + "/hugepages/hugepages-1048576kB/free_hugepages");
  size_t pages = 0;
  file >> pages;
  return file ? pages : 0;
}

// A mapping that begins and ends on a page's edge is cut out of a larger one. Memory is committed,
// not merely reserved: a model that can never fit is refused here and not killed later.
Arena::Arena(const char* purpose, size_t bytes, bool huge_pages, int node)
    : purpose_(purpose), bytes_(bytes) {
  if (bytes > SIZE_MAX / 2) throw OutOfMemoryError(purpose, bytes);
  if (huge_pages && bytes >= kGigabytePageBytes) {
    gigabytes_to_try_ = std::min(bytes / kGigabytePageBytes, free_gigabyte_pages(node));
  }
  const size_t edge = gigabytes_to_try_ > 0 ? kGigabytePageBytes : kHugePageBytes;
  mapping_bytes_ = (std::max<size_t>(bytes, 1) + kHugePageBytes - 1) / kHugePageBytes;
  mapping_bytes_ *= kHugePageBytes;
  void* mapping = mmap(nullptr, mapping_bytes_ + edge, PROT_READ | PROT_WRITE, kOrdinary, -1, 0);
  if (mapping == MAP_FAILED) throw OutOfMemoryError(purpose, bytes);
  uint8_t* begin = static_cast<uint8_t*>(mapping);
  const size_t before = edge - reinterpret_cast<uintptr_t>(begin) % edge;
  data_ = begin + before;
  munmap(begin, before);
  if (before < edge) munmap(data_ + mapping_bytes_, edge - before);
  huge_pages_ =
      huge_pages && kernel_gives_huge_pages() && madvise(data_, mapping_bytes_, MADV_HUGEPAGE) == 0;
  if (node != kAnyNode) bind(node);
}

Arena::~Arena() { munmap(data_, mapping_bytes_); }

// Binding is refused where it would end in the kernel killing the process for want of memory on
// this node: then first touch decides, and what does not fit lies on other nodes.
void Arena::bind(int node) {
  const std::string where = std::string(purpose_) + " on NUMA node " + std::to_string(node) + ": ";
  const size_t available = available_bytes(node);
  const size_t in_ordinary_pages = bytes_ - gigabytes_to_try_ * kGigabytePageBytes;
  if (in_ordinary_pages > available) {
    trouble_ = where + gigabytes(in_ordinary_pages) + " are needed and " + gigabytes(available) +
               " available there; the rest will lie on other nodes, which is slower";
    return;
  }
  if (const int error = bind_to_node(data_, mapping_bytes_, node)) {
    trouble_ = where + "the system refused to bind memory to it (" + std::strerror(error) +
               "); memory lies where its threads touch it first";
    return;
  }
  bound_node_ = node;
}

// The page is taken here: where none is left, this is an error code, and touching it a signal.
void Arena::try_gigabyte_page(size_t index) {
  uint8_t* begin = data_ + index * kGigabytePageBytes;
  const auto map = [&](int kind) {
    void* address =
        mmap(begin, kGigabytePageBytes, PROT_READ | PROT_WRITE, kind | MAP_FIXED, -1, 0);
    if (address == MAP_FAILED) return false;
    if (bound_node_ != kAnyNode) bind_to_node(begin, kGigabytePageBytes, bound_node_);
    return true;
  };
  if (map(kGigabytePage) && madvise(begin, kGigabytePageBytes, kPopulate) == 0) {
    gigabyte_pages_.fetch_add(1);
    return;
  }
  if (!map(kOrdinary)) throw OutOfMemoryError(purpose_, kGigabytePageBytes);
  if (huge_pages_) madvise(begin, kGigabytePageBytes, MADV_HUGEPAGE);
}

uint8_t* GrowingBuffer::reserve(size_t bytes) {
  if (arena_ == nullptr || arena_->bytes() < bytes) {
    arena_.reset();  // first: the old and the new need not fit beside each other
    arena_ = std::make_unique<Arena>(purpose_, bytes, huge_pages_);
  }
  return arena_->data();
}

}  // namespace hybridk2
