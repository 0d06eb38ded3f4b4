// SPDX-License-Identifier: Apache-2.0
#include "bindings/checks.h"

namespace revk::python {

void raise_on_error(revk_status status) {
  if (status == REVK_OK) return;
  if (status == REVK_INVALID_ARGUMENT) value_error(revk_last_error());
  throw std::runtime_error(revk_last_error());
}

void check_together(const Array& leader, const Array& other) {
  if (other.library != leader.library)
    type_error(std::string(other.name) + " and " + leader.name +
               " come from torch and NumPy; all arrays of a call must come from one library");
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

void check_written(const Array& written) {
  if (!written.writable)
    value_error(std::string(written.name) +
                " is read-only; it must be writable, for the result is written there");
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
  if (written.library != Library::kTorch) return where;
  if (written.device >= 0)
    where.stream = torch_stream(written.device);
  else if (elements >= kKeepLock)
    where.threads = torch_threads();
  return where;
}

}  // namespace revk::python
