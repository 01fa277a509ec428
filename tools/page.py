"""python -m tools.page: write the browser page to web/, and serve it on this machine.

web/ holds the sources of `anyup_core/page`, ONNX Runtime Web from the npm registry, the models with float16 weights
and an example. It needs no server of its own: any static host serves it.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import http.server
import importlib
import io
import json
import shutil
import tarfile
import urllib.request
from pathlib import Path

from anyup_core.checkpoints import names
from anyup_core.config import AnyUpConfig
from anyup_core.export import graph
from anyup_core.export.encoders import build_encoder
from anyup_core.replacement import replacing

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "anyup_core/page"
VERSION = "1.30.0"  # of onnxruntime-web
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU = ("ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm")
ON_WEBGPU = (*WEBGPU, "anyup_webgpu.onnx")  # what a browser fetches only where there is an adapter
EXAMPLE = "chelsea.png"  # of scikit-image, in the public domain


def write(folder: Path, weights: str = "anyup_efficientnet_lite", encoder: str = "efficientnet_lite0") -> None:
    """Write the page; the runtime is fetched unless it is there.

    Raises:
        ImportError: if onnx, scikit-image or the encoder's weights are not installed.
        ValueError: if what the registry sends is not the release that is expected.
        OSError: if it cannot be reached, or a file cannot be written.
    """
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    (folder / ".nojekyll").touch()
    fetch_runtime(folder / "runtime" / VERSION)
    photographs = Path(importlib.import_module("skimage.data").__file__ or "").parent
    shutil.copyfile(photographs / EXAMPLE, folder / "example.png")
    (folder / "models").mkdir(exist_ok=True)
    checkpoint = names.load(weights)
    config = AnyUpConfig().replace(**checkpoint.configured())
    models = {
        "anyup.onnx": graph.build(config, checkpoint.tensors, half=True),
        "anyup_webgpu.onnx": graph.build(config, checkpoint.tensors, half=True, loops=False),
        "lite0.onnx": build_encoder(encoder, half=True),
    }
    for name, model in models.items():
        (folder / "models" / name).write_bytes(model.SerializeToString())
    listing = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "files.json":
            listing[path.relative_to(folder).as_posix()] = path.read_bytes()
    described = dict(
        runtime=VERSION,
        files={name: hashlib.sha256(content).hexdigest()[:16] for name, content in listing.items()},
        sizes={name: len(content) for name, content in listing.items()},
    )
    (folder / "files.json").write_text(json.dumps(described, indent=1))


def fetch_runtime(folder: Path) -> None:
    """Fetch ONNX Runtime Web, and check that it is the release that the page was tested with."""
    if all((folder / name).is_file() for name in (*RUNTIME, *WEBGPU)):
        return
    with urllib.request.urlopen(ADDRESS, timeout=300) as response:
        archive = response.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != SHA512:
        raise ValueError(f"{ADDRESS} is not the file that was released; look at the connection, and fetch it again.")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for name in (*RUNTIME, *WEBGPU):
            member = opened.extractfile(f"package/dist/{name}")
            if member is None:
                raise ValueError(f"{ADDRESS} has no file {name}.")
            with replacing(folder / name) as temporary:
                temporary.write_bytes(member.read())


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with the types that a browser wants, and logs nothing."""

    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def log_message(self, format: str, *args: object) -> None:
        pass


def server(folder: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Return a server of a folder on this machine, not yet serving; port 0 is any free one."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.page", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "web", help="where it is written (default: web)")
    parser.add_argument("--weights", default="anyup_efficientnet_lite", help="a name or a file of AnyUp's weights")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--only-write", action="store_true", help="do not serve it")
    args = parser.parse_args()
    write(args.folder, args.weights)
    sizes = [(path.name in ON_WEBGPU, path.stat().st_size) for path in args.folder.rglob("*") if path.is_file()]
    size, more = (sum(size for gpu, size in sizes if gpu is which) / 1e6 for which in (False, True))
    print(f"{args.folder} holds the page, {size:.1f} MB, and {more:.1f} MB for WebGPU; any static host serves it.")
    if not args.only_write:
        with server(args.folder, args.port) as here:
            print(f"http://127.0.0.1:{here.server_port}/ until Ctrl-C.", flush=True)
            try:
                here.serve_forever()
            except KeyboardInterrupt:
                print()


if __name__ == "__main__":
    main()
