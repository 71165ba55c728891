"""Launch: serves the studio with safe defaults: this machine alone, one folder of output, nothing sent anywhere."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import ArgumentError

LONGEST_QUEUE = 32  # requests that wait
LARGEST_UPLOAD = "2mb"
_AUTH = "DIT_ACCEL_STUDIO_AUTH"  # user:password; not an option, as others see the arguments of a process


@dataclass(frozen=True)
class Serving:
    """How to serve. pipelines: folders, none for those shipped; host: anything but this machine needs a password; port:
    `None` for the first free one from 7860 on; browser: open one; share: a public link of Gradio's, which needs a
    password; threads: of torch."""

    pipelines: tuple[Path, ...] = ()
    out: Path = Path("outputs/studio")
    host: str = "127.0.0.1"
    port: int | None = None
    browser: bool = True
    share: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if (self.share or not _is_local(self.host)) and self.auth is None:
            where = "a public link" if self.share else f"the address {self.host}"
            raise ArgumentError(
                f"The studio is not served at {where} without a password; set {_AUTH}=user:password, or leave the "
                "address at 127.0.0.1."
            )
        if self.out.exists() and not self.out.is_dir():
            raise ArgumentError(f"--out {self.out} is a file; give a folder.")

    @property
    def auth(self) -> tuple[str, str] | None:
        """User and password, where the environment has them."""
        user, colon, password = os.environ.get(_AUTH, "").partition(":")
        if colon and not (user and len(password) >= 8):
            raise ArgumentError(f"{_AUTH} is not user:password with a password of at least 8 characters; correct it.")
        return (user, password) if colon else None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Running:
    """A studio that is being served. Close it at the end."""

    url: str
    app: Any
    studio: Any

    def close(self) -> None:
        self.app.close()
        self.studio.close()


def serve(serving: Serving) -> Running:
    """Start the server, and come back once it answers.

    Raises ArgumentError, UsageError; ImportError where Gradio is not installed.
    """
    out = serving.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # Read when Gradio is imported: uploads and copies of results stay in the one folder, and nothing is reported.
    os.environ["GRADIO_TEMP_DIR"] = os.fspath(out / "cache")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from dit_accel.studio.app import build_app
    from dit_accel.studio.catalogue import shipped_folders
    from dit_accel.studio.studio import Studio
    from dit_accel.studio.style import CSS, SYNC, theme

    studio = Studio(serving.pipelines or shipped_folders(), out, threads=serving.threads)
    app = build_app(studio)
    app.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=1, api_open=False)
    _, url, _ = app.launch(
        server_name=serving.host,
        server_port=serving.port,
        share=serving.share,
        auth=serving.auth,
        inbrowser=serving.browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        strict_cors=True,
        allowed_paths=[os.fspath(out)],
        max_file_size=LARGEST_UPLOAD,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        footer_links=["api"],
        theme=theme(),
        css=CSS,
        head=SYNC,
    )
    return Running(url, app, studio)


def run(serving: Serving) -> int:
    """Serve until interrupted."""
    running = serve(serving)
    print(f"The studio is at {running.url} (Ctrl-C ends it); it writes to {serving.out} alone.", flush=True)
    try:
        running.app.block_thread()
    finally:
        running.close()
    return 0
