// Runs encoder and AnyUp away from the page's own thread, and keeps their features for questions about pixels.

import * as maths from "./maths.js";
import { axisWindow, onnxInputs, readMetadata, seen } from "./tables.js";

const IMAGENET = { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
const NO_WEIGHTS = "was not written by `anyup export` for every size; give such a file.";

let ort, files, encoder, model, adapter, last = null;
const answers = { load, weights, run, compare, pick, clear, npy };

let queue = Promise.resolve(); // one question after the other: a session must not be replaced while it runs

self.onmessage = ({ data }) => {
  queue = queue.then(() => answer(data));
};

async function answer({ id, kind, argument }) {
  try {
    const { result, moved = [] } = (await answers[kind](argument)) ?? {};
    self.postMessage({ id, result }, moved);
  } catch (error) {
    self.postMessage({ id, error: describe(error) });
  }
}

function describe(error) {
  const text = typeof error === "number" ? "" : String(error?.message ?? error);
  if (/webgpu|GPUDevice|device .*lost/i.test(text)) return "The GPU gave up; choose a smaller output, or add backend=wasm to the address.";
  const memory = typeof error === "number" || /bad_alloc|out of memory|allocation|Aborted|memory access/i.test(text);
  return memory ? "There is not enough memory for this size; choose a smaller output." : text;
}

// ---- models

/**
 * Fetch and start the models; `threads` is a wish, 0 for half of the processors, which a busy machine has to spare, and so
 * is `backend`: "wasm", "webgpu" for any adapter, or nothing for one that is hardware.
 */
async function load({ threads: wish, backend }) {
  const began = performance.now();
  files = await (await fetch("files.json")).json();
  const runtime = new URL(`runtime/${files.runtime}/`, self.location.href).href;
  adapter = await foundAdapter(backend);
  ort = await import(`${runtime}ort.${adapter ? "jspi" : "wasm"}.bundle.min.mjs`);
  const processors = navigator.hardwareConcurrency || 1;
  const threads = self.crossOriginIsolated ? Math.min(wish || Math.ceil(processors / 2), processors, 8) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = runtime;
  ort.env.logLevel = "error";
  const parts = ["models/lite0.onnx", "models/anyup.onnx", ...(adapter ? ["models/anyup_webgpu.onnx"] : [])], received = parts.map(() => 0);
  const total = parts.reduce((sum, path) => sum + files.sizes[path], 0);
  const contents = await Promise.all(parts.map((path, i) => fetched(path, (bytes) => {
    received[i] = bytes;
    self.postMessage({ progress: received.reduce((a, b) => a + b) / total });
  })));
  const fetchedAt = performance.now();
  encoder = await opened(contents[0], "anyup_encoder");
  model = await opened(contents[1], "anyup");
  if (adapter) model.onGpu = await opened(contents[2], "anyup", "webgpu").catch(() => undefined);
  const times = { fetching: fetchedAt - began, opening: performance.now() - fetchedAt };
  return { result: { threads, gpu: adapter && (model.onGpu ? "used" : "failed"), ...times } };
}

/** Return a GPU adapter, null where there is none that can be used. */
async function foundAdapter(backend) {
  if (backend === "wasm" || !self.navigator.gpu || typeof WebAssembly.Suspending !== "function") return null;
  const found = await self.navigator.gpu.requestAdapter({ powerPreference: "high-performance" }).catch(() => null);
  const software = found?.info?.isFallbackAdapter || /swiftshader|llvmpipe/i.test(`${found?.info?.architecture} ${found?.info?.description}`);
  return found && (backend === "webgpu" || !software) ? found : null;
}

/** Return AnyUp and what it takes: on the GPU, where there is one whose buffers hold the scores of all pixels, else in WASM. */
function modelFor(image, features) {
  if (model.onGpu) {
    const inputs = onnxInputs(model.onGpu.settings, image, features);
    const scores = inputs.score_shape.data.reduce((size, n) => size * n, 4n);
    if (scores <= BigInt(adapter.limits.maxStorageBufferBindingSize)) return { used: model.onGpu, inputs };
  }
  return { used: model, inputs: onnxInputs(model.settings, image, features) };
}

async function fetched(path, report) {
  const response = await fetch(`${path}?v=${files.files[path]}`);
  if (!response.ok) throw new Error(`${path} could not be fetched; reload the page.`);
  const bytes = new Uint8Array(files.sizes[path]), reader = response.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes.length) throw new Error(`${path} has changed; reload the page.`);
    bytes.set(value, at);
    at += value.length;
    report(at);
  }
  return bytes;
}

async function opened(bytes, entry, provider = "wasm") {
  const settings = JSON.parse(readMetadata(bytes)[entry]);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], logSeverityLevel: 3 });
  return { session, settings };
}

/** Replace AnyUp by an exported file. */
async function weights({ name, bytes }) {
  let metadata;
  try {
    metadata = readMetadata(new Uint8Array(bytes));
  } catch {
    throw new Error(`${name} is no whole ONNX file; export it or copy it again.`);
  }
  const settings = JSON.parse(metadata.anyup ?? "null");
  if (!settings?.frequencies) throw new Error(`${name} ${NO_WEIGHTS}`);
  if (settings.input_dim !== 3) throw new Error(`${name} takes images of ${settings.input_dim} channels, not photographs.`);
  let next;
  try {
    next = await opened(new Uint8Array(bytes), "anyup");
  } catch {
    throw new Error(`${name} is damaged or ${NO_WEIGHTS}`);
  }
  await Promise.all([model.session.release(), model.onGpu?.session.release()]);
  model = next; // in WASM: what `anyup export` writes has loops, which leave the GPU
  return { result: settings };
}

// ---- a picture

/** Return the three pictures of features, and the timings; `seen` and `guide` are ImageData, `stride` is 16 or 32. */
async function run({ seen: pixels, guide, stride }) {
  last = null;
  const times = [];
  const timed = async (name, work) => {
    const began = performance.now(), value = await work();
    times.push([name, performance.now() - began]);
    return value;
  };
  const features = await timed("Encoder", async () => {
    const image = normalized(pixels, encoder.settings);
    const found = await encoder.session.run({ image: new ort.Tensor("float32", image.data, image.dims) }, [`stride${stride}`]);
    return map(Object.values(found)[0]);
  });
  const size = [guide.height, guide.width], dims = [1, features.channels, features.height, features.width];
  const { used, inputs } = await timed("Tables", () => modelFor(normalized(guide, IMAGENET), { type: "float32", dims, data: features.data }));
  const output = await timed(used === model ? "AnyUp" : "AnyUp on the GPU", async () => {
    const feeds = {};
    for (const [name, { type = "float32", data, dims }] of Object.entries(inputs)) feeds[name] = new ort.Tensor(type, data, dims);
    return map((await used.session.run(feeds)).hr);
  });
  const pictures = await timed("Pictures", () => {
    const basis = maths.principal(features);
    const low = maths.project(features, basis), fine = maths.project(output, basis);
    return maths.colours([low, maths.bilinear(low, size), fine], [low, fine]);
  });
  const { window_ratio: ratio, window } = model.settings;
  const windows = [axisWindow(size[0], features.height, ratio, window), axisWindow(size[1], features.width, ratio, window)];
  last = { features, output, size, windows, photograph: guide.data, seeds: [], norms: null };
  const [low, bilinear, anyup] = pictures;
  return moving({ low, bilinear, anyup, times, channels: features.channels });
}

function map({ data, dims: [, channels, height, width] }) {
  return { data, channels, height, width };
}

function normalized({ data, width, height }, { mean, std }) {
  const n = width * height, out = new Float32Array(3 * n);
  for (let c = 0; c < 3; c++) {
    for (let p = 0; p < n; p++) out[c * n + p] = (data[4 * p + c] / 255 - mean[c]) / std[c];
  }
  return { data: out, dims: [1, 3, height, width] };
}

function moving({ low, bilinear, anyup, ...rest }) {
  return { result: { low, bilinear, anyup, ...rest }, moved: [low, bilinear, anyup].map((picture) => picture.data.buffer) };
}

// ---- pixels of it

/** Return the cells that a pixel sees and its similarities to every position of the three maps. */
function compared({ x, y }) {
  const { features, output, size, windows } = last;
  last.norms ??= [maths.norms(features), maths.bilinearNorms(features, size), maths.norms(output)];
  const [lowNorms, bilinearNorms, outputNorms] = last.norms;
  const cell = [Math.floor((y * features.height) / size[0]), Math.floor((x * features.width) / size[1])];
  const between = blended(features, size, y, x);
  return {
    low: maths.similarity(features, maths.feature(features, ...cell), lowNorms),
    bilinear: maths.bilinearSimilarity(features, between, bilinearNorms, size),
    anyup: maths.similarity(output, maths.feature(output, y, x), outputNorms),
    window: windows.map((window, axis) => seen(window, axis === 0 ? y : x)),
  };
}

function blended(features, size, y, x) {
  const row = maths.interpolation(features.height, size[0])[y], col = maths.interpolation(features.width, size[1])[x];
  const [a, b, c, d] = [[row.low, col.low], [row.low, col.high], [row.high, col.low], [row.high, col.high]].map((at) => maths.feature(features, ...at));
  return a.map((_, i) => (1 - row.share) * ((1 - col.share) * a[i] + col.share * b[i]) + row.share * ((1 - col.share) * c[i] + col.share * d[i]));
}

function compare(pixel) {
  if (!last) return { result: null };
  const found = compared(pixel), { features, size } = last, { anyup } = found;
  const alike = anyup.reduce((sum, value) => sum + (value > 0.8 ? 1 : 0), 0) / anyup.length;
  return moving({
    low: maths.heat(found.low, features.height, features.width),
    bilinear: maths.heat(found.bilinear, ...size),
    anyup: maths.heat(anyup, ...size),
    window: found.window,
    cells: [features.height, features.width],
    alike,
  });
}

/** Add a pixel to those whose segments are shown. */
function pick(pixel) {
  if (!last) return { result: null };
  if (last.seeds.length === maths.SEEDS.length) throw new Error(`There are ${maths.SEEDS.length} segments, no more are possible; clear them first.`);
  last.seeds.push(compared(pixel));
  const { features, size, photograph, seeds, windows } = last;
  const segments = (map, ...drawn) => maths.painted(maths.segments(seeds.map((seed) => seed[map])), ...drawn);
  return moving({
    low: segments("low", features.height, features.width, null),
    bilinear: segments("bilinear", ...size, photograph),
    anyup: segments("anyup", ...size, photograph),
    window: [seen(windows[0], pixel.y), seen(windows[1], pixel.x)],
    cells: [features.height, features.width],
    colour: maths.SEEDS[seeds.length - 1],
  });
}

function clear() {
  if (last) last.seeds = [];
}

/** Return the upsampled features as a NumPy file, (1, C, H, W) float32. */
function npy() {
  if (!last) throw new Error("There are no features yet.");
  const { data, channels, height, width } = last.output;
  return { result: new Blob(maths.npy(data, [1, channels, height, width]), { type: "application/octet-stream" }) };
}
