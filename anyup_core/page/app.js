// The page: pictures in, panels out. What computes is an engine: local.js in this browser, server.js on this computer.

import { startLocal } from "./local.js";
import { Refused } from "./picture.js";
import { startServer } from "./server.js";

const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const stage = $("#stage");
const MAPS = ["low", "bilinear", "anyup"];
const METHODS = { anyup: "AnyUp", jafar: "JAFAR", featup: "FeatUp", loftup: "LoftUp", naf: "NAF", joint_bilateral: "joint bilateral" };

const WISHES = ["threads", "backend"]; // of the address, of which the page has no fields

let engine = null, name = "", onDisk = "", size = null, colours = null, cursor = null, pointing = false, running = false, again = false;
let begin;
const begun = new Promise((resolve) => (begin = resolve)); // with an engine, or without one where it failed

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

const fields = () => all("#settings [name], #disk").filter((input) => !input.disabled);
const inputsOf = (field) => fields().filter((input) => input.name === field);
const preset = {};

function chosen(field) {
  const inputs = inputsOf(field);
  return (inputs[0]?.type === "radio" ? inputs.find((input) => input.checked) : inputs[0])?.value;
}

function setField(field, value) {
  const [first] = inputsOf(field);
  if (!first) return;
  if (first.type === "radio") {
    const input = inputsOf(field).find((one) => one.value === value);
    if (input) input.checked = true;
  } else if (first.tagName !== "SELECT" || [...first.options].some((option) => option.value === value)) first.value = value;
}

/** Return the value of every setting, by the names of the fields. */
const settings = () => Object.fromEntries([...new Set(fields().map((input) => input.name))].map((field) => [field, chosen(field)]));

const addressed = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function readAddress() {
  const given = { ...preset, ...addressed() };
  for (const field of Object.keys(settings())) if (field in given) setField(field, given[field]);
  const split = Number(given.split ?? 50);
  $("#split").value = Number.isFinite(split) ? split : 50;
  showSplit();
}

function writeAddress() {
  const kept = Object.entries(settings()).filter(([, value]) => value);
  for (const [wish, value] of Object.entries(addressed())) if (WISHES.includes(wish)) kept.push([wish, value]);
  history.replaceState(null, "", `#${new URLSearchParams([...kept, ["split", $("#split").value]])}`);
}

function showSplit() {
  stage.style.setProperty("--split", `${$("#split").value}%`);
}

/** Show what this engine offers, and keep the fields of the other out of the way. */
function showEngine() {
  for (const part of all("[data-engine]")) {
    const ours = part.dataset.engine === engine.kind;
    part.hidden = !ours;
    for (const input of [part, ...part.querySelectorAll("input, select")]) if ("disabled" in input) input.disabled = !ours;
  }
  if (engine.offers) showOffers(engine.offers);
  Object.assign(preset, settings());
}

function options(values, labels = {}) {
  return values.map((value) => new Option(labels[value] ?? value, value));
}

function showOffers({ pictures, encoders, upsamplers, weightSuffixes, truncated }) {
  $("#file").accept = ["image/*", ...weightSuffixes].join(",");
  $("#disk").replaceChildren(new Option(pictures.length ? "Picture on disk …" : "No pictures on disk", ""), ...options(pictures));
  $("#disk").disabled = !pictures.length;
  if (truncated) $("#disk").append(Object.assign(new Option("Only the first are listed; file=NAME in the address opens any"), { disabled: true }));
  $("#encoders").replaceChildren(...options(encoders));
  $("#upsampler").replaceChildren(...options(Object.keys(upsamplers), METHODS));
  showWeights();
}

/** Offer the weights of the chosen upsampler, those with a name and those on disk. */
function showWeights() {
  const { upsamplers, weightFiles } = engine.offers, { names, weightless } = upsamplers[chosen("upsampler")];
  $("#weight-files").replaceChildren(...options(weightFiles));
  $("#weight-names").replaceChildren(...options([...names, ...weightFiles]));
  $("#weights").placeholder = weightless ? "it has none" : names[0] ?? "a file";
}

const methodName = () => METHODS[chosen("upsampler") ?? "anyup"] ?? chosen("upsampler");

function showMethod() {
  for (const part of all("[data-method]")) part.textContent = methodName();
  const keys = "Arrow keys move the pixel, Shift moves faster, Enter picks a pixel for segments, Escape clears.";
  stage.setAttribute("aria-label", `Bilinear and ${methodName()} side by side. ${keys}`);
  $("#split").setAttribute("aria-label", `Border between bilinear and ${methodName()}, percent`);
}

// ---- pictures in

let given = 0, turn = Promise.resolve();

/** Take a picture or weights in, those that were given first before, so that the last one stays. */
async function take(title, ask) {
  given += 1;
  await trying(async () => {
    await begun;
    if (!engine) throw new Refused("The page could not start; reload it.");
    const answer = turn.then(() => {
      say(`Opening ${title} …`);
      return ask();
    });
    turn = answer.catch(() => {});
    let opened;
    try {
      opened = await answer;
    } catch (error) {
      setField("file", onDisk);
      say(engine.ready() ? "Everything is as it was." : "");
      throw error;
    }
    if (opened.weights === undefined) {
      name = opened.name;
      onDisk = opened.file ?? "";
      showOnDisk();
    } else {
      name = name || opened.weights;
      setField("weights", opened.weights);
      if (engine.offers) showWeights();
      say(`${opened.weights} is in use.`);
    }
    if (engine.offers) writeAddress();
    await update();
  });
}

const open = (file) => take(file.name || "the picture", () => engine.open(file));
const openOnDisk = (file) => take(file, () => engine.openOnDisk(file));

/** Choose the picture on disk that is shown, which may be one that is not listed. */
function showOnDisk() {
  const disk = $("#disk");
  if (onDisk && ![...disk.options].some((option) => option.value === onDisk)) disk.append(new Option(onDisk, onDisk));
  if (onDisk) disk.disabled = false;
  setField("file", onDisk);
}

/** Open the files that are dropped or pasted at once: all weights, and one picture. */
async function openAll(files) {
  await trying(async () => {
    await begun;
    const suffixes = $("#file").accept.split(",").filter((part) => part.startsWith("."));
    const isWeights = (file) => suffixes.some((suffix) => file.name.toLowerCase().endsWith(suffix));
    const [picture, ...others] = files.filter((file) => !isWeights(file));
    for (const file of files.filter(isWeights)) await open(file);
    if (picture) await open(picture);
    if (others.length) throw new Refused(`Only ${picture.name} is opened: one picture at a time.`);
  });
}

async function example() {
  await trying(async () => {
    const before = given, file = await engine?.example();
    if (file && given === before) await open(file);
  });
}

async function update() {
  if (!engine?.ready()) return;
  if (running) {
    again = true;
    return;
  }
  running = true;
  try {
    do {
      again = false;
      await compute().catch((error) => {
        if (!again) throw error; // what was asked since may well succeed
      });
    } while (again);
  } finally {
    running = false;
    $(".work").removeAttribute("aria-busy");
  }
}

async function compute() {
  const wanted = settings(), title = name;
  $(".work").setAttribute("aria-busy", "true"); // not the status above it, which would not be read out
  forget();
  colours = null;
  for (const id of ["#png", "#npy"]) $(id).disabled = true;
  showMethod();
  let result;
  try {
    const guide = await engine.prepare(wanted);
    size = { width: guide.width, height: guide.height };
    document.documentElement.style.setProperty("--ratio", size.width / size.height);
    draw("image", guide);
    say(`Upsampling to ${size.width} × ${size.height} …`);
    result = await engine.run(wanted);
  } catch (error) {
    for (const map of MAPS) draw(map, new ImageData(1, 1)); // those of before would stand under the new names
    $("#grid").textContent = "";
    $("#timings").hidden = true;
    say("There is no result for this picture and these settings.");
    throw error;
  }
  colours = Object.fromEntries(MAPS.map((map) => [map, result[map]]));
  showColours();
  for (const id of ["#png", "#npy"]) $(id).disabled = false;
  $("#grid").textContent = `${result.low.width} × ${result.low.height}`;
  showTimes(result.times);
  const total = result.times.reduce((sum, [, time]) => sum + time, 0);
  say(`${title}: ${result.channels} channels, from ${result.low.width} × ${result.low.height} cells to ${size.width} × ${size.height} pixels in ${seconds(total)}.`);
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(2)} s`;

function showTimes(times) {
  const rows = [...engine.loading, ...times].map(([what, time]) => {
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
  view += 1;
  cursor = null;
  shown = null;
  for (const mark of all(".window, .pixel")) mark.hidden = true;
  for (const seeds of all(".seeds")) seeds.replaceChildren();
  $("#clear").disabled = true;
}

function showPixel({ x, y }, { window, cells: [height, width] }) {
  for (const mark of all(".pixel")) {
    mark.hidden = false;
    Object.assign(mark.style, place(x, y));
  }
  if (!window) return;
  const [rows, cols] = window;
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
const madeOf = ({ window }) => (window ? `, made of ${window[1][1] - window[1][0]} × ${window[0][1] - window[0][0]} cells` : "");

// the newest pixel wins: one question at a time, and those in between are dropped
let asked = false, wanted = null, shown = null;
let view = 0; // counts what is marked: an answer that comes after it was forgotten is not shown

async function compare(pixel) {
  wanted = pixel;
  if (asked) return;
  asked = true;
  while (wanted) {
    const next = wanted, before = view;
    wanted = null;
    const result = await trying(() => engine.compare(next));
    if (!result?.anyup || view !== before || !pointing) continue;
    shown = next;
    for (const map of MAPS) draw(map, result[map]);
    showPixel(next, result);
    $("#clear").disabled = false;
    say(`Pixel ${next.x}, ${next.y}${madeOf(result)}: ${Math.round(100 * result.alike)} % of the picture is similar above 0.8.`);
  }
  asked = false;
}

async function pick(pixel) {
  const before = view, result = await trying(() => engine.pick(pixel));
  if (!result?.anyup || view !== before) return;
  for (const map of MAPS) draw(map, result[map]);
  showPixel(pixel, result);
  for (const seeds of all(".seeds")) {
    const mark = document.createElement("b");
    Object.assign(mark.style, place(pixel.x, pixel.y), { background: `rgb(${result.colour})` });
    seeds.append(mark);
  }
  $("#clear").disabled = false;
  const count = stage.querySelectorAll(".seeds b").length;
  say(`${count} ${count === 1 ? "segment; pick another pixel" : "segments"}: pixel ${pixel.x}, ${pixel.y}${madeOf(result)}.`);
}

async function clear() {
  pointing = false;
  wanted = null;
  forget();
  showColours();
  if (engine) await trying(() => engine.clear());
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
  setField(field, value);
  showMode();
  writeAddress();
}

function showMode() {
  $("#explain").textContent = chosen("mode") === "compare"
    ? `${methodName() === "AnyUp" ? "The frame is the window of cells that the pixel is made of. " : ""}Bright is similar: the cosine of the features, from 0 to 1.`
    : "Every pixel takes the colour of the picked one that its feature is most similar to.";
}

// ---- ways in and out

/** Save a blob, or what lies at an address. */
function save(what, suffix) {
  const link = document.createElement("a"), address = typeof what === "string" ? null : URL.createObjectURL(what);
  link.href = address ?? what;
  link.download = `${name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{M}\p{N}_-]+/gu, "_") || "features"}_${chosen("upsampler") ?? "anyup"}.${suffix}`;
  link.click();
  if (address) setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

$("#png").addEventListener("click", () => stage.querySelector('canvas[data-map="anyup"]').toBlob((blob) => save(blob, "png")));
$("#npy").addEventListener("click", () => trying(async () => save(await engine.npy(), "npy")));
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
  openAll([...(event.clipboardData?.files ?? [])]);
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
  openAll([...event.dataTransfer.files]);
});

$("#settings").addEventListener("change", async ({ target }) => {
  if (!target.name) return;
  if (!target.value && preset[target.name]) target.value = preset[target.name]; // no layer is none, not layer 0
  if (target.name === "upsampler") {
    setField("weights", "");
    showWeights();
  }
  showMode();
  writeAddress();
  if (target.name === "mode") await clear();
  else trying(update);
});
$("#settings").addEventListener("submit", (event) => event.preventDefault());
$("#disk").addEventListener("change", () => {
  if (chosen("file")) openOnDisk(chosen("file"));
  else setField("file", onDisk);
});
$("#split").addEventListener("input", showSplit);
$("#split").addEventListener("change", writeAddress);
addEventListener("hashchange", () => {
  if (!engine) return; // which will read it
  const { file } = addressed();
  readAddress();
  if (engine.offers) showWeights();
  showMode();
  if (engine.offers && file && file !== onDisk) openOnDisk(file);
  else trying(update);
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
  $("#take").disabled = true; // until there is a picture
  $("#video").srcObject = stream;
  $("#taking").showModal();
}));
$("#video").addEventListener("loadeddata", () => ($("#take").disabled = false));
$("#take").addEventListener("click", () => trying(async () => {
  const video = $("#video"), canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  $("#taking").close();
  await open(new File([await canvas.convertToBlob()], "camera.png", { type: "image/png" }));
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
  const token = $('meta[name="anyup-server"]')?.content; // which `anyup app` writes
  if (!token && (await isolate())) return new Promise(() => {});
  say("Loading …");
  $("#progress").hidden = false;
  try {
    const report = (share) => ($("#progress").value = share);
    engine = token ? await startServer(token) : await startLocal({ threads: Number(addressed().threads) || 0, backend: addressed().backend }, report);
  } catch (error) {
    complain(error);
    say("The page cannot start.");
    begin();
    return undefined;
  } finally {
    $("#progress").hidden = true;
  }
  window.anyup.engine = engine;
  showEngine();
  readAddress();
  if (engine.offers) showWeights();
  showMethod();
  showMode();
  say(`Ready${engine.note}.`);
  begin();
  const { file } = addressed();
  if (given) return undefined; // while the page started
  if (engine.offers && file) await openOnDisk(file);
  else await example();
  return undefined;
}

/** For tests and consoles: `await anyup.open(file)`, `await anyup.idle()`, `anyup.engine`. */
window.anyup = { open, idle, engine: null, times: {} };
window.anyup.ready = start();
