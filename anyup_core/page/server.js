// The engine of `anyup app`: Python on this computer computes, and this asks it.

import { Refused } from "./picture.js";
import * as maths from "./maths.js";

/** Ask what the server offers. `token` is what it wrote into the page: other pages do not know it. */
export async function startServer(token) {
  const engine = new Server(token);
  engine.offers = await engine.json("offers");
  engine.note = `, computing in Python on this computer (${engine.offers.device})`;
  return engine;
}

class Server {
  kind = "server";
  offers = null;
  loading = [];
  note = "";
  #token;
  #picture = null;
  #prepared = null;
  #photograph = null;
  #result = null;
  #turn = Promise.resolve();

  constructor(token) {
    this.#token = token;
  }

  /** Ask one question after the other: over several connections they would be answered in any order. */
  #ask(path, body) {
    const answer = this.#turn.then(() => this.#answer(path, body));
    this.#turn = answer.catch(() => {});
    return answer;
  }

  async #answer(path, body) {
    let response;
    try {
      const headers = { "X-AnyUp-Token": this.#token };
      response = await fetch(`api/${path}`, body === undefined ? { headers } : { method: "POST", headers, body });
    } catch {
      throw new Refused("The server does not answer; start `anyup app` again, and reload this page.");
    }
    if (response.ok) return response;
    let sentence = `The server answered ${response.status}; what went wrong stands in its terminal.`;
    if (response.headers.get("Content-Type")?.includes("json")) sentence = (await response.json()).error;
    throw new Refused(sentence);
  }

  async json(path, body) {
    return (await this.#ask(path, body)).json();
  }

  /** Return what a call answers: a number of bytes, that much JSON, and the arrays that it lists. */
  async #arrays(path, request) {
    const content = await (await this.#ask(path, JSON.stringify(request))).arrayBuffer();
    const length = new DataView(content).getUint32(0, true);
    const { arrays, ...answer } = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
    let at = 4 + length;
    for (const [name, shape] of Object.entries(arrays)) {
      const count = shape.reduce((product, n) => product * n, 1);
      answer[name] = { data: new Uint8Array(content, at, count), height: shape[0], width: shape[1] };
      at += count;
    }
    return answer;
  }

  ready() {
    return this.#picture !== null;
  }

  /** Send a picture, or a file of weights. */
  async open(file) {
    const name = file.name || "picture", query = `?name=${encodeURIComponent(name)}`;
    const weights = this.offers.weightSuffixes.some((suffix) => name.toLowerCase().endsWith(suffix));
    const most = weights ? this.offers.largestWeights : this.offers.largest;
    if (file.size > most) throw new Refused(`${name} has ${Math.round(file.size / 1e6)} MB; at most ${most / 1e6} MB are taken.`);
    if (!weights) return this.#remembered(await this.json(`picture${query}`, file));
    const { weightFiles } = this.offers, kept = await this.json(`weights${query}`, file);
    if (!weightFiles.includes(kept.weights)) weightFiles.unshift(kept.weights);
    return kept;
  }

  async openOnDisk(file) {
    return this.#remembered(await this.json("open", JSON.stringify({ file })));
  }

  #remembered(opened) {
    this.#picture = opened.picture;
    return opened;
  }

  async example() {
    return null;
  }

  async prepare(settings) {
    this.#prepared = { picture: this.#picture, ...described(settings) }; // another picture may be opened before it runs
    const { guide } = await this.#arrays("prepare", this.#prepared);
    this.#photograph = painted(guide);
    return this.#photograph;
  }

  async run() {
    const { low, bilinear, anyup, ...rest } = await this.#arrays("run", this.#prepared);
    this.#result = rest.result;
    return { low: painted(low), bilinear: painted(bilinear), anyup: painted(anyup), ...rest };
  }

  async compare(pixel) {
    const answer = await this.#arrays("compare", { result: this.#result, ...pixel });
    const heat = ({ data, height, width }) => maths.heat(Float32Array.from(data, (value) => value / 255), height, width);
    return { ...answer, low: heat(answer.low), bilinear: heat(answer.bilinear), anyup: heat(answer.anyup) };
  }

  async pick(pixel) {
    const answer = await this.#arrays("pick", { result: this.#result, ...pixel });
    const segments = ({ data, height, width }, photograph) => maths.painted(data, height, width, photograph);
    const over = this.#photograph.data;
    const [low, bilinear, anyup] = [segments(answer.low, null), segments(answer.bilinear, over), segments(answer.anyup, over)];
    return { ...answer, low, bilinear, anyup, colour: maths.SEEDS[answer.seeds - 1] };
  }

  async clear() {
    if (this.#result !== null) await this.json("clear", JSON.stringify({ result: this.#result }));
  }

  /** Return the address of the features, (H, W, C) in float32, which the browser saves without holding them. */
  async npy() {
    const path = `features.npy?${new URLSearchParams({ token: this.#token, result: this.#result })}`;
    await (await this.#ask(path)).body.cancel(); // the browser does not tell why a download failed
    return `api/${path}`;
  }
}

/** Return the settings as the server wants them. */
function described({ encoder, layer, encoder_weights, encoder_side, upsampler, weights, side }) {
  return { encoder, layer: Number(layer), encoder_weights, encoder_side: Number(encoder_side), upsampler, weights, side: Number(side) };
}

/** Return the RGBA picture of RGB bytes. */
function painted({ data, height, width }) {
  const out = new Uint8ClampedArray(4 * height * width).fill(255);
  for (let p = 0, from = 0, to = 0; p < height * width; p++, from += 3, to += 4) {
    out[to] = data[from];
    out[to + 1] = data[from + 1];
    out[to + 2] = data[from + 2];
  }
  return { data: out, height, width };
}
