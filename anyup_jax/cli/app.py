"""`anyup app`: the browser page with Python behind it."""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
from pathlib import Path

from anyup_core.command import Abandoned
from anyup_core.paths import expanded
from anyup_jax.cli.models import say
from anyup_jax.cli.parser import whole


def port(text: str) -> int:
    return whole(text, 0, 65535, "port")


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("app", help="look into features in the browser", description=app.__doc__)
    parser.set_defaults(command=app)
    folder = "whose pictures and weights the page may open (default: this one)"
    parser.add_argument("folder", type=expanded, nargs="?", default=".", metavar="FOLDER", help=folder)
    parser.add_argument("--port", type=port, default=8010, metavar="N", help="0: any that is free (default: 8010)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def app(args: argparse.Namespace) -> None:
    """Serve a page on this machine that upsamples pictures: any encoder, layer, upsampler and weights, up to 2048
    pixels a side. Hover a pixel to see what is similar to it, and click some for segments.
    """
    try:
        from anyup_jax.app import server
    except ModuleNotFoundError as error:
        message = f'`anyup app` needs {error.name}, which is not installed: pip install "anyup-jax[app]"'
        raise ImportError(f"{message}.") from error
    from anyup_jax.app.explorer import Explorer
    from anyup_jax.app.folder import Folder
    from anyup_jax.devices import prepare_devices

    folder = Folder(args.folder)
    prepare_devices()
    # ignored: what is being computed at the end may still write there
    temporary = tempfile.TemporaryDirectory(prefix="anyup-app-", ignore_cleanup_errors=True)
    explorer = Explorer(folder, Path(temporary.name))
    try:
        with temporary, server.listen(args.port) as here:
            token = server.new_token()
            address = server.address(here, token)
            say("page", f"{address} until Ctrl-C")
            say("files", f"pictures and weights of {folder.root}")
            if args.open:
                threading.Thread(target=show, args=[address], daemon=True).start()
            server.Server(server.configured(explorer, token)).run(sockets=[here])
    except KeyboardInterrupt as error:
        if explorer.lock.locked():
            raise Abandoned(*(error.args or [signal.SIGINT])) from error
        raise


def show(address: str) -> None:
    """Open an address in the browser. A browser of the terminal takes it over until it is left, so call in a thread."""
    import webbrowser

    if not webbrowser.open(address):
        say("browser", f"none was found; open {address} in one")
