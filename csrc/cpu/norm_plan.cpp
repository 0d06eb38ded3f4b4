// SPDX-License-Identifier: Apache-2.0
// Plans a norm's passes: how its views are walked, and how the work is cut into strips and blocks.
#include "cpu/norm_plan.h"

#include <algorithm>

#include "core/views.h"

namespace revk::cpu {
namespace {

constexpr int kMaxOperands = 4;
// Short rows are folded into up to kLanes lanes, as long as kFoldedRows rows remain: each lane has
// its own final step.
constexpr int64_t kLanes = 512;
constexpr int64_t kFoldedRows = 32;
// A channel's adjacent elements become lanes up to this number, because the ends of short runs are
// costly: for the summing passes, and for the others. And up to kPlaneASample per sample, because
// each lane has its own final step.
constexpr int64_t kPlaneSummed = 63, kPlane = 40;
constexpr int64_t kPlaneASample = 3;

// More blocks would make merging them costly.
constexpr int64_t kMaxBlocks = 128;

// The purpose of a pass: statistics, the backward's sums, or an element-wise output.
enum class Pass { kMeasure, kSums, kElements };

struct Named {
  NormOperand* operand;
  const revk_view* view;
};

// One dimension, with the steps of everything that advances along it.
struct Dim {
  int64_t size = 1;
  int64_t step[kMaxOperands] = {};  // bytes
  int64_t statistics = 0;           // elements
};

bool continues(const Dim& outer, const Dim& inner, int count) {
  if (outer.statistics != inner.statistics * inner.size) return false;
  for (int k = 0; k < count; ++k)
    if (outer.step[k] != inner.step[k] * inner.size) return false;
  return true;
}

// Orders the two non-channel dimensions, the slower first, and merges them if possible.
void order_and_merge(Dim& slow, Dim& fast, int leader, int count) {
  if (fast.size == 1 || (slow.size > 1 && slow.step[leader] < fast.step[leader]))
    std::swap(slow, fast);
  if (slow.size == 1) {
    slow = Dim{};
  } else if (continues(slow, fast, count)) {
    fast.size *= slow.size;
    slow = Dim{};
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t to_sixteen(int64_t count) { return divide_up(count, 16) * 16; }

// The largest divisor of `rows` that is at most `most`.
int64_t divisor(int64_t rows, int64_t most) {
  for (int64_t fold = most; fold > 1; --fold)
    if (rows % fold == 0) return fold;
  return 1;
}

void cut(NormJob& job, bool by_rows) {
  const int64_t channel_size = job.size[job.by_lane ? 2 : 1];
  const int64_t other_size = job.size[job.by_lane ? 1 : 2];
  job.buffer = by_rows ? std::max(kNormTile, to_sixteen(channel_size)) : kNormTile;
  if (job.by_lane) {
    job.span = by_rows ? channel_size : std::min(channel_size, kNormTile / job.plane * job.plane);
    job.chunk = std::min(other_size, std::max<int64_t>(kNormStrip / job.span, 1));
  } else {
    job.chunk = std::min(other_size, kNormStrip);
    job.span = std::min(channel_size, std::max<int64_t>(kNormStrip / job.chunk, 1));
    job.span = std::min(job.span, kNormTile);
  }
  job.lanes = to_sixteen(by_rows ? std::max(job.span, job.buffer / job.span) : job.span);
  job.splits = divide_up(channel_size, job.span);
  job.chunks = divide_up(other_size, job.chunk);
  job.units = job.size[0] * job.chunks;
  const int64_t strip = job.span * job.chunk;
  const int64_t parts = job.instances * job.splits;
  const int64_t blocks = std::clamp<int64_t>(kMaxBlocks / parts, 1, job.units);
  job.block_units = std::max(divide_up(job.units, blocks),
                             std::min(job.units, std::max<int64_t>(kNormBlock / strip, 1)));
  job.blocks = divide_up(job.units, job.block_units);
}

// Whether each sample is one row without gaps, with at most `most` elements per channel.
bool short_planes(const Dim& channel, const Dim& inner, const Named* operands, int count,
                  int64_t most) {
  if (inner.size == 1 || inner.size > most) return false;
  for (int k = 0; k < count; ++k)
    if (inner.step[k] != item_size(operands[k].view->dtype) ||
        channel.step[k] != inner.step[k] * inner.size)
      return false;
  return true;
}

// operands[leader] is walked in its memory order.
void shape_job(NormJob& job, const Named* operands, int count, int leader, const revk_norm& norm,
               Pass pass) {
  Dim outer, channel, inner;
  const revk_view& lead = *operands[leader].view;
  outer.size = lead.outer, channel.size = lead.channels, inner.size = lead.inner;
  for (int k = 0; k < count; ++k) {
    const revk_view& view = *operands[k].view;
    const int64_t item = item_size(view.dtype);
    outer.step[k] = view.outer_stride * item;
    channel.step[k] = view.channel_stride * item;
    inner.step[k] = view.inner_stride * item;
    operands[k].operand->data = static_cast<char*>(view.data);
    operands[k].operand->dtype = view.dtype;
  }
  const bool by_rows = over_channels(norm);
  if (by_rows) {
    outer.statistics = norm.statistics_outer_stride;
    inner.statistics = norm.statistics_inner_stride;
  }
  Dim instance;
  if (norm.kind == REVK_GROUP_NORM) {
    instance = outer;
    outer = Dim{};
  }
  order_and_merge(outer, inner, leader, count);
  job.channels = channel.size;
  job.instances = instance.size;
  job.fold = job.plane = 1;
  const int64_t most = pass == Pass::kElements ? kPlane : kPlaneSummed;
  if (!by_rows && short_planes(channel, inner, operands, count, most)) {
    if (norm.kind == REVK_BATCH_NORM && inner.size <= kPlaneASample * outer.size) {
      job.plane = inner.size;
      channel.size *= inner.size;
      std::copy(inner.step, inner.step + count, channel.step);
      inner = outer, outer = Dim{};
    } else if (norm.kind == REVK_GROUP_NORM && pass == Pass::kMeasure) {
      const int64_t each = channel.size / norm.groups;  // a group's channels, as one channel
      job.channels = channel.size = norm.groups;
      inner.size *= each;
      for (int k = 0; k < count; ++k) channel.step[k] *= each;
    }
  }
  // Planes are lanes even if samples overlap, each starting one element after the one before.
  job.by_lane = by_rows || job.plane > 1 || inner.size == 1 ||
                (channel.size > 1 && channel.step[leader] < inner.step[leader]);
  Dim first = job.by_lane ? inner : channel, second = job.by_lane ? channel : inner;
  if (job.by_lane && !by_rows && channel.size < kLanes) {
    bool dense = true;  // rows that follow one another without gaps become one row
    for (int k = 0; k < count; ++k) dense = dense && first.step[k] == second.step[k] * second.size;
    if (dense)
      job.fold = divisor(first.size, std::min(kLanes / second.size, first.size / kFoldedRows));
    first.size /= job.fold;
    second.size *= job.fold;
    for (int k = 0; k < count; ++k) first.step[k] *= job.fold;
  }
  job.size[0] = outer.size, job.size[1] = first.size, job.size[2] = second.size;
  job.statistics_step[0] = outer.statistics, job.statistics_step[1] = first.statistics;
  for (int k = 0; k < count; ++k) {
    NormOperand& operand = *operands[k].operand;
    operand.instance_step = instance.step[k];
    operand.step[0] = outer.step[k], operand.step[1] = first.step[k];
    operand.step[2] = second.size == 1 ? item_size(operand.dtype) : second.step[k];
  }
  cut(job, by_rows);
}

// Whether the loops write the output with streaming stores. Not if it is also the input `also`: its
// lines are in the cache already. Only a dense, unconverted output has rows that can be copied.
bool streams(const NormJob& job, const NormOperand& output, const void* also) {
  const int64_t item = item_size(output.dtype);
  const bool as_it_is = output.dtype == (job.wide ? REVK_FLOAT64 : REVK_FLOAT32) ||
                        (!job.wide && output.dtype == REVK_BFLOAT16);
  return as_it_is && output.step[2] == item && output.data != also &&
         job.instances * job.size[0] * job.size[1] * job.size[2] * item >= kNormStream;
}

NormJob start(const revk_norm& norm, int32_t compute_dtype) {
  NormJob job{};
  job.wide = compute_dtype == REVK_FLOAT64;
  job.given = norm.statistics_given != 0;
  job.has_mean = norm.kind != REVK_RMS_NORM;
  job.groups = norm.kind == REVK_GROUP_NORM ? norm.groups : 0;
  job.activation = norm.activation;
  job.eps = norm.eps;
  job.mean = norm.mean;
  job.rstd = norm.rstd;
  return job;
}

NormJob start(const NormActBackwardCall& call) {
  NormJob job = start(call.norm, call.compute_dtype);
  job.count = double(call.gradient.count);
  return job;
}

bool walked_alike(const NormJob& a, const NormJob& b) {
  return a.by_lane == b.by_lane && a.fold == b.fold && a.plane == b.plane &&
         std::equal(a.size, a.size + 3, b.size);
}

}  // namespace

NormJob plan_measure(const NormActCall& call) {
  NormJob alone = start(call.norm, call.compute_dtype), job = alone;
  const Named source{&alone.s, &call.s};
  shape_job(alone, &source, 1, 0, call.norm, Pass::kMeasure);
  alone.buffer = kNormMeasured;
  if (call.coupling == NormActCall::kNone) return alone;
  const Named operands[] = {{&job.s, &call.s}, {&job.x, &call.x}, {&job.f, &call.f}};
  shape_job(job, operands, 3, 0, call.norm, Pass::kMeasure);
  if (!walked_alike(alone, job)) return alone;
  job.buffer = kNormMeasured;
  job.coupling = int32_t(call.coupling);
  job.s.streams = streams(job, job.s, job.x.data);
  return job;
}

NormJob plan_apply(const NormActCall& call, bool coupled) {
  NormJob job = start(call.norm, call.compute_dtype);
  job.coupling = coupled ? int32_t(call.coupling) : 0;
  const Named operands[] = {
      {&job.s, &call.s}, {&job.h, &call.h}, {&job.x, &call.x}, {&job.f, &call.f}};
  shape_job(job, operands, job.coupling == 0 ? 2 : 4, 0, call.norm, Pass::kElements);
  job.h.streams = streams(job, job.h, nullptr);
  job.s.streams = job.coupling != 0 && streams(job, job.s, job.x.data);
  return job;
}

NormJob plan_sums(const NormActBackwardCall& call) {
  NormJob job = start(call);
  const Named operands[] = {{&job.s, &call.x}, {&job.dh, &call.dh}};
  shape_job(job, operands, 2, 0, call.norm, Pass::kSums);
  return job;
}

NormJob plan_gradient(const NormActBackwardCall& call) {
  NormJob job = start(call);
  const Named operands[] = {
      {&job.s, &call.x}, {&job.dh, &call.dh}, {&job.dx, &call.dx}, {&job.base, &call.base}};
  shape_job(job, operands, call.base.data == nullptr ? 3 : 4, 0, call.norm, Pass::kElements);
  job.dx.streams = call.dh.data != call.dx.data && streams(job, job.dx, job.base.data);
  return job;
}

}  // namespace revk::cpu
