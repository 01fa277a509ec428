// The engine of the page without a server: EfficientNet-Lite0 and AnyUp in worker.js.

import { Refused, decode, scaled, sizes } from "./picture.js";

const GPU = { used: " and the GPU", failed: "; the GPU refused the model" };

/**
 * Start the worker. `threads` is a wish, 0 for half of the processors, and so is `backend`, "wasm" or "webgpu"; `report`
 * is told the share that is loaded.
 */
export async function startLocal({ threads, backend }, report) {
  const engine = new Local(report);
  const loaded = await engine.ask("load", { threads, backend });
  engine.threads = loaded.threads;
  engine.loading = [["Download", loaded.fetching], ["Start", loaded.opening]];
  engine.note = `, with ${loaded.threads} ${loaded.threads === 1 ? "thread" : "threads"}${GPU[loaded.gpu] ?? ""}`;
  return engine;
}

class Local {
  kind = "browser";
  offers = null;
  loading = [];
  threads = 0;
  note = "";
  /** What the models saw of the last picture: `seen` the encoder, `guide` AnyUp. */
  pixels = null;
  #bitmap = null;
  #calls = new Map();
  #count = 0;
  #thread = new Worker("worker.js", { type: "module" });

  constructor(report) {
    this.#thread.onmessage = ({ data: { id, result, error, progress } }) => {
      if (progress !== undefined) {
        report(progress);
        return;
      }
      const { resolve, reject } = this.#calls.get(id);
      this.#calls.delete(id);
      if (error === undefined) resolve(result);
      else reject(new Refused(error));
    };
    this.#thread.onerror = (event) => {
      for (const { reject } of this.#calls.values()) reject(new Refused(event.message || "The page is incomplete; reload it."));
      this.#calls.clear();
    };
  }

  ask(kind, argument, moved = []) {
    return new Promise((resolve, reject) => {
      const id = ++this.#count;
      this.#calls.set(id, { resolve, reject });
      this.#thread.postMessage({ id, kind, argument }, moved);
    });
  }

  ready() {
    return this.#bitmap !== null;
  }

  /** Take a picture, or an exported file as AnyUp's weights. */
  async open(file) {
    if (/\.onnx$/i.test(file.name ?? "")) {
      const bytes = await file.arrayBuffer();
      await this.ask("weights", { name: file.name, bytes }, [bytes]);
      return { weights: file.name };
    }
    const next = await decode(file);
    this.#bitmap?.close();
    this.#bitmap = next;
    return { name: file.name || "the picture" };
  }

  async example() {
    const response = await fetch("example.png");
    if (!response.ok) throw new Refused("The example could not be fetched; choose a picture of your own.");
    return new File([await response.blob()], "example.png", { type: "image/png" });
  }

  /** Return the picture as it guides the output. */
  async prepare({ side }) {
    const plan = sizes(this.#bitmap.width, this.#bitmap.height, Number(side));
    this.pixels = { seen: scaled(this.#bitmap, plan.seen), guide: scaled(this.#bitmap, plan.output) };
    return this.pixels.guide;
  }

  /** Return the pictures of features before and after, the times and the number of channels. */
  run({ stride }) {
    return this.ask("run", { ...this.pixels, stride: Number(stride) });
  }

  compare(pixel) {
    return this.ask("compare", pixel);
  }

  pick(pixel) {
    return this.ask("pick", pixel);
  }

  clear() {
    return this.ask("clear");
  }

  npy() {
    return this.ask("npy");
  }
}
