// Feature maps as colours and similarities. A map is {data: Float32Array, channels, height, width}, channel by channel.

/** Return the mean and the first three principal components of a map's positions: {mean, components: [3 of channels]}. */
export function principal({ data, channels, height, width }) {
  const n = height * width, mean = new Float64Array(channels), x = new Float64Array(channels * n);
  for (let c = 0; c < channels; c++) {
    let sum = 0;
    for (let p = 0; p < n; p++) sum += data[c * n + p];
    mean[c] = sum / n;
    for (let p = 0; p < n; p++) x[c * n + p] = data[c * n + p] - mean[c];
  }
  // the smaller of the two Gram matrices has the same eigenvalues
  const byPosition = n < channels, m = Math.min(n, channels);
  const gram = new Float64Array(m * m);
  for (let i = 0; i < m; i++) {
    for (let j = i; j < m; j++) {
      let sum = 0;
      if (byPosition) for (let c = 0; c < channels; c++) sum += x[c * n + i] * x[c * n + j];
      else for (let p = 0; p < n; p++) sum += x[i * n + p] * x[j * n + p];
      gram[i * m + j] = gram[j * m + i] = sum;
    }
  }
  const components = eigenvectors(gram, m, 3).map((vector) => {
    let component = vector;
    if (byPosition) {
      component = new Float64Array(channels);
      for (let c = 0; c < channels; c++) for (let p = 0; p < n; p++) component[c] += x[c * n + p] * vector[p];
    }
    const length = Math.hypot(...component), largest = component.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    return component.map((value) => (length > 0 ? (value / length) * Math.sign(largest) : 0));
  });
  while (components.length < 3) components.push(new Float64Array(channels));
  return { mean, components };
}

/** Return the eigenvectors of the largest eigenvalues of a symmetric matrix, by iteration on a block of vectors. */
function eigenvectors(matrix, m, wanted) {
  const block = Math.min(m, wanted + 5);
  let vectors = Array.from({ length: block }, (_, k) => Float64Array.from({ length: m }, (_, i) => Math.sin((k + 1) * (i + 1))));
  const times = (v) => {
    const out = new Float64Array(m);
    for (let i = 0; i < m; i++) {
      let sum = 0;
      for (let j = 0; j < m; j++) sum += matrix[i * m + j] * v[j];
      out[i] = sum;
    }
    return out;
  };
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  for (let step = 0; step < 60; step++) {
    vectors = vectors.map(times);
    for (let k = 0; k < vectors.length; k++) {
      for (let pass = 0; pass < 2; pass++) {
        for (let l = 0; l < k; l++) {
          const share = dot(vectors[k], vectors[l]);
          for (let i = 0; i < m; i++) vectors[k][i] -= share * vectors[l][i];
        }
      }
      const length = Math.sqrt(dot(vectors[k], vectors[k]));
      vectors[k] = vectors[k].map((value) => (length > 1e-30 ? value / length : 0));
    }
  }
  // within the block the matrix is small: turn its vectors to the eigenvectors
  const small = vectors.map((v) => times(v)).map((image) => vectors.map((v) => dot(v, image)));
  const { values, turned } = jacobi(small);
  const order = values.map((value, i) => i).sort((a, b) => values[b] - values[a]);
  const least = 1e-12 * Math.max(...values, 0);
  return order.slice(0, wanted).filter((i) => values[i] > least).map((i) => {
    const out = new Float64Array(m);
    for (let k = 0; k < block; k++) for (let p = 0; p < m; p++) out[p] += turned[k][i] * vectors[k][p];
    return out;
  });
}

function jacobi(a) {
  const n = a.length, v = a.map((_, i) => a.map((_, j) => (i === j ? 1 : 0)));
  for (let sweep = 0; sweep < 30; sweep++) {
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        if (Math.abs(a[p][q]) < 1e-300) continue;
        const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1)), c = 1 / Math.hypot(t, 1), s = t * c;
        for (let k = 0; k < n; k++) [a[k][p], a[k][q]] = [c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]];
        for (let k = 0; k < n; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
        for (let k = 0; k < n; k++) [v[k][p], v[k][q]] = [c * v[k][p] - s * v[k][q], s * v[k][p] + c * v[k][q]];
      }
    }
  }
  return { values: a.map((row, i) => row[i]), turned: v };
}

/** Return three maps in one: the coordinates of every position in a basis. */
export function project(map, { mean, components }) {
  const out = components.map((component) => {
    const values = weighted(map, component);
    const offset = component.reduce((sum, value, c) => sum + value * mean[c], 0);
    return values.map((value) => value - offset);
  });
  return { data: concatenated(out), channels: 3, height: map.height, width: map.width };
}

/** Return the sum of a map's channels, weighted. */
function weighted({ data, channels, height, width }, weights) {
  const n = height * width, out = new Float32Array(n);
  for (let c = 0; c < channels; c++) {
    const weight = weights[c], from = c * n;
    for (let p = 0; p < n; p++) out[p] += weight * data[from + p];
  }
  return out;
}

function concatenated(arrays) {
  const out = new Float32Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let at = 0;
  for (const array of arrays) {
    out.set(array, at);
    at += array.length;
  }
  return out;
}

/** Return RGBA pictures of maps of three channels, in one range for all `of`: their 1st to 99th percentile. */
export function colours(maps, of) {
  const range = [0, 1, 2].map((c) => {
    let low = Infinity, high = -Infinity;
    for (const { data, height, width } of of) {
      const sorted = data.slice(c * height * width, (c + 1) * height * width).sort(), last = sorted.length - 1;
      low = Math.min(low, sorted[Math.round(0.01 * last)]);
      high = Math.max(high, sorted[Math.round(0.99 * last)]);
    }
    return [low, high];
  });
  return maps.map(({ data, height, width }) => {
    const n = height * width, out = new Uint8ClampedArray(4 * n);
    for (let c = 0; c < 3; c++) {
      const [low, high] = range[c];
      for (let p = 0; p < n; p++) out[4 * p + c] = high > low ? (255 * (data[c * n + p] - low)) / (high - low) : 128;
    }
    for (let p = 0; p < n; p++) out[4 * p + 3] = 255;
    return { data: out, height, width };
  });
}

/** Return the two neighbours of every position of an axis and the share of the second; edges are held. */
export function interpolation(cells, size) {
  return Array.from({ length: size }, (_, i) => {
    const at = Math.min(Math.max(((i + 0.5) * cells) / size - 0.5, 0), cells - 1), low = Math.floor(at);
    return { low, high: Math.min(low + 1, cells - 1), share: at - low };
  });
}

export function bilinear({ data, channels, height, width }, [tall, wide]) {
  const rows = interpolation(height, tall), cols = interpolation(width, wide);
  const out = new Float32Array(channels * tall * wide), between = new Float32Array(wide);
  for (let c = 0, to = 0; c < channels; c++) {
    const plane = data.subarray(c * height * width, (c + 1) * height * width);
    for (const { low, high, share } of rows) {
      for (let x = 0; x < width; x++) between[x] = (1 - share) * plane[low * width + x] + share * plane[high * width + x];
      for (const col of cols) out[to++] = (1 - col.share) * between[col.low] + col.share * between[col.high];
    }
  }
  return { data: out, channels, height: tall, width: wide };
}

export function norms({ data, channels, height, width }) {
  const n = height * width, out = new Float32Array(n);
  for (let c = 0; c < channels; c++) for (let p = 0, at = c * n; p < n; p++, at++) out[p] += data[at] * data[at];
  return out.map(Math.sqrt);
}

/** Return the lengths of a map's features once they are interpolated, without holding these. */
export function bilinearNorms(map, size) {
  const n = map.height * map.width, out = new Float32Array(size[0] * size[1]);
  for (let c = 0; c < map.channels; c++) {
    const plane = { ...map, data: map.data.subarray(c * n, (c + 1) * n), channels: 1 };
    const fine = bilinear(plane, size).data;
    for (let p = 0; p < out.length; p++) out[p] += fine[p] * fine[p];
  }
  return out.map(Math.sqrt);
}

/** Return the feature at a position. */
export function feature({ data, channels, height, width }, y, x) {
  return Float32Array.from({ length: channels }, (_, c) => data[c * height * width + y * width + x]);
}

/** Return the cosine similarity of a feature to all of a map; `lengths` are the map's norms. */
export function similarity(map, query, lengths) {
  return cosines(weighted(map, query), Math.hypot(...query), lengths);
}

/** Return the same for the interpolated map: products are interpolated instead of features. */
export function bilinearSimilarity(map, query, lengths, size) {
  const products = { data: weighted(map, query), channels: 1, height: map.height, width: map.width };
  return cosines(bilinear(products, size).data, Math.hypot(...query), lengths);
}

function cosines(products, length, lengths) {
  return products.map((product, p) => product / Math.max(length * lengths[p], 1e-12));
}

const STOPS = [[13, 8, 42], [71, 32, 99], [141, 52, 105], [205, 85, 85], [243, 148, 84], [252, 238, 176]];

/** Return the RGBA picture of similarities from 0 to 1. */
export function heat(values, height, width) {
  const table = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[low].map((value, c) => value + (at - low) * (STOPS[low + 1][c] - value));
  });
  const out = new Uint8ClampedArray(4 * values.length).fill(255);
  for (let p = 0; p < values.length; p++) out.set(table[Math.round(255 * Math.min(Math.max(values[p], 0), 1))], 4 * p);
  return { data: out, height, width };
}

export const SEEDS = [[230, 97, 60], [56, 133, 201], [95, 173, 86], [240, 185, 66], [148, 103, 189], [64, 178, 175], [214, 102, 160], [140, 110, 84]];

/** Return the number of the map that is largest at every position. */
export function segments(maps) {
  return Uint8Array.from(maps[0], (_, p) => {
    let best = 0;
    for (let k = 1; k < maps.length; k++) if (maps[k][p] > maps[best][p]) best = k;
    return best;
  });
}

/** Return the RGBA picture of the numbers of segments, over a photograph of the same size where there is one. */
export function painted(labels, height, width, photograph) {
  const out = new Uint8ClampedArray(4 * height * width).fill(255);
  for (let p = 0; p < height * width; p++) {
    const grey = photograph ? (photograph[4 * p] + 2 * photograph[4 * p + 1] + photograph[4 * p + 2]) / 4 : 0;
    const share = photograph ? 0.35 : 0;
    for (let c = 0; c < 3; c++) out[4 * p + c] = share * grey + (1 - share) * SEEDS[labels[p] % SEEDS.length][c];
  }
  return { data: out, height, width };
}

/** Return the parts of a NumPy file of a float32 array. */
export function npy(data, shape) {
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const header = text.padEnd(Math.ceil((text.length + 11) / 64) * 64 - 11) + "\n";
  const start = new Uint8Array(10 + header.length);
  start.set([0x93, ...[..."NUMPY"].map((c) => c.charCodeAt(0)), 1, 0, header.length & 255, header.length >> 8]);
  start.set(new TextEncoder().encode(header), 10);
  return [start, data];
}
