// What an exported file takes besides image and features: tables of the sizes, as anyup_core/export/inputs.py makes them.
//
// The window bounds are exact only in single precision, in the order of operations of anyup_core/geometry.py: every result
// is rounded with Math.fround. Tables are {type, dims, data}; "int64" is a BigInt64Array, "bool" a Uint8Array.

const f = Math.fround;
const BLOCK = 4096; // pixels of the image worked on at once
const RESPONSES = 1 << 20; // responses of the feature unification worked on at once
const PAIRS = 1 << 21; // pairs of positions and cells of a strip, where every position sees every cell
const NEVER = -1e4; // added to the score of a key that is not seen
const TILE_OVERHEAD = 16000; // query-key pairs that take as long as starting a tile
const MAX_TILE = 4096; // queries a tile
const MAX_PAIRS = 1 << 20; // query-key pairs a tile

const ceilDivide = (a, b) => Math.floor((a + b - 1) / b);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

// ---- windows along one axis: {keys, queries, span, start: Int32Array, count: Int32Array (queries, span)}

export function paperBounds(queries, keys, ratio) {
  const low = new Int32Array(queries), high = new Int32Array(queries).fill(keys);
  if (ratio <= 0) return { low, high };
  const radius = f(ratio);
  for (let i = 0; i < queries; i++) {
    const centre = f(f(i + 0.5) / f(queries));
    low[i] = Math.floor(f(clamp(f(centre - radius), 0, 1) * f(keys)));
    high[i] = Math.ceil(f(clamp(f(centre + radius), 0, 1) * f(keys)));
    if (high[i] <= low[i]) {
      throw new RangeError(`The window of ${ratio} is so small that some pixels see none of ${keys} cells; use smaller cells.`);
    }
  }
  return { low, high };
}

export function axisWindow(queries, keys, ratio, window = "paper") {
  if (window === "natten") return nattenWindow(queries, keys, ratio);
  const { low, high } = paperBounds(queries, keys, ratio);
  let span = 0;
  for (let i = 0; i < queries; i++) span = Math.max(span, high[i] - low[i]);
  const start = low.map((first) => Math.min(first, keys - span));
  const count = new Int32Array(queries * span);
  for (let i = 0; i < queries; i++) {
    for (let j = low[i]; j < high[i]; j++) count[i * span + j - start[i]] = 1;
  }
  return { keys, queries, span, start, count };
}

function nattenWindow(queries, keys, ratio) {
  const dilation = Math.floor(queries / keys);
  if (dilation < 1) {
    throw new RangeError(`This model needs an output at least as large as the features, not ${queries} for ${keys}.`);
  }
  let kernel = keys;
  if (ratio > 0 && ratio < 0.5) {
    kernel = Math.max(3, roundHalfEven(2 * ratio * keys));
    kernel += kernel % 2 === 0 ? 1 : 0;
  }
  const scale = f(f(keys) / f(queries));
  const source = Int32Array.from({ length: queries }, (_, i) => clamp(Math.floor(f((i + 0.5) * scale)), 0, keys - 1));
  const table = new Int32Array(queries * keys);
  for (let phase = 0; phase < dilation; phase++) {
    const length = ceilDivide(queries - phase, dilation), size = Math.min(kernel, length);
    for (let p = 0; p < length; p++) {
      const first = clamp(p - Math.floor(size / 2), 0, length - size);
      for (let j = first; j < first + size; j++) table[(phase + dilation * p) * keys + source[phase + dilation * j]] += 1;
    }
  }
  return fromDense(table, queries, keys);
}

function fromDense(table, queries, keys) {
  const first = new Int32Array(queries), start = new Int32Array(queries);
  let span = 0;
  for (let i = 0; i < queries; i++) {
    let low = 0, stop = keys;
    while (table[i * keys + low] === 0) low++;
    while (table[i * keys + stop - 1] === 0) stop--;
    first[i] = low;
    span = Math.max(span, stop - low);
  }
  const count = new Int32Array(queries * span);
  for (let i = 0; i < queries; i++) {
    start[i] = Math.min(first[i], keys - span);
    for (let j = 0; j < span; j++) count[i * span + j] = table[i * keys + start[i] + j];
  }
  return { keys, queries, span, start, count };
}

function roundHalfEven(x) {
  const below = Math.floor(x), rest = x - below;
  if (rest !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** Return the half-open range of cells that query i sees. */
export function seen(window, i) {
  let low = 0, stop = window.span;
  while (window.count[i * window.span + low] === 0) low++;
  while (window.count[i * window.span + stop - 1] === 0) stop--;
  return [window.start[i] + low, window.start[i] + stop];
}

// ---- tiles

function extents(window) {
  const low = new Int32Array(window.queries), high = new Int32Array(window.queries);
  for (let i = 0; i < window.queries; i++) [low[i], high[i]] = seen(window, i);
  return { low, high };
}

/** Cut the queries into runs of `size`: {size, runs, span, first, start}; `extent` are the windows' bounds. */
function cutAxis(window, extent, size) {
  const runs = ceilDivide(window.queries, size);
  const first = new Int32Array(runs), start = new Int32Array(runs);
  let span = 0;
  for (let run = 0; run < runs; run++) {
    first[run] = Math.min(run * size, window.queries - size);
    let low = window.keys, high = 0;
    for (let i = first[run]; i < first[run] + size; i++) {
      low = Math.min(low, extent.low[i]);
      high = Math.max(high, extent.high[i]);
    }
    start[run] = low;
    span = Math.max(span, high - low);
  }
  for (let run = 0; run < runs; run++) start[run] = Math.min(start[run], window.keys - span);
  return { size, runs, span, first, start };
}

/** The same with `count`, how often a query of a run sees a key of its slice (runs, size, span). */
export function tileAxis(window, size) {
  const tiles = cutAxis(window, extents(window), size);
  const count = new Int32Array(tiles.runs * size * tiles.span);
  for (let run = 0, to = 0; run < tiles.runs; run++) {
    for (let i = tiles.first[run]; i < tiles.first[run] + size; i++) {
      const offset = window.start[i] - tiles.start[run];
      for (let j = 0; j < tiles.span; j++, to++) {
        const column = j - offset;
        if (column >= 0 && column < window.span) count[to] = window.count[i * window.span + column];
      }
    }
  }
  return { ...tiles, count };
}

function candidates(window, limit) {
  const ratio = Math.max(1, Math.floor(window.queries / window.keys));
  const sizes = new Set([1, ...[1, 2, 3, 4, 6, 8].map((n) => ratio * n), 2, 4, 8, 16, 32, 64]);
  for (let n = 2; n < 97; n++) if (window.queries % n === 0) sizes.add(n);
  sizes.add(Math.min(window.queries, limit));
  const fitting = [...sizes].filter((size) => size <= Math.min(limit, window.queries)).sort((a, b) => a - b);
  return fitting.length ? fitting : [1];
}

/** Return height and width of the tiles that cost least. */
export function planTiles(rows, cols) {
  const extent = extents(cols), rowExtent = extents(rows), known = new Map();
  const wideOf = (width) => {
    if (!known.has(width)) known.set(width, cutAxis(cols, extent, width));
    return known.get(width);
  };
  let best = null;
  for (const height of candidates(rows, MAX_TILE)) {
    const tall = cutAxis(rows, rowExtent, height);
    for (const width of candidates(cols, Math.floor(MAX_TILE / height))) {
      const wide = wideOf(width), pairs = height * width * tall.span * wide.span;
      if (pairs > MAX_PAIRS && height * width > 1) continue;
      const cost = tall.runs * wide.runs * (pairs + TILE_OVERHEAD);
      if (best === null || cost < best.cost) best = { cost, sizes: [height, width] };
    }
  }
  return best.sizes;
}

/** Return a window of a whole number of runs of `size` queries, the last of which repeats as often as needed. */
function lengthened(window, size) {
  const queries = ceilDivide(window.queries, size) * size, { span } = window;
  const start = new Int32Array(queries), count = new Int32Array(queries * span);
  for (let i = 0; i < queries; i++) {
    const from = Math.min(i, window.queries - 1);
    start[i] = window.start[from];
    count.set(window.count.subarray(from * span, (from + 1) * span), i * span);
  }
  return { keys: window.keys, queries, span, start, count };
}

// ---- averages and coordinates

/** Return the bins of an adaptive average pooling: {taps, index, weight}, (out, taps). */
export function poolBins(size, out) {
  const first = range(out).map((i) => Math.floor((i * size) / out));
  const length = range(out).map((i) => ceilDivide((i + 1) * size, out) - first[i]);
  const taps = Math.max(...length);
  const index = new Int32Array(out * taps), weight = new Float32Array(out * taps);
  for (let i = 0; i < out; i++) {
    for (let t = 0; t < taps; t++) {
      index[i * taps + t] = first[i] + (t < length[i] ? t : 0);
      weight[i * taps + t] = t < length[i] ? 1 / length[i] : 0;
    }
  }
  return { taps, index, weight };
}

/** Return the matrix of an adaptive average pooling, (size, out) if it is transposed, otherwise (out, width >= size). */
function pooling(size, out, { transposed = false, width = size } = {}) {
  const { taps, index, weight } = poolBins(size, out);
  const table = new Float32Array(out * width);
  for (let i = 0; i < out; i++) {
    for (let t = 0; t < taps; t++) {
      const key = index[i * taps + t];
      table[transposed ? key * out + i : i * width + key] += weight[i * taps + t];
    }
  }
  return table;
}

function coordinates(n) {
  const step = 1 / (n - 1);
  return Float32Array.from({ length: n }, (_, i) => (i === 0 ? 0 : i === n - 1 ? 1 : i * step));
}

function tapsInBounds(size, kernel) {
  const half = Math.floor(kernel / 2);
  return range(size).map((i) => Math.min(i + half, size - 1) - Math.max(i - half, 0) + 1);
}

function reflection(size) {
  return size === 1 ? [0, 0, 0] : [1, ...range(size), size - 2];
}

// ---- the tables

const ints = (dims, numbers) => ({ type: "int64", dims, data: BigInt64Array.from(numbers, BigInt) });
const vector = (...numbers) => ints([numbers.length], numbers);
const floats = (dims, data) => ({ type: "float32", dims, data });
const flag = (value) => ({ type: "bool", dims: [1], data: Uint8Array.of(value ? 1 : 0) });

/**
 * Return the tables for an image and features of these shapes, NCHW.
 *
 * settings: of the file; image, features: shapes; size: height and width of the output; channels: of the values.
 */
export function onnxTables(settings, image, features, size, channels) {
  return { ...imageTables(settings, image, features), ...attentionTables(settings, image, features, size, channels) };
}

export function imageTables(settings, [batch, , height, width], [, channels, ...cells]) {
  const { qk_dim: dim, kernel_size_lfu: kernel, loops, filters } = settings;
  let blocks = loops ? ceilDivide(batch * height * width, BLOCK) : 1;
  const rows = ceilDivide(height, Math.min(blocks, height));
  blocks = ceilDivide(height, rows);
  const padded = range(blocks * rows).map((i) => Math.min(i, height - 1));
  const shares = new Float32Array(blocks * rows * width).fill(1 / (height * width), 0, height * width);

  const [down, across] = [coordinates(height), coordinates(width)];
  const [rowFreqs, colFreqs] = settings.frequencies.map((row) => Float32Array.from(row));
  const cos = new Float32Array(blocks * dim * rows * 2), sin = new Float32Array(cos.length);
  for (let block = 0, to = 0; block < blocks; block++) {
    for (let d = 0; d < dim; d++) {
      const sign = d < Math.floor(dim / 2) ? -1 : 1;
      for (let row = 0; row < rows; row++, to += 2) {
        const angle = f(down[padded[block * rows + row]] * rowFreqs[d]);
        const [c, s] = [Math.cos(angle), Math.sin(angle)];
        cos.set([c, -s], to);
        sin.set([sign * s, sign * c], to);
      }
    }
  }
  const cols = new Float32Array(dim * 2 * width);
  for (let d = 0; d < dim; d++) {
    for (let x = 0; x < width; x++) {
      const angle = f(across[x] * colFreqs[d]);
      cols[2 * d * width + x] = Math.cos(angle);
      cols[(2 * d + 1) * width + x] = Math.sin(angle);
    }
  }

  const together = loops ? Math.max(1, Math.floor(RESPONSES / (batch * channels * filters * cells[1]))) : cells[0];
  let steps = ceilDivide(cells[0], Math.min(together, cells[0]));
  const described = ceilDivide(cells[0], steps), half = Math.floor(kernel / 2);
  steps = ceilDivide(cells[0], described);
  const [tapRows, tapCols] = cells.map((n) => tapsInBounds(n, kernel));
  const featureShares = new Float32Array(steps * described * cells[1]);
  for (let i = 0, to = 0; i < steps * described; i++) {
    for (let j = 0; j < cells[1]; j++, to++) featureShares[to] = 1 / (tapRows[Math.min(i, cells[0] - 1)] * tapCols[j]);
  }
  const group = described + kernel - 1, reflected = cells.map(reflection);
  return {
    image_rows: vector(...padded),
    block_shape: vector(0, 0, blocks, -1),
    row_shape: vector(0, 0, rows, -1),
    pixel_shares: floats([blocks, rows * width, 1], shares),
    rotation_cos: floats([blocks, dim, rows, 2], cos),
    rotation_sin: floats([blocks, dim, rows, 2], sin),
    rotation_cols: floats([dim, 2, width], cols),
    pool_rows: floats([cells[0], blocks * rows], pooling(height, cells[0], { width: blocks * rows })),
    pool_cols: floats([width, cells[1]], pooling(width, cells[1], { transposed: true })),
    feature_pads: vector(0, 0, half, half, 0, 0, half + steps * described - cells[0], half),
    feature_rows: ints([steps, group], range(steps * group).map((i) => described * Math.floor(i / group) + (i % group))),
    feature_shares: floats([steps, described, cells[1]], featureShares),
    patch_shape: vector(batch * channels, 1, group, cells[1] + kernel - 1),
    response_shape: vector(batch, filters, channels, described, cells[1]),
    cells_shape: vector(0, 0, -1, cells[1]),
    rows_shape: vector(-1, batch, dim, width),
    cell_rows: vector(...range(cells[0])),
    reflected_rows: vector(...reflected[0]),
    reflected_cols: vector(...reflected[1]),
  };
}

export function attentionTables(settings, [batch, , ...sides], [, , ...cells], size, channels) {
  const { num_heads: heads, qk_dim: dim, window_ratio: ratio, window, loops } = settings;
  const windows = [0, 1].map((axis) => axisWindow(size[axis], cells[axis], ratio, window));
  const whole = windows.every((one) => one.span === one.keys && one.count.every((n) => n === 1)); // one tile a strip
  const lengths = whole
    ? [Math.min(size[0], Math.max(1, Math.floor(PAIRS / (size[1] * cells[0] * cells[1])))), size[1]]
    : planTiles(...windows);
  const [tall, wide] = windows.map((one, axis) => tileAxis(lengthened(one, lengths[axis]), lengths[axis]));
  const strips = loops ? 1 : tall.runs, steps = tall.runs / strips;
  const visible = tall.span * wide.span, tile = tall.size * wide.size;
  const bias = (tiles) => Float32Array.from(tiles.count, (n) => (n > 0 ? Math.log(n) : NEVER));

  const { taps, index, weight } = poolBins(sides[0], size[0]);
  const deep = tall.size + 2, rows = new BigInt64Array(tall.runs * deep * taps), shares = new Float32Array(rows.length);
  for (let run = 0, to = 0; run < tall.runs; run++) {
    for (let i = -1; i <= tall.size; i++) {
      const wanted = tall.size * run + i, row = clamp(wanted, 0, size[0] - 1);
      for (let t = 0; t < taps; t++, to++) {
        rows[to] = BigInt(index[row * taps + t]);
        shares[to] = wanted === row ? weight[row * taps + t] : 0;
      }
    }
  }
  const keyRows = range(tall.runs * tall.span).map((i) => cells[1] * (tall.start[Math.floor(i / tall.span)] + (i % tall.span)));
  const keyCols = range(wide.runs * wide.span).map((i) => wide.start[Math.floor(i / wide.span)] + (i % wide.span));
  const resize = sides[1] !== size[1];
  return {
    query_rows: { type: "int64", dims: [steps, strips, deep, taps], data: rows },
    query_row_shares: floats([steps, strips, deep, taps, 1, 1, 1], shares),
    resize_cols: flag(resize),
    query_cols: resize
      ? floats([sides[1], size[1]], pooling(sides[1], size[1], { transposed: true }))
      : floats([1, 1], new Float32Array(1)),
    query_shape: vector(-1, dim, deep, size[1]),
    query_pads: vector(0, 0, 0, 0, 0, 0, 0, wide.runs * wide.size - size[1]),
    tile_shape: vector(-1, dim + 1, tall.size, wide.runs, wide.size),
    key_rows: ints([steps, strips, 1, tall.span, 1], keyRows),
    key_cols: ints([wide.runs, 1, wide.span], keyCols),
    key_shape: vector(strips, wide.runs, visible, batch, heads, dim + 1),
    key_tiles: vector(-1, wide.runs, heads * visible, dim + 1),
    row_bias: floats([steps, strips, 1, tall.size, 1, tall.span, 1], bias(tall)),
    col_bias: floats([wide.runs, 1, wide.size, 1, wide.span], bias(wide)),
    bias_shape: vector(strips, 1, wide.runs, tile, 1, visible),
    score_shape: vector(strips, batch, wide.runs, tile, heads, visible),
    value_shape: vector(strips, wide.runs, visible, batch, channels),
    output_tiles: vector(strips, batch, wide.runs, channels, tall.size, wide.size),
    strip_shape: vector(batch, channels, strips * tall.size, wide.runs * wide.size),
    output_shape: vector(batch, channels, tall.runs * tall.size, size[1]),
    crop_rows: flag(tall.runs * tall.size !== size[0]),
    output_height: vector(size[0]),
    output_width: vector(size[1]),
  };
}

/** Return everything that an exported file takes; `values`, what is averaged, are the features unless given. */
export function onnxInputs(settings, image, features, size = image.dims.slice(2), values = features) {
  return { image, features, values, ...onnxTables(settings, image.dims, features.dims, size, values.dims[1]) };
}

// ---- the metadata of an ONNX file, field 14 of its protocol buffer

const CUT_OFF = "this is no whole ONNX file; export it or copy it again.";

/** Return the metadata of a file's bytes (Uint8Array) as an object of texts. */
export function readMetadata(bytes) {
  const reader = new Reader(bytes), metadata = {};
  while (reader.at < bytes.length) {
    const tag = reader.varint(), field = Math.floor(tag / 8), kind = tag % 8;
    const length = kind === 0 || kind === 2 ? reader.varint() : ({ 1: 8, 5: 4 }[kind] ?? -1);
    if (kind === 0) continue;
    if (length < 0 || reader.at + length > bytes.length) throw new Error(CUT_OFF);
    if (field === 14 && kind === 2) {
      const [key, value] = entry(bytes.subarray(reader.at, reader.at + length));
      metadata[key] = value;
    }
    reader.at += length;
  }
  return metadata;
}

function entry(bytes) {
  const reader = new Reader(bytes), texts = {};
  while (reader.at < bytes.length) {
    const field = Math.floor(reader.varint() / 8), length = reader.varint();
    texts[field] = new TextDecoder().decode(bytes.subarray(reader.at, reader.at + length));
    reader.at += length;
  }
  return [texts[1] ?? "", texts[2] ?? ""];
}

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  varint() {
    let value = 0, factor = 1;
    for (;;) {
      if (this.at >= this.bytes.length || factor > 2 ** 63) throw new Error(CUT_OFF);
      const byte = this.bytes[this.at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
      factor *= 128;
    }
  }
}
