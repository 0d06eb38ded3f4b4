// SPDX-License-Identifier: Apache-2.0
// Checks of a call's arrays, its device and stream, and statuses as exceptions.
#include "bindings/checks.h"

#include <atomic>

#include "bindings/torch_tensors.h"

namespace revk::python {
namespace {

std::atomic<int32_t> host_threads{0};

const char* library_words(Library library) {
  static const char* const words[] = {"numpy", "torch", "cupy", "an exporter of DLPack",
                                      "an exporter of a buffer"};
  return words[int(library)];
}

bool is_alone(Library library) { return library == Library::kTorch || library == Library::kCupy; }

}  // namespace

void raise_on_error(revk_status status) {
  if (status == REVK_OK) return;
  if (status == REVK_INVALID_ARGUMENT) value_error(revk_last_error());
  throw std::runtime_error(revk_last_error());
}

void check_together(const Array& leader, const Array& other) {
  if (other.library != leader.library && (is_alone(other.library) || is_alone(leader.library)))
    type_error(std::string(other.name) + " is from " + library_words(other.library) + ", " +
               leader.name + " is from " + library_words(leader.library) +
               ": all arrays of a call must come from one library (its from_dlpack takes another's "
               "array over, without a copy)");
  if (other.device != leader.device)
    value_error(std::string(other.name) + " is on " + device_text(other.device) + ", " +
                leader.name + " is on " + device_text(leader.device) +
                ": they must share a device");
}

void check_alike(const Array& leader, const Array& other) {
  check_together(leader, other);
  bool same = other.rank == leader.rank;
  for (int k = 0; same && k < leader.rank; ++k) same = other.sizes[k] == leader.sizes[k];
  if (!same)
    value_error(std::string(other.name) + " has shape " + other.shape() + ", " + leader.name +
                " has " + leader.shape() + ": they must be equal");
}

void check_writable(const Array& written) {
  if (written.frozen != nullptr)
    value_error(std::string(written.name) + written.frozen +
                "; it must be writable, for the result is written there");
}

void check_written(const Array& written) {
  check_writable(written);
  if (overlaps_itself(written.layout()))
    value_error(
        std::string(written.name) +
        " has several elements in one place (an expanded view); it must have its own memory");
}

void check_apart(const Array& written, const Array& other) {
  if (overlaps(written.layout(), other.layout()))
    value_error(std::string(written.name) + " and " + other.name +
                " overlap in memory: " + written.name + " is written, so it must not");
}

revk_where where_of(const Array& written, int64_t elements) {
  revk_where where{int32_t(sizeof(revk_where)), written.device, nullptr, 0};
  const bool torch = written.library == Library::kTorch;
  if (written.device < 0) {
    if (!torch)
      where.threads = threads();
    else if (elements >= kKeepLock)
      where.threads = torch_threads();
  } else if (is_alone(written.library)) {
    where.stream = current_stream(written.library, written.device);
  }  // others: the legacy default stream, which the producers were given
  return where;
}

void finish(revk_status status, const Array& written, const revk_where& where) {
  if (status == REVK_OK && written.device >= 0 && written.library == Library::kDlpack) {
    const py::gil_scoped_release unlocked;
    status = revk_synchronize(&where);
  }
  raise_on_error(status);
}

void set_threads(int32_t threads) { host_threads = threads; }
int32_t threads() { return host_threads; }

}  // namespace revk::python
