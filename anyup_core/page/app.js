// The page: pictures in, panels out. What computes is worker.js.

import { Refused, decode, scaled, sizes } from "./picture.js";

const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const stage = $("#stage");
const MAPS = ["low", "bilinear", "anyup"];
const DEFAULTS = { stride: "16", side: "224", mode: "compare", split: "50" };

let bitmap = null, name = "", size = null, colours = null, cursor = null, pointing = false, running = false, again = false;

// ---- the worker

const worker = { calls: new Map(), count: 0, thread: null };

function ask(kind, argument, moved = []) {
  return new Promise((resolve, reject) => {
    const id = ++worker.count;
    worker.calls.set(id, { resolve, reject });
    worker.thread.postMessage({ id, kind, argument }, moved);
  });
}

function startWorker() {
  worker.thread = new Worker("worker.js", { type: "module" });
  worker.thread.onmessage = ({ data: { id, result, error, progress } }) => {
    if (progress !== undefined) {
      $("#progress").value = progress;
      return;
    }
    const { resolve, reject } = worker.calls.get(id);
    worker.calls.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Refused(error));
  };
  worker.thread.onerror = (event) => {
    for (const { reject } of worker.calls.values()) reject(new Refused(event.message || "The page is incomplete; reload it."));
    worker.calls.clear();
  };
}

// ---- what the page says

function say(text) {
  $("#status").textContent = text;
}

function complain(error) {
  if (!(error instanceof Refused)) console.error(error);
  $("#error").textContent = error.message;
  $("#error").hidden = false;
}

const underway = new Set();

/** Do something; where it fails, say so in one sentence. */
async function trying(work) {
  $("#error").hidden = true;
  const promise = work().catch(complain);
  underway.add(promise);
  const result = await promise;
  underway.delete(promise);
  return result;
}

/** Wait until nothing is underway. */
async function idle() {
  await window.anyup.ready;
  while (underway.size) await Promise.all(underway);
}

// ---- settings, which the address keeps

const chosen = (field) => $(`input[name="${field}"]:checked`).value;

const addressed = () => ({ ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });

function readAddress() {
  const given = addressed();
  for (const field of ["stride", "side", "mode"]) {
    const input = all(`input[name="${field}"]`).find((one) => one.value === given[field]);
    if (input) input.checked = true;
  }
  const split = Number(given.split);
  $("#split").value = Number.isFinite(split) ? split : DEFAULTS.split;
  showSplit();
}

function writeAddress() {
  const settings = { stride: chosen("stride"), side: chosen("side"), mode: chosen("mode"), split: $("#split").value };
  const { threads } = addressed();
  if (threads) settings.threads = threads;
  history.replaceState(null, "", `#${new URLSearchParams(settings)}`);
}

function showSplit() {
  stage.style.setProperty("--split", `${$("#split").value}%`);
}

// ---- pictures in

async function open(file) {
  await trying(async () => {
    if (/\.onnx$/i.test(file.name ?? "")) {
      say(`Opening ${file.name} …`);
      const bytes = await file.arrayBuffer();
      try {
        await ask("weights", { name: file.name, bytes }, [bytes]);
      } catch (error) {
        say("The weights are as they were.");
        throw error;
      }
      name = name || file.name;
      say(`${file.name} is in use.`);
      await update();
      return;
    }
    const next = await decode(file);
    bitmap?.close();
    [bitmap, name] = [next, file.name || "the picture"];
    await update();
  });
}

async function example() {
  await trying(async () => {
    const response = await fetch("example.png");
    if (!response.ok) throw new Refused("The example could not be fetched; choose a picture of your own.");
    await open(new File([await response.blob()], "example.png", { type: "image/png" }));
  });
}

async function update() {
  if (!bitmap) return;
  if (running) {
    again = true;
    return;
  }
  running = true;
  try {
    do {
      again = false;
      await compute();
    } while (again);
  } finally {
    running = false;
    document.body.removeAttribute("aria-busy");
  }
}

async function compute() {
  const plan = sizes(bitmap.width, bitmap.height, Number(chosen("side")));
  const [seen, guide] = [scaled(bitmap, plan.seen), scaled(bitmap, plan.output)];
  document.body.setAttribute("aria-busy", "true");
  forget();
  colours = null;
  size = { width: guide.width, height: guide.height };
  document.documentElement.style.setProperty("--ratio", size.width / size.height);
  draw("image", guide);
  say(`Upsampling to ${size.width} × ${size.height} …`);
  window.anyup.pixels = { seen, guide };
  let result;
  try {
    result = await ask("run", { seen, guide, stride: Number(chosen("stride")) });
  } catch (error) {
    say("There is no result for this picture.");
    throw error;
  }
  colours = Object.fromEntries(MAPS.map((map) => [map, result[map]]));
  showColours();
  for (const id of ["#png", "#npy"]) $(id).disabled = false;
  $("#grid").textContent = `${result.low.width} × ${result.low.height}`;
  showTimes(result.times);
  const total = result.times.reduce((sum, [, time]) => sum + time, 0);
  say(`${name}: ${result.channels} channels, from ${result.low.width} × ${result.low.height} cells to ${size.width} × ${size.height} pixels in ${seconds(total)}.`);
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(2)} s`;

function showTimes(times) {
  const rows = [...window.anyup.loading, ...times].map(([what, time]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
    head.scope = "row";
    [head.textContent, cell.textContent] = [what, seconds(time)];
    row.append(head, cell);
    return row;
  });
  $("#timings tbody").replaceChildren(...rows);
  $("#timings").hidden = false;
  window.anyup.times = Object.fromEntries(times);
}

// ---- panels

function draw(map, picture) {
  const image = picture instanceof ImageData ? picture : new ImageData(picture.data, picture.width, picture.height);
  for (const canvas of all(`canvas[data-map="${map}"]`)) {
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

function showColours() {
  if (colours) for (const map of MAPS) draw(map, colours[map]);
}

function forget() {
  cursor = null;
  shown = null;
  for (const mark of all(".window, .pixel")) mark.hidden = true;
  for (const seeds of all(".seeds")) seeds.replaceChildren();
  $("#clear").disabled = true;
}

function showPixel({ x, y }, { window: [rows, cols], cells: [height, width] }) {
  for (const mark of all(".pixel")) {
    mark.hidden = false;
    Object.assign(mark.style, place(x, y));
  }
  for (const mark of all(".window")) {
    mark.hidden = false;
    Object.assign(mark.style, {
      left: percent(cols[0] / width),
      width: percent((cols[1] - cols[0]) / width),
      top: percent(rows[0] / height),
      height: percent((rows[1] - rows[0]) / height),
    });
  }
}

const percent = (share) => `${(100 * share).toFixed(3)}%`;
const place = (x, y) => ({ left: percent((x + 0.5) / size.width), top: percent((y + 0.5) / size.height) });
const cellsSeen = ({ window: [rows, cols] }) => `${cols[1] - cols[0]} × ${rows[1] - rows[0]} cells`;

// the newest pixel wins: one question at a time, and those in between are dropped
let asked = false, wanted = null, shown = null;

async function compare(pixel) {
  wanted = pixel;
  if (asked) return;
  asked = true;
  while (wanted) {
    const next = wanted;
    wanted = null;
    const result = await trying(() => ask("compare", next));
    if (!result || !colours || !pointing) continue;
    shown = next;
    for (const map of MAPS) draw(map, result[map]);
    showPixel(next, result);
    $("#clear").disabled = false;
    say(`Pixel ${next.x}, ${next.y}: made of ${cellsSeen(result)}; ${Math.round(100 * result.alike)} % of the picture is similar above 0.8.`);
  }
  asked = false;
}

async function pick(pixel) {
  const result = await trying(() => ask("pick", pixel));
  if (!result) return;
  for (const map of MAPS) draw(map, result[map]);
  showPixel(pixel, result);
  for (const seeds of all(".seeds")) {
    const mark = document.createElement("b");
    Object.assign(mark.style, place(pixel.x, pixel.y), { background: `rgb(${result.colour})` });
    seeds.append(mark);
  }
  $("#clear").disabled = false;
  const count = stage.querySelectorAll(".seeds b").length;
  say(`${count} ${count === 1 ? "segment; pick another pixel" : "segments"}: pixel ${pixel.x}, ${pixel.y}, made of ${cellsSeen(result)}.`);
}

async function clear() {
  pointing = false;
  wanted = null;
  await ask("clear");
  forget();
  showColours();
}

// ---- pointing

function pixelAt(event, frame) {
  const box = frame.getBoundingClientRect();
  const at = (position, start, length, n) => Math.min(Math.max(Math.floor(((position - start) / length) * n), 0), n - 1);
  return { x: at(event.clientX, box.left, box.width, size.width), y: at(event.clientY, box.top, box.height, size.height) };
}

function point(pixel) {
  if (!colours || running) return;
  cursor = pixel;
  if (chosen("mode") === "compare") {
    pointing = true;
    compare(pixel);
  }
}

for (const frame of all(".frame")) {
  frame.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse" && size) point(pixelAt(event, frame));
  });
  frame.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && chosen("mode") === "compare" && shown) clear();
  });
  frame.addEventListener("click", (event) => {
    if (!size || !colours || running) return;
    point(pixelAt(event, frame));
    if (chosen("mode") === "segment") pick(cursor);
  });
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

stage.addEventListener("keydown", async (event) => {
  if (!colours || running) return;
  if (event.key === "Escape") {
    await clear();
    say("Cleared.");
  } else if (event.key === "Enter" || event.key === " ") {
    const pixel = cursor ?? centre();
    event.preventDefault();
    if (chosen("mode") !== "segment") {
      await clear();
      choose("mode", "segment");
    }
    cursor = pixel;
    await pick(pixel);
  } else if (STEPS[event.key]) {
    event.preventDefault();
    const [dx, dy] = STEPS[event.key].map((step) => step * (event.shiftKey ? 10 : 1)), from = cursor ?? centre();
    const next = { x: bounded(from.x + dx, size.width), y: bounded(from.y + dy, size.height) };
    point(next);
    if (chosen("mode") === "segment") {
      for (const mark of all(".pixel")) {
        mark.hidden = false;
        Object.assign(mark.style, place(next.x, next.y));
      }
      say(`Pixel ${next.x}, ${next.y}.`);
    }
  }
});

const centre = () => ({ x: size.width >> 1, y: size.height >> 1 });
const bounded = (value, n) => Math.min(Math.max(value, 0), n - 1);

function choose(field, value) {
  $(`input[name="${field}"][value="${value}"]`).checked = true;
  showMode();
  writeAddress();
}

function showMode() {
  $("#explain").textContent = chosen("mode") === "compare"
    ? "The frame is the window of cells that the pixel is made of. Bright is similar: the cosine of the features, from 0 to 1."
    : "Every pixel takes the colour of the picked one that its feature is most similar to.";
}

// ---- ways in and out

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name.replace(/\.[^.]*$/, "").replace(/[^\w-]+/g, "_") || "features"}_anyup.${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

$("#png").addEventListener("click", () => stage.querySelector('canvas[data-map="anyup"]').toBlob((blob) => save(blob, "png")));
$("#npy").addEventListener("click", () => trying(async () => save(await ask("npy"), "npy")));
$("#clear").addEventListener("click", () => clear().then(() => say("Cleared.")));
$("#link").addEventListener("click", () => trying(async () => {
  writeAddress();
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link to this page with its settings is in the clipboard.");
  } catch {
    say("The address above is the link: it keeps the settings.");
  }
}));

$("#choose").addEventListener("click", () => $("#file").click());
$("#file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) open(file);
});
$("#example").addEventListener("click", example);

addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])][0];
  if (file) open(file);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file) open(file);
});

for (const input of all('input[name="stride"], input[name="side"]')) {
  input.addEventListener("change", () => {
    writeAddress();
    trying(update);
  });
}
for (const input of all('input[name="mode"]')) {
  input.addEventListener("change", async () => {
    showMode();
    writeAddress();
    await clear();
  });
}
$("#split").addEventListener("input", showSplit);
$("#split").addEventListener("change", writeAddress);
addEventListener("hashchange", () => {
  readAddress();
  showMode();
  trying(update);
});

// ---- camera

let stream = null;

$("#camera").hidden = !navigator.mediaDevices?.getUserMedia;
$("#camera").addEventListener("click", () => trying(async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    throw new Refused("The camera is not available; allow it for this page, or choose a picture.");
  }
  $("#video").srcObject = stream;
  $("#taking").showModal();
}));
$("#take").addEventListener("click", () => trying(async () => {
  const next = await createImageBitmap($("#video"));
  $("#taking").close();
  bitmap?.close();
  [bitmap, name] = [next, "camera"];
  await update();
}));
$("#cancel").addEventListener("click", () => $("#taking").close());
$("#taking").addEventListener("close", () => stream?.getTracks().forEach((track) => track.stop()));

// ---- start

/** Install the service worker. Returns whether the page is about to load again, isolated, so that there are threads. */
async function isolate() {
  if (!navigator.serviceWorker || !isSecureContext) return false;
  try {
    await navigator.serviceWorker.register("sw.js");
    if (crossOriginIsolated || sessionStorage.getItem("isolating")) {
      sessionStorage.removeItem("isolating");
      return false;
    }
    const late = new Promise((resolve) => setTimeout(resolve, 5000));
    if (!(await Promise.race([navigator.serviceWorker.ready, late]))) return false;
    sessionStorage.setItem("isolating", "yes");
  } catch {
    return false; // private windows may have neither; then there is one thread
  }
  location.reload();
  return true;
}

async function start() {
  readAddress();
  showMode();
  if (await isolate()) return new Promise(() => {});
  startWorker();
  say("Loading encoder and AnyUp …");
  $("#progress").hidden = false;
  try {
    const { threads, fetching, opening } = await ask("load", { threads: Number(addressed().threads) || 0 });
    window.anyup.threads = threads;
    window.anyup.loading = [["Download", fetching], ["Start", opening]];
    say(`Ready, with ${threads} ${threads === 1 ? "thread" : "threads"}.`);
  } catch (error) {
    complain(error);
    say("The page cannot start.");
    return undefined;
  } finally {
    $("#progress").hidden = true;
  }
  if (!bitmap) await example();
  else await trying(update);
  return undefined;
}

/** For tests and consoles: `await anyup.open(file)`, `await anyup.idle()`; `pixels` are what the models saw. */
window.anyup = { open, ask, idle, loading: [], times: {}, pixels: null, threads: 0 };
window.anyup.ready = start();
