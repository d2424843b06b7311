// Patches moved in groups: what one thread reads from where they lie and writes to a packed row, or the other way
// round. Host and device: a test runs all threads of a launch on the host.
//
// A packed row holds the values of a patch in (y, x, c) order. A group is I * V neighbours of it: V values of each of I
// planes, each plane read or written at once. Planar images of three channels have I = 3; where the pixels themselves
// lie one after the other, the values of a row of the patch count as pixels of one channel.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "cpu/masking.h"
#include "host_device.h"

namespace hsv::cuda {

constexpr int kWidest = 16;  // bytes of an access

// V elements, loaded and stored 16 bytes at a time, or at once if they are fewer.
template <class T, int V>
struct alignas(sizeof(T) * V < kWidest ? sizeof(T) * V : kWidest) Vector {
  T value[V];
};

struct Layout {
  Patches at;
  int32_t width, channels;  // of a patch, after rows or pixels that lie side by side became one
  int32_t values;           // of a patch
  int32_t planes;           // I: 3, or 1
  bool wide;                // V values at a time, or one
};

inline bool divides(int64_t unit, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e) {
  return a % unit == 0 && b % unit == 0 && c % unit == 0 && d % unit == 0 && e % unit == 0;
}

// How patches at `address` are moved, `V` values of a plane at a time where they lie so that this is possible.
inline Layout layout_of(Patches at, PatchShape shape, int element_size, uintptr_t address, int V) {
  int64_t width = shape.width, channels = shape.channels, height = shape.height;
  if (at.channel == 1 && (at.column == channels || width == 1)) {  // pixel after pixel
    width *= channels, channels = 1, at.column = 1;
  }
  if (channels == 1 && at.column == 1 && (at.row == width || height == 1)) {  // row after row
    width *= height, height = 1, at.row = 0;
  }
  const int planes = channels == 3 ? 3 : 1;
  const int64_t unit = V * element_size < kWidest ? V : kWidest / element_size;
  const int64_t channel = channels > 1 ? at.channel : 0;
  const bool wide = at.column == 1 && planes == channels && width % V == 0 &&
                    divides(unit, at.batch, at.grid_row, at.grid_column, at.row, channel) &&
                    address % (unit * element_size) == 0;
  return {at,
          static_cast<int32_t>(width),
          static_cast<int32_t>(channels),
          static_cast<int32_t>(width * height * channels),
          planes,
          wide};
}

struct Spot {
  int64_t sample;
  uint32_t patch, group;
};

// Where the group of this index is: groups lie one after the other, patch by patch and sample by sample.
HSV_HOST_DEVICE Spot spot_of(int64_t index, uint32_t groups, int64_t patches) {
  const int64_t row = index / groups;
  return {row / patches, static_cast<uint32_t>(row % patches), static_cast<uint32_t>(index % groups)};
}

// Where the group that comes `local` after `start` is; divisions of 32 bits will do.
HSV_HOST_DEVICE Spot spot_after(const Spot& start, uint32_t local, uint32_t groups, uint32_t patches) {
  const uint32_t group = start.group + local, patch = start.patch + group / groups;
  return {start.sample + patch / patches, patch % patches, group % groups};
}

// Offset of a group of a patch.
template <int I, int V>
HSV_HOST_DEVICE int64_t offset_of(const Layout& layout, const Spot& spot) {
  const Patches& at = layout.at;
  const uint32_t value = spot.group * (I * V), pixel = value / layout.channels, y = pixel / layout.width;
  const uint32_t x = pixel - y * layout.width, c = value - pixel * layout.channels;
  const uint32_t grid_width = static_cast<uint32_t>(at.grid_width), row = spot.patch / grid_width;
  return spot.sample * at.batch + row * at.grid_row + (spot.patch - row * grid_width) * at.grid_column + y * at.row +
         x * at.column + c * at.channel;
}

// Groups that a thread of a gather has under way at once.
template <int I>
constexpr int kInFlight = I == 1 ? 4 : 2;

// I planes of V values. The same registers, taken one after the other, hold the group as a packed row does.
template <class T, int I, int V>
struct Group {
  Vector<T, V> part[I];
};

template <class T, int I, int V>
HSV_HOST_DEVICE Group<T, I, V> load_planes(const T* p, int64_t channel) {
  Group<T, I, V> planes;
#pragma unroll
  for (int i = 0; i < I; i++) planes.part[i] = *reinterpret_cast<const Vector<T, V>*>(p + i * channel);
  return planes;
}

template <class T, int I, int V>
HSV_HOST_DEVICE void store_planes(T* p, int64_t channel, const Group<T, I, V>& planes) {
#pragma unroll
  for (int i = 0; i < I; i++) *reinterpret_cast<Vector<T, V>*>(p + i * channel) = planes.part[i];
}

// Value o of the packed group is value o / I of plane o % I.
template <class T, int I, int V>
HSV_HOST_DEVICE Group<T, I, V> interleave(const Group<T, I, V>& planes) {
  Group<T, I, V> packed;
#pragma unroll
  for (int o = 0; o < I * V; o++) packed.part[o / V].value[o % V] = planes.part[o % I].value[o / I];
  return packed;
}

template <class T, int I, int V>
HSV_HOST_DEVICE Group<T, I, V> separate(const Group<T, I, V>& packed) {
  Group<T, I, V> planes;
#pragma unroll
  for (int o = 0; o < I * V; o++) planes.part[o % I].value[o / I] = packed.part[o / V].value[o % V];
  return planes;
}

// A row of values with strides, such as predictions, tokens and their gradients [B, L, N].
template <class T>
struct Rows {
  T* data;
  int64_t batch, row, value;
};

// The packed group of such a row. V is 1 where values lie apart.
template <int I, int V, class T>
HSV_HOST_DEVICE Group<std::remove_const_t<T>, I, V> load_packed(const Rows<T>& rows, const Spot& spot) {
  const T* const row = rows.data + spot.sample * rows.batch + spot.patch * rows.row;
  return load_planes<std::remove_const_t<T>, I, V>(row + static_cast<int64_t>(spot.group) * (I * V) * rows.value,
                                                   V * rows.value);
}

// Whether V values of a row can be read at a time.
template <class T>
bool is_wide(const Rows<T>& rows, int V) {
  const int64_t size = sizeof(T), unit = V * size < kWidest ? V : kWidest / size;
  return rows.value == 1 && rows.batch % unit == 0 && rows.row % unit == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % (unit * size) == 0;
}

// Consecutive lanes store consecutive vectors of what a warp staged: `groups` of its groups, one after the other.
template <class T, int I, int V>
HSV_HOST_DEVICE void store_staged(const Group<T, I, V>* stage, int lane, int64_t groups, T* packed) {
  constexpr int kValues = V * sizeof(T) < kWidest ? V : kWidest / sizeof(T), kVectors = I * V / kValues;
  const auto* const from = reinterpret_cast<const Vector<T, kValues>*>(stage);
  auto* const to = reinterpret_cast<Vector<T, kValues>*>(packed);
#pragma unroll
  for (int i = 0; i < kVectors; i++)
    if (lane + 32 * i < groups * kVectors) to[lane + 32 * i] = from[lane + 32 * i];
}

// What one thread of a gather reads: the group of the row at `spot` of the output, from patch ids[sample, patch] of the
// source, or from `fill` (one packed row) if that number is not below `count`.
template <class T, int I, int V>
HSV_HOST_DEVICE Group<T, I, V> gathered(const T* source, const Layout& from, const Ids& ids, int64_t count,
                                        const T* fill, Spot spot) {
  const int64_t id = ids.data[spot.sample * ids.batch + spot.patch * ids.column];
  if (id >= count) return load_planes<T, I, V>(fill + spot.group * (I * V), V);
  spot.patch = static_cast<uint32_t>(id);
  return interleave(load_planes<T, I, V>(source + offset_of<I, V>(from, spot), from.at.channel));
}

}  // namespace hsv::cuda
