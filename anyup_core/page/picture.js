// A picture from a file: refused before it is decoded where its header tells that it is too large or cut off.

export const MAX_PIXELS = 40e6;

export class Refused extends Error {}

/** Return an ImageBitmap of a file, turned upright. Throws Refused with one sentence. */
export async function decode(file) {
  const name = file.name || "The picture";
  if (file.size === 0) throw new Refused(`${name} is empty.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const header = read(bytes);
  if (header) check(name, header.width, header.height);
  if (header?.cut) throw new Refused(`${name} is damaged: its end is missing.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes], { type: file.type }), { imageOrientation: "from-image" });
  } catch {
    throw new Refused(`${name} is damaged, or no picture that this browser can read.`);
  }
  check(name, bitmap.width, bitmap.height);
  return bitmap;
}

function check(name, width, height) {
  if (width * height > MAX_PIXELS) {
    const millions = Math.round((width * height) / 1e6);
    throw new Refused(`${name} has ${width} × ${height} pixels, ${millions} million; give one of at most ${MAX_PIXELS / 1e6} million.`);
  }
  if (width / height > 14 || height / width > 14) {
    throw new Refused(`${name} is ${width} × ${height}, too narrow; give one that is at most 14 times as long as it is wide.`);
  }
}

/** Return {width, height, cut} of a PNG, JPEG, GIF, BMP or WebP file's bytes, null for others. */
export function read(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = (at, length) => String.fromCharCode(...bytes.subarray(at, at + length));
  try {
    if (text(1, 3) === "PNG") return png(view, text);
    if (bytes[0] === 0xff && bytes[1] === 0xd8) return jpeg(view, bytes);
    if (text(0, 3) === "GIF") return { width: view.getUint16(6, true), height: view.getUint16(8, true) };
    if (text(0, 2) === "BM") return { width: view.getInt32(18, true), height: Math.abs(view.getInt32(22, true)) };
    if (text(0, 4) === "RIFF" && text(8, 4) === "WEBP") return webp(view, bytes, text);
  } catch (error) {
    if (error instanceof RangeError) return { width: 1, height: 1, cut: true };
    throw error;
  }
  return null;
}

function png(view, text) {
  const size = { width: view.getUint32(16), height: view.getUint32(20) };
  let at = 8;
  while (at + 12 <= view.byteLength) {
    if (text(at + 4, 4) === "IEND") return size;
    at += view.getUint32(at) + 12;
  }
  return { ...size, cut: true };
}

function jpeg(view, bytes) {
  let at = 2, size = null;
  for (;;) {
    if (view.getUint8(at) !== 0xff) return size;
    const marker = view.getUint8(at + 1);
    if (marker === 0xff) {
      at += 1;
      continue;
    }
    const frame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (frame) size = { height: view.getUint16(at + 5), width: view.getUint16(at + 7) };
    if (marker === 0xda) return size && { ...size, cut: !ends(bytes, at) };
    at += 2 + view.getUint16(at + 2);
  }
}

function ends(bytes, first) {
  for (let at = bytes.length - 2; at > first; at--) if (bytes[at] === 0xff && bytes[at + 1] === 0xd9) return true;
  return false;
}

function webp(view, bytes, text) {
  const cut = view.getUint32(4, true) + 8 > view.byteLength;
  const kind = text(12, 4), three = (at) => bytes[at] | (bytes[at + 1] << 8) | (bytes[at + 2] << 16);
  if (kind === "VP8X") return { width: three(24) + 1, height: three(27) + 1, cut };
  if (kind === "VP8L") {
    const bits = view.getUint32(21, true);
    return { width: (bits & 0x3fff) + 1, height: ((bits >> 14) & 0x3fff) + 1, cut };
  }
  return { width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff, cut };
}

/**
 * Return the sizes for an output with this longer side: `seen`, of what the encoder sees, whole cells of stride 32 and at
 * least 224 long, and `output`, of guidance and output.
 */
export function sizes(width, height, side) {
  const long = Math.max(side, 224), short = Math.min(width, height) / Math.max(width, height);
  const other = Math.max(32, Math.round((long * short) / 32) * 32);
  const seen = width >= height ? [long, other] : [other, long];
  return { seen, output: seen.map((n) => (n * side) / long) };
}

/** Return the RGBA pixels of a bitmap, scaled to cover this size and cropped around the centre; transparent is white. */
export function scaled(bitmap, [width, height]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return context.getImageData(0, 0, width, height);
}
