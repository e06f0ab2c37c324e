"""`sae-pipeline serve`: a report as a web site, with its model beside it."""

import contextlib
import sys

from sae.serve.find import find_report
from sae.serve.guard import is_loopback
from sae.serve.listen import open_socket, run_server
from sae.serve.live import load_live
from sae.serve.site import Site


def serve(uri: str, host: str, port: int) -> None:
    """Serve a report until Ctrl-C or SIGTERM.

    Args:
        uri: the report's folder or index.html, or a run's root: then its newest report.

    Raises: ConfigError when there is no report or the address cannot be used; StoreError when the report is damaged.
    """
    storage, record = find_report(uri)
    listening = open_socket(host, port)
    with listening:
        live = load_live(storage, record)
        name = f"[{host}]" if ":" in host else host
        if not is_loopback(host):
            print(
                f"warning: {host} can be reached from other machines; whoever can reach it reads the report and uses "
                f"this machine's cores",
                file=sys.stderr,
            )
        for key, why in live.why_not.items():
            print(f"{key}: no live part: {why}", file=sys.stderr)
        for key, one in live.saes.items():
            print(f"{key}: live on {one.model_name}, {one.hook_point}", file=sys.stderr)
        print(f"report: http://{name}:{listening.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        # Ctrl-C and SIGTERM are how a server ends. Started in the background, nothing is raised for Ctrl-C.
        with contextlib.suppress(KeyboardInterrupt):
            run_server(listening, host, Site(storage, record), live)
        print("stopped", file=sys.stderr)
