// SPDX-License-Identifier: Apache-2.0
// The kernels as XLA FFI custom calls: XLA's buffers are described to the C library, which does the
// work. Compiled at first use, against the headers of the jaxlib that loads it (build.py).
//
// Arrays come in the order that the comments give, results in the memory of operands where ops.py
// says so. Under vmap all of them have one more dimension in front, of one size.
#include <cmath>

#include "call.h"
#include "threads.h"

namespace revk_jax {
namespace {

// ---- couplings

using Run = std::function<void(int64_t begin, int64_t end, const revk_coupling*)>;

// Runs over all elements with the coupling of the call, which has `operands` and `plain` results.
// Any beyond these are its reports, amax and checksum, in the memory of operands that are zero. The
// host makes both from slices of one size, however many threads there are: its checksum is that of
// the slices' checksums.
void with_coupling(Call& call, size_t operands, size_t plain, const Run& run) {
  revk_coupling coupling = {};
  coupling.struct_size = sizeof coupling;
  coupling.grid_exponent = int32_t(call.integer("grid_exponent"));
  const int64_t count = call.out[0].count;
  if (call.out.size() == plain) {
    const revk_coupling* given = coupling.grid_exponent == REVK_NO_GRID ? nullptr : &coupling;
    for_slices(call.place, count, [&](int64_t begin, int64_t end) { run(begin, end, given); });
    return;
  }
  for (size_t k = 0; k < 2; ++k) call.expect_in_place(operands + k, plain + k);
  const int64_t batches = call.out[plain].count, length = batches == 0 ? 0 : count / batches;
  for (int64_t batch = 0; batch < batches; ++batch) {
    float* const amax = static_cast<float*>(call.out[plain].at(batch));
    uint64_t* const checksum = static_cast<uint64_t*>(call.out[plain + 1].at(2 * batch));
    const int64_t from = batch * length;
    if (call.place.pool == nullptr) {
      coupling.amax = amax;
      coupling.checksum = checksum;
      run(from, from + length, &coupling);
      continue;
    }
    std::mutex mutex;
    for_slices(call.place, length, [&](int64_t begin, int64_t end) {
      float largest = 0;
      uint64_t sum = 0;
      revk_coupling own = coupling;
      own.amax = &largest;
      own.checksum = &sum;
      run(from + begin, from + end, &own);
      const std::lock_guard<std::mutex> lock(mutex);
      if (!(largest <= *amax) && !std::isnan(*amax)) *amax = largest;
      *checksum += sum * uint64_t(2 * (begin / kSlice) + 1);
    });
  }
}

// in: x, f [, amax, checksum]; out: x + f, or x - f [, amax, checksum]
void couple(Call& call) {
  const auto function = call.integer("subtract") != 0 ? revk_uncouple : revk_couple;
  with_coupling(call, 2, 1, [&](int64_t begin, int64_t end, const revk_coupling* coupling) {
    const revk_view result = call.out[0].row(begin, end), x = call.in[0].row(begin, end),
                    f = call.in[1].row(begin, end);
    check(function(&result, &x, &f, coupling, &call.place.where));
  });
}

// in: y, f, dy, df [, amax, checksum]; out: y - f and dy + df, in the memory of y and dy
// [, amax, checksum]
void reverse_step(Call& call) {
  call.expect_in_place(0, 0);
  call.expect_in_place(2, 1);
  with_coupling(call, 4, 2, [&](int64_t begin, int64_t end, const revk_coupling* coupling) {
    const revk_view y = call.out[0].row(begin, end), f = call.in[1].row(begin, end),
                    dy = call.out[1].row(begin, end), df = call.in[3].row(begin, end);
    check(revk_reverse_step(&y, &f, &dy, &df, coupling, &call.place.where));
  });
}

// ---- sums

// in: totals, then as many parts; out: totals + parts, in the memory of the totals
void accumulate(Call& call) {
  const size_t count = call.out.size();
  if (call.place.pool != nullptr) {
    for (size_t k = 0; k < count; ++k) {
      call.expect_in_place(k, k);
      for_slices(call.place, call.out[k].count, [&](int64_t begin, int64_t end) {
        const revk_view total = call.out[k].row(begin, end),
                        part = call.in[count + k].row(begin, end);
        check(revk_accumulate(&total, &part, 1, &call.place.where));
      });
    }
    return;
  }
  std::vector<revk_view> totals, parts;
  for (size_t k = 0; k < count; ++k) {
    call.expect_in_place(k, k);
    totals.push_back(call.out[k].row(0, call.out[k].count));
    parts.push_back(call.in[count + k].row(0, call.out[k].count));
  }
  check(revk_accumulate(totals.data(), parts.data(), int64_t(count), &call.place.where));
}

// ---- norms

// The call's norm, of one example at a time where vmap brings several. Arrays are taken in the
// order in which the call lists them.
class NormCall {
 public:
  explicit NormCall(Call& of) : call_(of) {
    norm.struct_size = sizeof norm;
    norm.kind = int32_t(call_.integer("kind"));
    norm.activation = int32_t(call_.integer("activation"));
    norm.groups = int32_t(call_.integer("groups"));
    norm.eps = call_.number("eps");
    channels = call_.integer("channels");
    size_ = call_.integer("outer") * channels * call_.integer("inner");
    statistics = call_.integer("statistics");
    if (norm.kind == REVK_LAYER_NORM || norm.kind == REVK_RMS_NORM) {
      norm.statistics_outer_stride = call_.integer("inner");
      norm.statistics_inner_stride = 1;
    }
  }

  revk_view view(const Array& array, int64_t example) const {
    const int64_t outer = call_.integer("outer"), inner = call_.integer("inner");
    const bool last = call_.integer("channels_last") != 0;
    return {int32_t(sizeof(revk_view)),
            array.dtype,
            array.at(example * size_),
            outer,
            channels,
            inner,
            channels * inner,
            last ? 1 : inner,
            last ? channels : 1};
  }

  // Points weight and bias at an example's, and workspace, if x needs any.
  void parameters(int64_t example, const Array* weight, const Array* bias, const revk_view& x) {
    const Array* const given[] = {weight, bias};
    const void** const to[] = {&norm.weight, &norm.bias};
    for (int k = 0; k < 2; ++k)
      if (given[k] != nullptr) {
        *to[k] = given[k]->at(example * channels);
        norm.parameter_dtype = given[k]->dtype;
      }
    if (call_.place.scratch == nullptr || norm.workspace != nullptr) return;
    const int64_t bytes = revk_norm_workspace(&x, &norm, &call_.place.where);
    if (bytes < 0) check(REVK_INVALID_ARGUMENT);
    if (bytes == 0) return;
    const auto memory = call_.place.scratch->Allocate(size_t(bytes), 256);
    if (!memory.has_value())
      throw Failure{ffi::ErrorCode::kResourceExhausted,
                    "revkernels: no " + std::to_string(bytes) + " bytes of workspace for a norm"};
    norm.workspace = *memory;
    norm.workspace_bytes = bytes;
  }

  revk_norm norm = {};
  int64_t channels, statistics;

 private:
  Call& call_;
  int64_t size_;  // elements of an example
};

// in: x [, f] [, weight] [, bias] [, mean] [, rstd]; out: [x + f, or x - f,] h [, mean] [, rstd]
void norm_act(Call& call) {
  NormCall norms(call);
  const int64_t coupled = call.integer("coupled");  // 1, 0 or -1
  const bool given = call.integer("given") != 0, centered = norms.norm.kind != REVK_RMS_NORM;
  size_t in = 0, out = 0;
  const Array* const x = &call.in[in++];
  const Array* const f = coupled != 0 ? &call.in[in++] : nullptr;
  const Array* const weight = call.integer("weight") != 0 ? &call.in[in++] : nullptr;
  const Array* const bias = call.integer("bias") != 0 ? &call.in[in++] : nullptr;
  const Array* const sum = coupled != 0 ? &call.out[out++] : nullptr;
  const Array* const h = &call.out[out++];
  const Array* const mean = !centered ? nullptr : given ? &call.in[in++] : &call.out[out++];
  const Array* const rstd = given ? &call.in[in++] : &call.out[out++];
  norms.norm.statistics_given = given;
  const int64_t examples = norms.statistics == 0 ? 0 : rstd->count / norms.statistics;
  for (int64_t example = 0; example < examples; ++example) {
    const revk_view x_view = norms.view(*x, example), h_view = norms.view(*h, example);
    norms.parameters(example, weight, bias, x_view);
    norms.norm.mean = centered ? mean->at(example * norms.statistics) : nullptr;
    norms.norm.rstd = rstd->at(example * norms.statistics);
    if (coupled == 0) {
      check(revk_norm_act(&h_view, &x_view, &norms.norm, &call.place.where));
      continue;
    }
    const auto function = coupled > 0 ? revk_couple_norm_act : revk_uncouple_norm_act;
    const revk_view sum_view = norms.view(*sum, example), f_view = norms.view(*f, example);
    check(function(&h_view, &sum_view, &x_view, &f_view, &norms.norm, &call.place.where));
  }
}

// in: [base,] dh, x [, weight] [, bias] [, mean], rstd; out: dx, in the memory of base; dweight,
// dbias
void norm_act_backward(Call& call) {
  NormCall norms(call);
  size_t in = 0;
  const bool accumulates = call.integer("base") != 0;
  if (accumulates) call.expect_in_place(in++, 0);
  const Array* const dh = &call.in[in++];
  const Array* const x = &call.in[in++];
  const Array* const weight = call.integer("weight") != 0 ? &call.in[in++] : nullptr;
  const Array* const bias = call.integer("bias") != 0 ? &call.in[in++] : nullptr;
  const Array* const mean = norms.norm.kind != REVK_RMS_NORM ? &call.in[in++] : nullptr;
  const Array* const rstd = &call.in[in++];
  norms.norm.statistics_given = 1;
  revk_norm_gradient gradient = {};
  gradient.struct_size = sizeof gradient;
  gradient.constant = int32_t(call.integer("constant"));
  const int64_t examples = norms.channels == 0 ? 0 : call.out[1].count / norms.channels;
  for (int64_t example = 0; example < examples; ++example) {
    const revk_view dx = norms.view(call.out[0], example), dh_view = norms.view(*dh, example),
                    x_view = norms.view(*x, example);
    norms.parameters(example, weight, bias, x_view);
    norms.norm.mean = mean != nullptr ? mean->at(example * norms.statistics) : nullptr;
    norms.norm.rstd = rstd->at(example * norms.statistics);
    gradient.dweight = call.out[1].at(example * norms.channels);
    gradient.dbias = call.out[2].at(example * norms.channels);
    check(revk_norm_act_backward(&dx, accumulates ? &dx : nullptr, &dh_view, &x_view, &norms.norm,
                                 &gradient, &call.place.where));
  }
}

// ---- how XLA calls them

ffi::Error run(void (*kernel)(Call&), Place place, const ffi::RemainingArgs& args,
               const ffi::RemainingRets& rets, const ffi::Dictionary& attributes) {
  try {
    Call call(place, args, rets, attributes);
    kernel(call);
    return ffi::Error::Success();
  } catch (const Failure& failure) {
    return ffi::Error(failure.code, failure.reason);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("revkernels: ") + error.what());
  }
}

template <void (*kernel)(Call&)>
ffi::Error on_host(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attributes) {
  // One thread for elements, as for_slices shares them out. Norms, whose sums cannot be cut where
  // one likes, take OpenMP's threads, as many as XLA has.
  const bool norm = kernel == norm_act || kernel == norm_act_backward;
  const int32_t threads = norm ? int32_t(std::max<int64_t>(pool.num_threads(), 1)) : 1;
  return run(kernel, {{sizeof(revk_where), -1, nullptr, threads}, &pool, nullptr}, args, rets,
             attributes);
}

template <void (*kernel)(Call&)>
ffi::Error on_cuda(void* stream, int32_t ordinal, ffi::ScratchAllocator scratch,
                   ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  return run(kernel, {{sizeof(revk_where), ordinal, stream, 0}, nullptr, &scratch}, args, rets,
             attributes);
}

auto host_binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs();
}
auto cuda_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<void*>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::ScratchAllocator>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

}  // namespace

// Everything else stays inside: another library's instances of XLA's templates are not these.
#define REVK_JAX_EXPORT(symbol) \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* symbol(XLA_FFI_CallFrame*)
#define REVK_JAX_HANDLERS(kernel)                                                          \
  REVK_JAX_EXPORT(revk_jax_##kernel##_cpu);                                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(revk_jax_##kernel##_cpu, on_host<kernel>, host_binding()); \
  REVK_JAX_EXPORT(revk_jax_##kernel##_cuda);                                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(revk_jax_##kernel##_cuda, on_cuda<kernel>, cuda_binding())

REVK_JAX_HANDLERS(couple);
REVK_JAX_HANDLERS(reverse_step);
REVK_JAX_HANDLERS(accumulate);
REVK_JAX_HANDLERS(norm_act);
REVK_JAX_HANDLERS(norm_act_backward);

}  // namespace revk_jax
