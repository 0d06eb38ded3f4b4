/* SPDX-License-Identifier: Apache-2.0
 *
 * Two reversible blocks in C, with a residual function of one's own, forward and backward:
 *
 *     residual   R(x) = tanh(x W + b)                        x [kRows][kWidth], one W, b for each R
 *     block      y1 = x1 + F(x2),  y2 = x2 + G(y1)           (Gomez et al. 2017, eq. 6)
 *     loss       sum of t * h,  h = silu(layer_norm(y))      t: any numbers, here fixed ones
 *
 * Nothing is kept of the forward but its output y: the backward reconstructs every input from it
 * (Algorithm 1). The couplings round R onto a grid of 2^-48, and the input lies on it: then sums in
 * float64 are exact as long as they stay below 2^(53-48), and what is reconstructed is the input,
 * bit for bit. The gradient, over two batches, is held against central differences. Exit status 0
 * if everything holds, else 1. */
#include <math.h>
#include <revkernels/revkernels.h>
#include <stdio.h>
#include <string.h>

enum { kBlocks = 2, kLayers = 2 * kBlocks, kBatches = 2, kRows = 5, kWidth = 3 };
enum { kStream = 2 * kWidth, kWeights = (kWidth + 1) * kWidth, kGridExponent = 48 };

typedef double matrix[kRows][kWidth];     /* what a residual function returns */
typedef double stream[kRows][kStream];    /* x1 beside x2 */
typedef double layer[kWidth + 1][kWidth]; /* W, and b as its last row; or their gradients */

/* Views: arrays seen as (outer, channels, inner), strides counted in elements. */

static revk_view rows(double* data, int64_t channels, int64_t stride) {
  revk_view view;
  memset(&view, 0, sizeof view);
  view.struct_size = (int32_t)sizeof view;
  view.dtype = REVK_FLOAT64;
  view.data = data;
  view.outer = kRows, view.channels = channels, view.inner = 1;
  view.outer_stride = stride, view.channel_stride = 1;
  return view;
}
static revk_view half(stream s, int which) { return rows(&s[0][which * kWidth], kWidth, kStream); }
static revk_view dense(matrix m) { return rows(&m[0][0], kWidth, kWidth); }
static revk_view numbers(layer l) {
  revk_view view = rows(&l[0][0], kWeights, kWeights);
  view.outer = 1;
  return view;
}
static revk_where host(void) {
  revk_where where;
  memset(&where, 0, sizeof where);
  where.struct_size = (int32_t)sizeof where;
  where.device = -1;
  return where;
}
/* `largest` learns the largest |result|. */
static revk_coupling on_grid(float* largest) {
  revk_coupling coupling = REVK_COUPLING_INIT;
  coupling.grid_exponent = kGridExponent;
  coupling.amax = largest;
  return coupling;
}

/* The residual function of a stream's half x, and its vector-Jacobian product. */

static void residual(layer l, stream s, int half_of_s, matrix f) {
  int row, to, from;
  for (row = 0; row < kRows; ++row)
    for (to = 0; to < kWidth; ++to) {
      double z = l[kWidth][to];
      for (from = 0; from < kWidth; ++from) z += s[row][half_of_s * kWidth + from] * l[from][to];
      f[row][to] = tanh(z);
    }
}

/* f = R(x), df = (dR/dx)^T dy, and the gradients of W and b into `part`. dy is the other half of
 * the gradient's stream. */
static void residual_vjp(layer l, stream s, stream ds, int half_of_s, matrix f, matrix df,
                         layer part) {
  const int x = half_of_s * kWidth, dy = (1 - half_of_s) * kWidth;
  int row, to, from;
  residual(l, s, half_of_s, f);
  memset(df, 0, sizeof(matrix));
  memset(part, 0, sizeof(layer));
  for (row = 0; row < kRows; ++row)
    for (to = 0; to < kWidth; ++to) {
      const double dz = ds[row][dy + to] * (1 - f[row][to] * f[row][to]);
      part[kWidth][to] += dz;
      for (from = 0; from < kWidth; ++from) {
        df[row][from] += dz * l[from][to];
        part[from][to] += dz * s[row][x + from];
      }
    }
}

/* The network. Each function returns the library's status. Layer k writes the half k % 2. */

static revk_status forward(layer layers[], stream s, float* largest) {
  const revk_where where = host();
  const revk_coupling grid = on_grid(largest);
  revk_status status = REVK_OK;
  int k;
  for (k = 0; k < kLayers && status == REVK_OK; ++k) {
    matrix f;
    const revk_view to = half(s, k % 2), branch = dense(f);
    residual(layers[k], s, (k + 1) % 2, f);
    status = revk_couple(&to, &to, &branch, &grid, &where); /* in place */
  }
  return status;
}

/* The inverse alone, as where no gradient is wanted. */
static revk_status inverse(layer layers[], stream s, float* largest) {
  const revk_where where = host();
  const revk_coupling grid = on_grid(largest);
  revk_status status = REVK_OK;
  int k;
  for (k = kLayers - 1; k >= 0 && status == REVK_OK; --k) {
    matrix f;
    const revk_view to = half(s, k % 2), branch = dense(f);
    residual(layers[k], s, (k + 1) % 2, f);
    status = revk_uncouple(&to, &to, &branch, &grid, &where);
  }
  return status;
}

/* Algorithm 1: the output becomes the input and its gradient the input's, in the same memory; the
 * layers' gradients are added to `totals`. */
static revk_status backward(layer layers[], stream s, stream ds, layer totals[], float* largest) {
  const revk_where where = host();
  const revk_coupling grid = on_grid(largest);
  revk_view sums[kLayers], added[kLayers];
  layer parts[kLayers];
  revk_status status = REVK_OK;
  int k;
  for (k = kLayers - 1; k >= 0 && status == REVK_OK; --k) {
    const int written = k % 2, read = (k + 1) % 2;
    matrix f, df;
    const revk_view y = half(s, written), dy = half(ds, read), branch = dense(f),
                    gradient = dense(df);
    residual_vjp(layers[k], s, ds, read, f, df, parts[k]);
    status = revk_reverse_step(&y, &branch, &dy, &gradient, &grid, &where);
  }
  for (k = 0; k < kLayers; ++k) sums[k] = numbers(totals[k]), added[k] = numbers(parts[k]);
  return status != REVK_OK ? status : revk_accumulate(sums, added, kLayers, &where);
}

static double weight_of(int row, int channel) { return 0.25 + (row * 5 + channel * 3) % 7 * 0.125; }

/* The loss of an output; its gradient too, unless `ds` is NULL. */
static revk_status loss_of(stream s, double* loss, double (*ds)[kStream]) {
  const revk_where where = host();
  const revk_view y = rows(&s[0][0], kStream, kStream);
  stream h, dh;
  const revk_view to = rows(&h[0][0], kStream, kStream), above = rows(&dh[0][0], kStream, kStream);
  double mean[kRows], rstd[kRows];
  revk_norm norm;
  revk_norm_gradient gradient;
  revk_view dx;
  revk_status status;
  int row, channel;

  memset(&norm, 0, sizeof norm);
  norm.struct_size = (int32_t)sizeof norm;
  norm.kind = REVK_LAYER_NORM;
  norm.activation = REVK_SILU;
  norm.eps = 1e-5;
  norm.mean = mean, norm.rstd = rstd, norm.statistics_outer_stride = 1;
  status = revk_norm_act(&to, &y, &norm, &where);
  if (status != REVK_OK) return status;
  for (row = 0, *loss = 0; row < kRows; ++row)
    for (channel = 0; channel < kStream; ++channel) {
      dh[row][channel] = weight_of(row, channel);
      *loss += weight_of(row, channel) * h[row][channel];
    }
  if (ds == NULL) return REVK_OK;

  memset(&gradient, 0, sizeof gradient);
  gradient.struct_size = (int32_t)sizeof gradient;
  norm.statistics_given = 1; /* those that the forward wrote */
  dx = rows(&ds[0][0], kStream, kStream);
  return revk_norm_act_backward(&dx, NULL, &above, &y, &norm, &gradient, &where);
}

/* The checks */

static int failures = 0;

static void report(int holds, const char* text) {
  printf("  %-6s  %s\n", holds ? "ok" : "FAILED", text);
  failures += !holds;
}
static void require(revk_status status, const char* what) {
  if (status == REVK_OK) return;
  printf("  FAILED  %s: %s\n", what, revk_last_error());
  ++failures;
}

/* Any numbers of about one, on the grid. */
static void fill(double* to, int count, int seed) {
  int i;
  for (i = 0; i < count; ++i) to[i] = ldexp(rint(ldexp(sin(seed + 1.7 * i), 20)), -20);
}

static double total_loss(layer layers[], stream inputs[]) {
  double sum = 0;
  int batch;
  for (batch = 0; batch < kBatches; ++batch) {
    stream s;
    double loss = 0;
    memcpy(s, inputs[batch], sizeof s);
    require(forward(layers, s, NULL), "forward");
    require(loss_of(s, &loss, NULL), "loss");
    sum += loss;
  }
  return sum;
}

/* The largest deviation of gradients from (L(v + h) - L(v - h)) / 2h, which is off by h^2/6 |L'''|,
 * about 1e-8 with h = 2^-13 and derivatives of a few units; and by the rounding of L: the grid's
 * and the sums', some 1e-13, over 2h: 1e-9. */
static double off_differences(layer layers[], stream inputs[], double* values,
                              const double* gradient, int count) {
  const double step = ldexp(1, -13);
  double worst = 0;
  int i;
  for (i = 0; i < count; ++i) {
    const double value = values[i];
    double above, below;
    values[i] = value + step, above = total_loss(layers, inputs);
    values[i] = value - step, below = total_loss(layers, inputs);
    values[i] = value;
    worst = fmax(worst, fabs((above - below) / (2 * step) - gradient[i]));
  }
  return worst;
}

static void check_network(void) {
  layer layers[kLayers], totals[kLayers];
  stream inputs[kBatches], gradients[kBatches];
  float largest = 0;
  double off, also;
  int batch, same = 1, back = 1;
  char text[120];

  fill(&layers[0][0][0], kLayers * kWeights, 1);
  fill(&inputs[0][0][0], kBatches * kRows * kStream, 2);
  memset(totals, 0, sizeof totals);
  for (batch = 0; batch < kBatches; ++batch) {
    stream s, copy;
    double loss;
    memcpy(s, inputs[batch], sizeof s);
    require(forward(layers, s, &largest), "forward");
    memcpy(copy, s, sizeof s);
    require(loss_of(s, &loss, gradients[batch]), "loss");
    require(backward(layers, s, gradients[batch], totals, &largest), "backward");
    same = same && memcmp(s, inputs[batch], sizeof s) == 0;
    require(inverse(layers, copy, &largest), "inverse");
    back = back && memcmp(copy, inputs[batch], sizeof copy) == 0;
  }
  report(same, "the backward ends at the input, bit for bit");
  report(back, "so does the inverse");
  sprintf(text, "the largest |y| is %.3g, sums below %g are exact", largest,
          ldexp(1, 53 - kGridExponent));
  report(largest > 0 && largest < ldexp(1, 53 - kGridExponent), text);

  off = off_differences(layers, inputs, &layers[0][0][0], &totals[0][0][0], kLayers * kWeights);
  also = off_differences(layers, inputs, &inputs[0][0][0], &gradients[0][0][0],
                         kBatches * kRows * kStream);
  sprintf(text, "%d gradients of weights are %.1e off central differences at most",
          kLayers * kWeights, off);
  report(off < 1e-6, text);
  sprintf(text, "%d gradients of inputs are %.1e off", kBatches * kRows * kStream, also);
  report(also < 1e-6, text);
}

/* A mistake comes back as a status and a sentence, and nothing is written. */
static void check_refusal(void) {
  const revk_where where = host();
  stream s, before;
  revk_view y;
  revk_status status;
  char text[200];
  fill(&s[0][0], kRows * kStream, 3);
  memcpy(before, s, sizeof s);
  y = rows(&s[0][0], kStream, kStream);
  status = revk_couple(&y, &y, &y, NULL, &where);
  sprintf(text, "refused with status %d: %.150s", status, revk_last_error());
  report(status == REVK_INVALID_ARGUMENT && strlen(revk_last_error()) > 0 &&
             memcmp(s, before, sizeof s) == 0,
         text);
}

int main(void) {
  printf("revkernels %s, ABI version %d, loops for %s\n", revk_version(), (int)revk_abi_version(),
         revk_cpu_isa());
  if (revk_abi_version() != REVK_ABI_VERSION) {
    printf("  FAILED  compiled with the header of ABI version %d\n", REVK_ABI_VERSION);
    return 1;
  }
  check_network();
  check_refusal();
  printf("%s\n", failures ? "failed" : "all as it should be");
  return failures ? 1 : 0;
}
