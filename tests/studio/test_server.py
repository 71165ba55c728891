"""The server, by gradio_client: bad input is refused with a sentence, users never meet, nothing else is read."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from dit_accel import Policy
from dit_accel.errors import ArgumentError
from dit_accel.studio.launch import Running, Serving
from dit_accel.studio.studio import Studio
from dit_accel.video import rgb

from .conftest import PROMPT, SKIPPING, outcome_of
from .conftest import ask as request_of

GOOD: dict[str, Any] = {"pipeline": "tiny-flux", "prompt": PROMPT, "seed": 3, "steps": 4, "guidance": 1.0}
GOOD |= {"height": None, "width": None, "frames": None, "policy": SKIPPING}
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def client(served: Running) -> Client:
    return client_of(served)


def client_of(served: Running) -> Client:
    return Client(served.url, verbose=False, download_files=str(served.studio.output.root / "downloads"))


def ask(client: Client, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    return client.predict(**(GOOD | changes), api_name="/compare")


def test_a_program_gets_numbers_and_exact_files(client: Client, served: Running) -> None:
    numbers, files = ask(client)
    expected = outcome_of(served.studio.engine, request_of(served.studio, steps=4))
    assert numbers["psnr"] == expected.way.psnr and numbers["flops_share"] == expected.way.flops_share < 1
    assert [Path(file).name for file in files] == ["plain.png", "accelerated.png", "policy.json"]
    assert np.array_equal(np.asarray(Image.open(files[1])), rgb(expected.made.pictures[0]))
    listed = client.predict(api_name="/catalogue")
    assert listed["pipelines"] == ["tiny-flux", "tiny-wan"] and "balanced" in listed["policies"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pipeline": "/etc"}, "pipeline is '/etc'; allowed: tiny-flux, tiny-wan"),
    ({"pipeline": "../tiny-flux"}, "did you mean 'tiny-flux'"),
    ({"pipeline": "black-forest-labs/FLUX.1-dev"}, "allowed: tiny-flux"),
    ({"pipeline": MARKUP}, "allowed: tiny-flux"),
    ({"pipeline": None}, "pipeline is None"),
    ({"pipeline": ["tiny-flux"]}, "allowed: tiny-flux"),
    ({"prompt": None}, "prompt is None"),
    ({"prompt": 7}, "prompt is 7 (int); give text"),
    ({"prompt": {"a": 1}}, "give text"),
    ({"prompt": "a" * 501}, "prompt has 501 characters; give at most 500"),
    ({"prompt": "a\nb"}, "one line of plain text"),
    ({"prompt": "\0"}, "one line of plain text"),
    ({"seed": -1}, "seed is -1; give a whole number"),
    ({"seed": 2**53}, "give a whole number from 0 to 9007199254740991"),
    ({"seed": "3"}, "seed is '3'"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"seed": True}, "seed is True"),
    ({"steps": 0}, "steps is 0; give a whole number from 1 to 200"),
    ({"steps": 100_000}, "from 1 to 200"),
    ({"steps": "fast"}, "steps is 'fast'"),
    ({"steps": None}, "steps is None"),
    ({"steps": 2}, "too few for this policy"),
    ({"guidance": -1}, "guidance is -1; give a number from 0 to 30"),
    ({"guidance": 1e9}, "from 0 to 30"),
    ({"guidance": "3; rm -rf /"}, "give a number from 0 to 30"),
    ({"height": 33}, "height is 33; give a whole number from 2 to 128 in steps of 2"),
    ({"height": 65536}, "from 2 to 128"),
    ({"width": -32}, "from 2 to 128"),
    ({"width": "32px"}, "width is '32px'"),
    ({"height": 128, "width": 128, "steps": 200}, "more than this server makes at once"),
    ({"frames": 13}, "makes images, not videos"),
    ({"pipeline": "tiny-wan", "frames": 10_000}, "frames is 10000; give a whole number from 1 to 24"),
    ({"policy": "balancd"}, "did you mean 'balanced'"),
    ({"policy": "/etc/passwd"}, "policy is '/etc/passwd'"),
    ({"policy": "policy.json"}, "policy is 'policy.json'"),
    ({"policy": "seerattention:/etc/passwd"}, "allowed: "),
    ({"policy": {"cache": {"threshold": -1}}}, "BlockCache.threshold is -1"),
    ({"policy": {"attention": {"score": "gate", "gate": "/etc/passwd"}}}, "names a file, which the studio does not"),
    ({"policy": {"weights": {"keep": "disk"}}}, "the studio writes no weights"),
    ({"policy": "{" * 70_000}, "give at most 65536"),
    ({"policy": [1]}, "give a name, or a policy as JSON"),
]
BAD_LISTS: list[tuple[Any, str]] = [
    (["a boot"] * 201, "201 items; give at most 200"),
    ("x" * 1_200_000, "more than 1048576 bytes"),
    ('{"prompt": "a boot", "output": "../../../tmp/x"}', "output"),
    ('{"prompt": "a boot", "image": "/etc/passwd"}', "cannot be given in a manifest"),
    ('{"prompt": "a boot", "policy": "/etc/passwd.json"}', "allowed: "),
    (None, "The list is empty"),
]


def test_bad_input_is_refused_with_a_sentence_and_the_server_goes_on(client: Client, served: Running) -> None:
    before = others(served)
    for change, sentence in BAD:
        with pytest.raises(AppError) as refused:
            ask(client, **change)
        said = str(refused.value)
        assert sentence in said and "Traceback" not in said and said.endswith("."), (change, said)
        assert len(said) < 1200
    for given, sentence in BAD_LISTS:
        with pytest.raises(AppError) as refused:
            client.predict(pipeline="tiny-flux", prompts=given, steps=4, policy=SKIPPING, api_name="/render")
        assert sentence in str(refused.value), (given[:50] if given else given, str(refused.value))
    assert len(BAD) + len(BAD_LISTS) >= 30
    assert others(served) == before, "nothing outside the output folder is written"
    assert ask(client)[0]["flops_share"] < 1


def others(served: Running) -> dict[str, str]:
    """Files around the output folder, and those of the pipelines."""
    out = served.studio.output.root
    places = [
        *out.parent.rglob("*"),
        *(f for p in served.studio.engine.catalogue.folders.values() for f in p.rglob("*")),
    ]
    files = [path for path in places if path.is_file() and not path.is_relative_to(out)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_markup_in_a_prompt_is_a_prompt(client: Client) -> None:
    numbers, files = ask(client, prompt=MARKUP)
    assert numbers["prompt"] == MARKUP
    assert json.loads(Image.open(files[1]).text["dit_accel"])["arguments"]["prompt"] == MARKUP


def test_huge_uploads_are_refused(served: Running, client: Client, tmp_path: Path) -> None:
    big = tmp_path / "big.txt"
    big.write_bytes(b"a" * (3 << 20))
    answer = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("big.txt", big.read_bytes())})
    assert answer.status_code == 413
    assert ask(client)[0]["steps"] == 4


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/proc/self/environ", "//etc/passwd",
     "file:///etc/passwd", "http://127.0.0.1:1/x"],
)  # fmt: skip
def test_no_file_outside_the_output_folder_is_served(served: Running, path: str) -> None:
    answer = httpx.get(f"{served.url}gradio_api/file={path}", follow_redirects=False)
    assert answer.status_code in (400, 403, 404) and "root:" not in answer.text
    folder = next(iter(served.studio.engine.catalogue.folders.values()))
    assert httpx.get(f"{served.url}gradio_api/file={folder}/model_index.json").status_code == 403


def test_files_of_uploads_stay_in_the_output_folder(served: Running, tmp_path: Path) -> None:
    small = tmp_path / "list.txt"
    small.write_text("a boot")
    answer = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("list.txt", small.read_bytes())})
    assert Path(answer.json()[0]).resolve().is_relative_to(served.studio.output.root)
    assert handle_file(str(small))["path"] == str(small)


def test_the_server_is_reached_from_this_machine_alone_and_tells_nobody(served: Running) -> None:
    config = served.app.config
    assert served.url.startswith("http://127.0.0.1:")
    assert config["analytics_enabled"] is False and served.app.share is False
    assert served.app.max_file_size == 2 << 20 and served.app.allowed_paths == [str(served.studio.output.root)]
    assert served.app.enable_monitoring is False and served.app.max_threads
    page = httpx.get(served.url).text
    assert "googleapis" not in page and "gstatic" not in page
    foreign = httpx.post(f"{served.url}gradio_api/queue/join", headers={"origin": "http://evil.example"}, json={})
    assert "access-control-allow-origin" not in {name.lower() for name in foreign.headers} or (
        foreign.headers["access-control-allow-origin"] != "http://evil.example"
    )


@pytest.mark.parametrize(
    ("host", "share"), [("0.0.0.0", False), ("192.168.1.7", False), ("::", False), ("127.0.0.1", True)]
)
def test_strangers_need_a_password(monkeypatch: pytest.MonkeyPatch, host: str, share: bool) -> None:
    monkeypatch.delenv("DIT_ACCEL_STUDIO_AUTH", raising=False)
    with pytest.raises(ArgumentError, match="without a password"):
        Serving(host=host, share=share)
    monkeypatch.setenv("DIT_ACCEL_STUDIO_AUTH", "me:short")
    with pytest.raises(ArgumentError, match="at least 8 characters"):
        Serving(host=host, share=share)
    monkeypatch.setenv("DIT_ACCEL_STUDIO_AUTH", "me:long enough")
    assert Serving(host=host, share=share).auth == ("me", "long enough")
    assert Serving(host="::1").host == "::1" and Serving(host="localhost").host == "localhost"


# -------------------------------------------------------------------------------------------------- several at a time


def test_two_clients_at_once_get_what_each_would_alone(served: Running, studio: Studio) -> None:
    policies = (SKIPPING, "exact", Policy.named("fbcache", warmup=2).to_dict())
    asked = [
        {"seed": 100 + number, "policy": policies[number % 3], "prompt": ("a red boot", "a blue coat")[number % 2]}
        for number in range(10)
    ]
    clients = (client_of(served), client_of(served))
    jobs = [(change, [client.submit(**(GOOD | change), api_name="/compare") for client in clients]) for change in asked]
    for change, both in jobs:
        alone = outcome_of(studio.engine, request_of(studio, steps=4, **change))
        for numbers, files in (job.result(timeout=240) for job in both):
            assert np.array_equal(np.asarray(Image.open(files[0])), rgb(alone.plain.pictures[0]))
            assert np.array_equal(np.asarray(Image.open(files[1])), rgb(alone.made.pictures[0]))
            assert numbers["psnr"] == alone.numbers()["psnr"]


@pytest.fixture
def busy(served: Running) -> Iterator[Any]:
    """A long run of another visitor."""
    other = client_of(served)
    job = other.submit(**(GOOD | {"steps": 200, "policy": "exact", "seed": 999}), api_name="/compare")
    yield job
    other.predict(api_name="/cancel")


def test_cancel_ends_ones_own_run_alone(served: Running, busy: Any) -> None:
    time.sleep(1)
    mine = client_of(served)
    waiting = mine.submit(**(GOOD | {"seed": 5}), api_name="/compare")
    mine.predict(api_name="/cancel")
    time.sleep(0.5)
    assert not busy.done()
    del waiting


def test_cancel_through_the_api_is_quick(served: Running) -> None:
    mine = client_of(served)
    job = mine.submit(**(GOOD | {"steps": 200, "policy": "exact", "seed": 998}), api_name="/compare")
    threading.Event().wait(1.5)
    started = time.monotonic()
    mine.predict(api_name="/cancel")
    with pytest.raises(AppError, match="Cancelled"):
        job.result(timeout=10)
    assert time.monotonic() - started < 2.5


def test_a_list_through_the_api(client: Client) -> None:
    counts, files = client.predict(
        pipeline="tiny-flux", prompts=["a red boot", "a blue coat"], steps=4, policy=SKIPPING, api_name="/render"
    )
    assert counts == {"items": 2, "done": 2, "failed": 0, "cancelled": False, "errors": []}
    assert all(Image.open(file).size == (32, 32) for file in files)
