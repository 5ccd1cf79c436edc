// The part of crop_resize.cpp that is compiled once for each instruction set: included there in a namespace of its own,
// after that namespace's `Lanes` (16 int32) with halves, load, widen, multiply_add, store_rounded, widen4, unzip4.
// (Neither `target_clones` nor GCC's vector types will do: GCC 12 takes their conversions apart into single numbers.)

// `num_rows` source rows (at most kLanes / PADDED), spread so that one pixel of all of them fills the lanes.
template <int CHANNELS, int PADDED>
MIMIR_INLINE void spread_rows(const std::uint8_t* rows, std::int64_t stride, int num_rows, int width,
                              std::int32_t* spread) {
    for (int r = 0; r < num_rows; ++r) {
        const std::uint8_t* row = rows + r * stride;
        std::int32_t* to = spread + r * PADDED;
        int x = 0;
        if constexpr (PADDED == 4) {  // four bytes at once, though the fourth is the next pixel's and is not used
            for (; x < width - 1; ++x) {
                widen4(row + x * CHANNELS, to + x * kLanes);
            }
        }
        for (; x < width; ++x) {
            for (int c = 0; c < CHANNELS; ++c) to[x * kLanes + c] = row[x * CHANNELS + c];
        }
    }
}

// One row of `out` (`length` bytes, PADDED for each of `width` columns) from each of the spread rows.
template <int PADDED>
MIMIR_INLINE void along_rows(const std::int32_t* spread, int left, const Taps& taps, int num_rows, int width,
                             int length, std::uint8_t* out) {
    std::uint8_t bytes[kLanes];
    for (int j = 0; j < width; ++j) {
        Lanes sums = halves();
        const std::int32_t* weights = &taps.weights[static_cast<std::size_t>(j) * taps.most];
        const std::int32_t* pixels = spread + static_cast<std::int64_t>(std::max(taps.first[j] - left, 0)) * kLanes;
        for (int k = 0; k < taps.count[j]; ++k) {
            sums = multiply_add(load(pixels + k * kLanes), weights[k], sums);
        }
        store_rounded(sums, bytes);
        for (int r = 0; r < num_rows; ++r) std::memcpy(out + r * length + j * PADDED, bytes + r * PADDED, PADDED);
    }
}

// One row of every channel (`plane` pixels each) of the result from `count` rows of `length` bytes.
template <int CHANNELS, int PADDED>
MIMIR_INLINE void along_columns(const std::uint8_t* rows, int length, const std::int32_t* weights, int count, int width,
                                std::int64_t plane, std::uint8_t* out) {
    constexpr int kPixels = kLanes / PADDED;
    std::uint8_t bytes[kLanes];
    for (int x = 0; x < length; x += kLanes) {
        Lanes sums = halves();
        for (int k = 0; k < count; ++k) {
            sums = multiply_add(widen(rows + static_cast<std::int64_t>(k) * length + x), weights[k], sums);
        }
        store_rounded(sums, bytes);
        if constexpr (PADDED == 4) unzip4(bytes);
        const int j = x / PADDED, num = std::min(kPixels, width - j);
        for (int c = 0; c < CHANNELS; ++c) {
            std::uint8_t* to = out + c * plane + j;
            const std::uint8_t* from = bytes + c * kPixels;
            if (num == kPixels) {
                std::memcpy(to, from, kPixels);
            } else {
                std::memcpy(to, from, num);
            }
        }
    }
}

template <int CHANNELS, int PADDED>
void crop_resize_one(const std::uint8_t* image, const Image& plan, int height, int width, Scratch& scratch,
                     std::uint8_t* out) {
    constexpr int kRows = kLanes / PADDED;
    const auto axis = [&](int which, int side, Taps& taps) {
        find_taps(static_cast<int>(which == 0 ? plan.height : plan.width), static_cast<int>(plan.box[which]),
                  static_cast<int>(plan.box[which + 2]), static_cast<int>(plan.size[which]),
                  static_cast<int>(plan.anchor[which]), which == 1 && plan.mirror, side, taps, scratch.raw);
    };
    axis(0, height, scratch.rows);
    axis(1, width, scratch.columns);
    const auto range = [](const Taps& taps) {  // of the pixels that are needed at all
        int low = 1 << 30, high = 0;
        for (std::size_t i = 0; i < taps.count.size(); ++i) {
            if (taps.count[i] == 0) continue;
            low = std::min(low, taps.first[i]);
            high = std::max(high, taps.first[i] + taps.count[i]);
        }
        return std::pair<int, int>{std::min(low, high), high};
    };
    const auto [top, bottom] = range(scratch.rows);
    const auto [left, right] = range(scratch.columns);
    const int length = (width * PADDED + kLanes - 1) / kLanes * kLanes;
    scratch.spread.assign(static_cast<std::size_t>(right - left) * kLanes, 0);
    scratch.between.resize(static_cast<std::size_t>(bottom - top) * length);
    const std::int64_t stride = plan.width * CHANNELS;
    for (int row = top; row < bottom; row += kRows) {
        const int num_rows = std::min(kRows, bottom - row);
        spread_rows<CHANNELS, PADDED>(image + row * stride + left * CHANNELS, stride, num_rows, right - left,
                                      scratch.spread.data());
        along_rows<PADDED>(scratch.spread.data(), left, scratch.columns, num_rows, width, length,
                           scratch.between.data() + static_cast<std::int64_t>(row - top) * length);
    }
    const std::int64_t plane = static_cast<std::int64_t>(height) * width;
    for (int i = 0; i < height; ++i) {
        // Without any taps (outside the resized image) the sum is the half that rounds to 0.
        const std::int64_t offset = static_cast<std::int64_t>(std::max(scratch.rows.first[i] - top, 0)) * length;
        along_columns<CHANNELS, PADDED>(scratch.between.data() + offset, length,
                                        &scratch.rows.weights[static_cast<std::size_t>(i) * scratch.rows.most],
                                        scratch.rows.count[i], width, plane,
                                        out + static_cast<std::int64_t>(i) * width);
    }
}

