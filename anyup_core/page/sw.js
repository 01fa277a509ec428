// Makes the page work offline, and isolates it from other origins, without which a browser has no threads.

const CACHE = "anyup";
const SOURCES = ["./", "style.css", "app.js", "local.js", "server.js", "worker.js", "tables.js", "maths.js", "picture.js", "files.json", "example.png"];

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(SOURCES)));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { request } = event, url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== self.location.origin) return;
  event.respondWith((lasting(url) ? kept : current)(request).then(isolated));
});

/** Whether a file's address changes with its content. */
const lasting = (url) => url.searchParams.has("v") || url.pathname.includes("/runtime/");

async function kept(request) {
  const cache = await caches.open(CACHE), stored = await cache.match(request);
  if (stored) return stored;
  const response = await fetch(request);
  if (response.ok) {
    await cache.delete(request, { ignoreSearch: true });
    await cache.put(request, response.clone());
  }
  return response;
}

async function current(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const stored = await cache.match(request);
    if (stored) return stored;
    throw error;
  }
}

function isolated(response) {
  if (response.status === 0 || response.type === "opaqueredirect") return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  const { status, statusText } = response;
  return new Response([101, 204, 205, 304].includes(status) ? null : response.body, { status, statusText, headers });
}
