// Runs the kernels of csrc/cpu without torch, for processors that are emulated: requests on the standard input, results on
// the standard output, one after the other. tests/backends/emulated_cpu.py speaks with it.
//
// A request is the name of a call (24 bytes), thirteen int64 values and thirteen arrays, each with its length in bytes in front
// (-1: absent); a result is as many arrays as the call has. All is in this machine's byte order, which is little.
#include "harness.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cpu/dispatch.h"
#include "../../../csrc/cpu/memory.h"

namespace red {
namespace neon {
extern const Conversions conversions;
}
namespace neon_bf16 {
extern const Conversions conversions;
}
}  // namespace red

namespace {

using namespace red;

constexpr int kArrays = 13, kValues = 13, kGuard = 64, kSums = 5;
enum Input { kX, kResidual, kScale, kBias, kWeight, kNormBias, kIds, kDy, kDz, kZ, kMean, kRstd, kSecond };
enum Value { kType, kCentered, kRows, kWidth, kStream, kEdits, kNeeds, kDropout, kSeed, kThreshold, kFactor, kEps, kBlocks };

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) fail("the request ends too early");
}

// Nothing that comes in lies on the bounds of a vector.
struct Array {
  static constexpr size_t kShift = 4;
  bool present = false;
  std::vector<char> bytes;
  const void* data() const { return present ? bytes.data() + kShift : nullptr; }
  const float* floats() const { return static_cast<const float*>(data()); }
};

float float_of(int64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &low, sizeof value);
  return value;
}

// An output that is all NaN until it is written, between guards; absent outputs have no bytes.
struct Output {
  explicit Output(bool present, int64_t bytes) : size(present ? bytes : -1) {
    if (present) all.assign(static_cast<size_t>(bytes) + 2 * kGuard, static_cast<char>(0xff));
  }
  char* data() { return size < 0 ? nullptr : all.data() + kGuard; }
  void write() {
    for (int64_t i = 0; size >= 0 && i < kGuard; ++i)
      if (all[i] != static_cast<char>(0xff) || all[kGuard + size + i] != static_cast<char>(0xff))
        fail("a kernel wrote outside of its output");
    std::fwrite(&size, sizeof size, 1, stdout);
    if (size > 0) std::fwrite(data(), 1, static_cast<size_t>(size), stdout);
  }
  int64_t size;
  std::vector<char> all;
};

struct Call {
  char name[24];
  int64_t values[kValues];
  Array arrays[kArrays];
  std::vector<int64_t> ids_of_rows;  // on their bounds

  int64_t d() const { return values[kWidth]; }
  int64_t rows() const { return values[kRows]; }
  int type() const { return static_cast<int>(values[kType]); }
  bool centered() const { return values[kCentered] != 0; }
  int64_t activation() const { return rows() * d() * (type() == kFloat32 ? 4 : 2); }
  Rows of(Input which) const { return {arrays[which].data(), d()}; }
  const int64_t* ids() const { return ids_of_rows.empty() ? nullptr : ids_of_rows.data(); }
  Vectors vectors(Input which) const { return {arrays[which].floats(), d(), ids()}; }
  bool needs(int k) const { return (values[kNeeds] >> k & 1) != 0; }
  Dropout dropout() const {
    return {values[kDropout] != 0, static_cast<uint64_t>(values[kSeed]), static_cast<uint32_t>(values[kThreshold]),
            float_of(values[kFactor])};
  }
  std::vector<float> scratch() const { return std::vector<float>(static_cast<size_t>(scratch_floats(d())) + 16); }
};

float* align(std::vector<float>& v) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64); }

// As csrc/cpu/columns.h does it: sums of 16 rows, then of those for each chunk, then in fp64.
template <class Body>
void column_sums(const Call& call, const bool (&asked)[kSums], const bool (&of_edits)[kSums], const Body& body) {
  const int64_t d = call.d(), edits = call.ids() ? call.values[kEdits] : 1;
  const Plan plan = plan_chunks(call.rows(), call.ids(), edits);
  std::vector<double> totals[kSums];
  for (auto& total : totals) total.assign(static_cast<size_t>(edits * d), 0.0);
  std::vector<float> scratch = call.scratch();
  for (const Chunk& chunk : plan.chunks) {
    std::vector<float> of_chunk(static_cast<size_t>(kSums * d));
    for (int64_t k = chunk.begin; k < chunk.end; k += 16) {
      std::vector<float> few[kSums];
      float* sums[kSums];
      for (int s = 0; s < kSums; ++s) {
        if (asked[s]) few[s].assign(static_cast<size_t>(padded(d)) + 16, 0.0f);
        sums[s] = asked[s] ? align(few[s]) : nullptr;
      }
      body(Chunk{k, std::min(k + 16, chunk.end), chunk.edit, chunk.order}, Columns{sums[0], sums[1], sums[2], sums[3], sums[4]},
           align(scratch));
      for (int s = 0; s < kSums; ++s)
        for (int64_t j = 0; asked[s] && j < d; ++j) of_chunk[s * d + j] += sums[s][j];
    }
    for (int s = 0; s < kSums; ++s)
      for (int64_t j = 0; j < d; ++j) totals[s][(of_edits[s] ? chunk.edit : 0) * d + j] += of_chunk[s * d + j];
  }
  for (int s = 0; s < kSums; ++s) {
    const int64_t n = (of_edits[s] ? edits : 1) * d;
    Output out(asked[s], n * 4);
    for (int64_t i = 0; asked[s] && i < n; ++i) reinterpret_cast<float*>(out.data())[i] = static_cast<float>(totals[s][i]);
    out.write();
  }
}

void edit_forward(const Call& call) {
  Output z(true, call.activation());
  const EditForward p{call.d(), call.of(kX), call.of(kResidual), call.vectors(kScale), call.vectors(kBias),
                      call.dropout(), call.values[kStream] != 0, z.data()};
  std::vector<float> scratch = call.scratch();
  kernels().edit_forward[call.type()](p, 0, call.rows(), align(scratch));
  z.write();
}

void edit_backward(const Call& call) {
  Output dx(call.needs(0), call.activation());
  const EditBackward p{call.d(), call.of(kDz), call.of(kX), call.vectors(kScale), call.dropout(),
                       call.values[kStream] != 0, dx.data()};
  const bool asked[kSums] = {call.needs(1), call.needs(2)}, of_edits[kSums] = {true, true};
  column_sums(call, asked, of_edits, [&](const Chunk& chunk, const Columns& sums, float* scratch) {
    kernels().edit_backward[call.type()](p, chunk, sums, scratch);
  });
  dx.write();
}

void edit_norm_forward(const Call& call) {
  const bool keep_z = call.needs(0);
  Output y(true, call.activation()), z(keep_z, call.activation());
  Output mean(call.centered(), call.rows() * 4), rstd(true, call.rows() * 4);
  const EditNormForward p{call.d(),
                          call.of(kX),
                          call.of(kResidual),
                          call.vectors(kScale),
                          call.vectors(kBias),
                          call.arrays[kWeight].floats(),
                          call.arrays[kNormBias].floats(),
                          call.dropout(),
                          float_of(call.values[kEps]),
                          call.values[kStream] != 0,
                          y.data(),
                          z.data(),
                          reinterpret_cast<float*>(mean.data()),
                          reinterpret_cast<float*>(rstd.data())};
  std::vector<float> scratch = call.scratch();
  kernels().edit_norm_forward[call.type()][call.centered()](p, 0, call.rows(), align(scratch));
  for (Output* out : {&y, &z, &mean, &rstd}) out->write();
}

void edit_norm_backward(const Call& call) {
  Output dx(call.needs(0), call.activation()), dresidual(call.needs(1), call.activation());
  const EditNormBackward p{call.d(),
                           call.of(kDy),
                           call.of(kDz),
                           call.of(kZ),
                           call.of(kX),
                           call.of(kResidual),
                           call.vectors(kScale),
                           call.vectors(kBias),
                           call.arrays[kWeight].floats(),
                           call.dropout(),
                           call.values[kStream] != 0,
                           call.arrays[kMean].floats(),
                           call.arrays[kRstd].floats(),
                           dx.data(),
                           dresidual.data()};
  const bool asked[kSums] = {call.needs(2), call.needs(3), call.needs(4), call.needs(5)};
  const bool of_edits[kSums] = {true, true};
  column_sums(call, asked, of_edits, [&](const Chunk& chunk, const Columns& sums, float* scratch) {
    kernels().edit_norm_backward[call.type()][call.centered()](p, chunk, sums, scratch);
  });
  dx.write();
  dresidual.write();
}

void norm_edit_forward(const Call& call) {
  Output y(true, call.activation()), mean(call.centered(), call.rows() * 4), rstd(true, call.rows() * 4);
  const NormEditForward p{call.d(),
                          call.of(kX),
                          call.vectors(kScale),
                          call.vectors(kBias),
                          call.arrays[kWeight].floats(),
                          call.arrays[kNormBias].floats(),
                          float_of(call.values[kEps]),
                          call.values[kStream] != 0,
                          y.data(),
                          reinterpret_cast<float*>(mean.data()),
                          reinterpret_cast<float*>(rstd.data())};
  std::vector<float> scratch = call.scratch();
  kernels().norm_edit_forward[call.type()][call.centered()](p, 0, call.rows(), align(scratch));
  for (Output* out : {&y, &mean, &rstd}) out->write();
}

void norm_edit_backward(const Call& call) {
  Output dx(call.needs(0), call.activation());
  const NormEditBackward p{call.d(),
                           call.of(kDy),
                           call.of(kX),
                           call.vectors(kScale),
                           call.arrays[kWeight].floats(),
                           call.arrays[kNormBias].floats(),
                           call.values[kStream] != 0,
                           call.arrays[kMean].floats(),
                           call.arrays[kRstd].floats(),
                           dx.data()};
  const bool asked[kSums] = {call.needs(3), call.needs(4), call.needs(1), call.needs(2)};
  const bool of_edits[kSums] = {true, true};
  column_sums(call, asked, of_edits, [&](const Chunk& chunk, const Columns& sums, float* scratch) {
    kernels().norm_edit_backward[call.type()][call.centered()](p, chunk, sums, scratch);
  });
  dx.write();
}

void mix_forward(const Call& call) {
  Output z(true, call.activation());
  const MixForward p{{call.d(), call.of(kX), call.of(kResidual), call.vectors(kScale), call.vectors(kBias), call.dropout(),
                      call.values[kStream] != 0, z.data()},
                     call.vectors(kSecond), call.values[kBlocks]};
  std::vector<float> scratch = call.scratch();
  kernels().mixes->forward[call.type()](p, 0, call.rows(), align(scratch));
  z.write();
}

void mix_backward(const Call& call) {
  Output dx(call.needs(0), call.activation());
  const MixBackward p{{call.d(), call.of(kDz), call.of(kX), call.vectors(kScale), call.dropout(),
                       call.values[kStream] != 0, dx.data()},
                      call.vectors(kSecond), call.values[kBlocks]};
  const bool asked[kSums] = {call.needs(1), call.needs(3), false, false, call.needs(2)};
  const bool of_edits[kSums] = {true, true, false, false, true};
  column_sums(call, asked, of_edits, [&](const Chunk& chunk, const Columns& sums, float* scratch) {
    kernels().mixes->backward[call.type()](p, chunk, sums, scratch);
  });
  dx.write();
}

void mix_norm_forward(const Call& call) {
  Output y(true, call.activation()), z(true, call.activation());
  Output mean(call.centered(), call.rows() * 4), rstd(true, call.rows() * 4);
  const MixNormForward p{{call.d(), call.of(kX), call.of(kResidual), call.vectors(kScale), call.vectors(kBias),
                          call.arrays[kWeight].floats(), call.arrays[kNormBias].floats(), call.dropout(),
                          float_of(call.values[kEps]), call.values[kStream] != 0, y.data(), z.data(),
                          reinterpret_cast<float*>(mean.data()), reinterpret_cast<float*>(rstd.data())},
                         call.vectors(kSecond), call.values[kBlocks]};
  std::vector<float> scratch = call.scratch();
  kernels().mixes->norm_forward[call.type()][call.centered()](p, 0, call.rows(), align(scratch));
  for (Output* out : {&y, &z, &mean, &rstd}) out->write();
}

void mix_norm_backward(const Call& call) {
  Output dx(call.needs(0), call.activation()), dresidual(call.needs(1), call.activation());
  const MixNormBackward p{{call.d(), call.of(kDy), call.of(kDz), call.of(kZ), call.of(kX), {}, call.vectors(kScale), {},
                           call.arrays[kWeight].floats(), call.dropout(), call.values[kStream] != 0,
                           call.arrays[kMean].floats(), call.arrays[kRstd].floats(), dx.data(), dresidual.data()},
                          call.vectors(kSecond), call.values[kBlocks]};
  const bool asked[kSums] = {call.needs(2), call.needs(4), call.needs(5), call.needs(6), call.needs(3)};
  const bool of_edits[kSums] = {true, true, false, false, true};
  column_sums(call, asked, of_edits, [&](const Chunk& chunk, const Columns& sums, float* scratch) {
    kernels().mixes->norm_backward[call.type()][call.centered()](p, chunk, sums, scratch);
  });
  dx.write();
  dresidual.write();
}

const Conversions& conversions() {
  return std::strcmp(kernels().name, "neon_bf16") == 0 ? neon_bf16::conversions : neon::conversions;
}

void widen(const Call& call) {
  Output out(true, call.d() * 4);
  conversions().widen(call.type(), call.values[kStream] != 0, static_cast<const uint16_t*>(call.arrays[kX].data()),
                      reinterpret_cast<float*>(out.data()), call.d());
  out.write();
}

void narrow(const Call& call) {
  Output out(true, call.d() * 2);
  conversions().narrow(call.type(), call.values[kStream] != 0, call.arrays[kX].floats(),
                       reinterpret_cast<uint16_t*>(out.data()), call.d());
  out.write();
}

void write_text(const std::string& text) {
  Output out(true, static_cast<int64_t>(text.size()));
  std::copy(text.begin(), text.end(), out.data());
  out.write();
}

// Uses the set that the first array names (absent: the automatic choice, after RED_KERNELS_CPU); answers with its name and
// all that can run, or with the error.
void use(const Call& call) {
  const Array& name = call.arrays[0];
  try {
    if (name.present) use_kernels(std::string(name.bytes.begin() + Array::kShift, name.bytes.end()).c_str());
    std::string names = kernels().name;
    for (const char* runnable : runnable()) names += std::string(" ") + runnable;
    write_text(names);
  } catch (const std::runtime_error& error) {
    write_text(error.what());
  }
}

// Takes, fills and gives back memory of the pool; answers with the bytes that it kept.
void pool(const Call& call) {
  const size_t bytes = static_cast<size_t>(call.d());
  void* block = acquire(bytes);
  if (block == nullptr) fail("the pool has no memory");
  std::memset(block, 1, bytes);
  release(block);
  const size_t before = kept();
  if (acquire(bytes) != block) fail("the pool gave another block");
  release(block);
  if (trim() != before || kept() != 0) fail("the pool keeps what it gave back");
  write_text(std::to_string(before));
}

struct Known {
  const char* name;
  void (*run)(const Call&);
};
constexpr Known kKnown[] = {
    {"edit_forward", edit_forward},
    {"edit_backward", edit_backward},
    {"edit_norm_forward", edit_norm_forward},
    {"edit_norm_backward", edit_norm_backward},
    {"norm_edit_forward", norm_edit_forward},
    {"norm_edit_backward", norm_edit_backward},
    {"mix_forward", mix_forward},
    {"mix_backward", mix_backward},
    {"mix_norm_forward", mix_norm_forward},
    {"mix_norm_backward", mix_norm_backward},
    {"widen", widen},
    {"narrow", narrow},
    {"use", use},
    {"pool", pool},
};

}  // namespace

int main() {
  Call call;
  while (std::fread(call.name, 1, sizeof call.name, stdin) == sizeof call.name) {
    call.name[sizeof call.name - 1] = '\0';
    read(call.values, sizeof call.values);
    for (Array& array : call.arrays) {
      int64_t bytes;
      read(&bytes, sizeof bytes);
      array.present = bytes >= 0;
      array.bytes.assign(Array::kShift + static_cast<size_t>(std::max<int64_t>(bytes, 0)), 0);
      read(array.bytes.data() + Array::kShift, array.bytes.size() - Array::kShift);
    }
    const Array& ids = call.arrays[kIds];
    call.ids_of_rows.resize((ids.bytes.size() - Array::kShift) / sizeof(int64_t));
    std::memcpy(call.ids_of_rows.data(), ids.bytes.data() + Array::kShift, ids.bytes.size() - Array::kShift);
    const Known* known = std::find_if(std::begin(kKnown), std::end(kKnown),
                                      [&](const Known& one) { return std::strcmp(one.name, call.name) == 0; });
    if (known == std::end(kKnown)) fail("no such call");
    known->run(call);
    std::fflush(stdout);
  }
  return 0;
}
