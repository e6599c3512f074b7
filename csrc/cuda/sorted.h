// Column sums over rows: which rows a worker takes, and where it leaves its sums. See Deal in arguments.h.
#pragma once

#include "device.h"

namespace red {
namespace cuda {

// The rows of a worker, one after the other. MAYBE_SORTED: they may be in the order of a Deal.
template <bool MAYBE_SORTED>
struct Places {
  RED_DEVICE Places(const Deal& deal, int64_t rows, int64_t worker, int64_t workers)
      : order_(MAYBE_SORTED ? deal.order : nullptr) {
    if (order_ == nullptr) {
      place = worker;
      end = rows;
      step = workers;
    } else {
      place = worker * deal.length;
      end = place + deal.length < rows ? place + deal.length : rows;
      step = 1;
    }
  }
  // Whether there is a row, `ahead` of the present one, and which.
  RED_DEVICE bool more(int ahead = 0) const { return place + ahead * step < end; }
  RED_DEVICE int64_t row(int ahead = 0) const {
    const int64_t at = place + ahead * step;
    return MAYBE_SORTED && order_ != nullptr ? order_[at] : at;
  }
  RED_DEVICE void advance() { place += step; }

  int64_t place, end, step;

 private:
  const int64_t* order_;
};

// Which edit a worker is summing, when the rows are in the order of their edits.
struct Current {
  // Not sorted: nothing is read.
  RED_DEVICE Current(const Deal& deal, bool sorted, const Places<true>& places, int64_t worker, int64_t edits)
      : id(sorted && places.more() ? deal.sorted[places.place] : -1), opening(id), worker_(worker), edits_(edits) {}

  // The line of the edit that ends: the worker's first, or the edit's own; -1 if there is no such edit.
  RED_DEVICE int64_t line() const {
    if (changes == 0) return edits_ + 2 * worker_;
    return id >= 0 && id < edits_ ? id : -1;
  }
  RED_DEVICE int64_t last_line() const { return edits_ + 2 * worker_ + 1; }
  RED_DEVICE void next(int64_t other) {
    ++changes;
    id = other;
  }
  RED_DEVICE void store(int64_t* owners) const {
    owners[2 * worker_] = changes == 0 ? -1 : opening;
    owners[2 * worker_ + 1] = id;
  }

  int64_t id, opening;
  int64_t changes = 0;

 private:
  int64_t worker_, edits_;
};

}  // namespace cuda
}  // namespace red
