"""Rendering in one process: files, resume, what is made again, batches, memory, signals, and what is said."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel import cli
from dit_accel.cli import main
from dit_accel.render import Entry, History, render
from dit_accel.render.batching import ItemCaller
from dit_accel.render.progress import Progress
from dit_accel.render.stop import Stop
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.renders import ledger_lines, leftovers, manifest, pictures, sidecars

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(dit_accel.__file__).parents[1]


def test_a_manifest_becomes_pictures_that_say_what_they_are(run: Run, tmp_path: Path) -> None:
    jobs, out = tmp_path / "jobs.csv", tmp_path / "out"
    jobs.write_text("prompt,seed,output\n3,7,cats/one.png\n4,,\n")
    code, text, err = run(jobs, out)
    assert code == 0 and "2 in this render" in text and "2/2" in err, err
    assert leftovers(out) == [] and len(pictures(out)) == 2
    with Image.open(out / "cats" / "one.png") as image:
        size, inside, text = image.size, json.loads(image.info["dit_accel"]), image.info["parameters"]
    beside = json.loads((out / "cats" / "one.json").read_text())
    assert {key: beside[key] for key in inside} == inside
    assert inside["seed"] == 7 and inside["arguments"]["prompt"] == "3" and inside["policy"] == "none"
    assert inside["versions"]["torch"] == version("torch") and "Seed: 7" in text and text.startswith("3\n")
    assert beside["width"], beside["height"] == size
    assert beside["made"]["batch"] == 1 and beside["made"]["seconds"] > 0
    assert oct((out / "cats" / "one.png").stat().st_mode & 0o777) == "0o644"
    assert [line["id"] for line in ledger_lines(out)] == [inside["id"], json.loads(_other(out).read_text())["id"]]


def _other(out: Path) -> Path:
    (path,) = out.glob("*.json")
    return path


def test_the_picture_is_that_of_the_pipeline(folder: Path, pipe: Any, tmp_path: Path) -> None:
    render([{"prompt": "3", "seed": 5, "id": "x"}], pipe, tmp_path, None, arguments={"guidance_scale": 1.0})
    generator = torch.Generator().manual_seed(5)
    plain = pipe(class_labels=[3], generator=generator, guidance_scale=1.0, output_type="pil").images[0]
    assert Image.open(tmp_path / "x.png").tobytes() == plain.tobytes()


def test_rendering_again_does_nothing_and_at_once(run: Run, tmp_path: Path, folder: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 4), tmp_path / "out"
    run(jobs, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.suffix != ""}
    program = (
        "import sys; from dit_accel.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules], code)"
    )
    words = ["render", str(jobs), "--pipeline", str(folder), "--out", str(out), "--policy", "none"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert time.perf_counter() - started <= 3.0
    assert done.stdout.splitlines()[-1] == "[] 0" and "all were there already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(ledger_lines(out)) == 4


def test_another_order_gives_the_same_files(run: Run, tmp_path: Path) -> None:
    jobs = manifest(tmp_path / "jobs.jsonl", 6, num_inference_steps=8)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(jobs.read_text().splitlines())))
    for source, name in ((jobs, "a"), (turned, "b")):
        assert run(source, tmp_path / name, policy="balanced")[0] == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") != {}
    assert sidecars(tmp_path / "a") == sidecars(tmp_path / "b")
    work = sidecars(tmp_path / "a")["item-0.json"]["work"]
    assert work["blocks_run"] + work["blocks_skipped"] == 32 and 0 < work["flops_share"] <= 1


def test_items_may_have_policies_of_their_own(run: Run, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text('defaults: {prompt: "3", seed: 1, num_inference_steps: 8}\ngrid: {policy: [exact, fora, fast]}\n')
    code, _, _ = run(jobs, tmp_path / "out", "--fidelity")
    found = {data["policy"]: data for data in sidecars(tmp_path / "out").values()}
    assert code == 0 and [*sorted(found)] == ["exact", "fast", "fora"]
    assert found["exact"]["fidelity"]["identical"] and not found["fora"]["fidelity"]["identical"]
    assert found["fora"]["fidelity"]["psnr"] > 5 and found["fora"]["work"]["blocks_skipped"] > 0


def test_what_is_gone_or_cut_is_made_again(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 4), tmp_path / "out"
    run(jobs, out)
    whole = pictures(out)
    (out / "item-0.png").unlink()
    (out / "item-1.png").write_bytes(whole["item-1.png"][:50])
    (out / "item-2.json").unlink()
    code, text, _ = run(jobs, out)
    assert code == 0 and "3 in this render" in text and pictures(out) == whole


def test_failed_items_are_told_and_made_again_when_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 5), tmp_path / "out"
    make = ItemCaller.make_items

    def fail(self: ItemCaller, items: Any) -> Any:
        if any(item.id in ("item-1", "item-3") for item in items):
            raise ValueError("this prompt\nis too long")
        return make(self, items)

    monkeypatch.setattr(ItemCaller, "make_items", fail)
    code, text, err = run(jobs, out, "--batch-size", "3")
    assert code == 3 and len(pictures(out)) == 3, "one spoilt item does not take its batch with it"
    assert "failed: item-1: ValueError: this prompt is too long" in err and "item-3 (jobs.jsonl, line 4)" in text
    assert run(jobs, out)[0] == 3 and len(ledger_lines(out)) == 5, "they stay failed"
    assert run(jobs, out, "--retry-failed")[0] == 3
    assert [line.get("attempt") for line in ledger_lines(out) if line["id"] == "item-1"] == [1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(cli, "load_pipeline", lambda *_: pytest.fail("nothing is to be made"))
    assert run(jobs, out)[0] == 3


def test_arguments_are_checked_against_the_pipeline_s_class(run: Run, tmp_path: Path) -> None:
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    jobs.write_text('{"prompt": "3", "id": "a", "height": 7}\n{"prompt": "3", "id": "b"}\n')
    code, _, err = run(jobs, out)
    assert code == 2 and "no argument 'height'" in err, "a class-to-image pipeline has one size"


def test_max_failures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("broken")

    jobs, out = manifest(tmp_path / "jobs.jsonl", 6), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(ItemCaller, "make_items", fail)
        code, text, _ = run(jobs, out, "--max-failures", "2")
    assert code == 3 and "Stopped after 2 failed items" in text and len(ledger_lines(out)) == 2
    assert run(jobs, out, "--retry-failed")[0] == 0 and len(pictures(out)) == 6


def test_other_settings_are_refused_and_overwritten_when_asked(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 3, seed=1, num_inference_steps=3), tmp_path / "out"
    run(jobs, out)
    first = pictures(out)
    manifest(jobs, 4, seed=2, num_inference_steps=3)
    code, _, err = run(jobs, out)
    assert code == 2 and "'item-0' was rendered" in err and "--overwrite" in err and pictures(out) == first
    stop = Stop()

    class OneItem(Progress):
        def done(self, entry: Entry) -> None:
            stop.ask()

    interrupted = render(jobs, _pipe(run), out, None, overwrite=True, stop=stop, progress=OneItem(0, quiet=True))
    assert interrupted.left == 3
    fresh = tmp_path / "fresh"
    render(jobs, _pipe(run), fresh, None)
    assert render(jobs, _pipe(run), out, None).left == 0, "an interrupted overwrite goes on without the word"
    assert pictures(out) == pictures(fresh)


def _pipe(run: Run) -> Any:
    del run
    return cli.load_pipeline("")


def test_items_that_left_the_manifest_are_left_alone(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 4), tmp_path / "out"
    run(jobs, out)
    manifest(jobs, 2)
    code, text, _ = run(jobs, out)
    assert code == 0 and "2 items of the ledger are no longer in the manifest" in text and len(pictures(out)) == 4


def test_items_may_be_mappings(pipe: Any, tmp_path: Path) -> None:
    report = render([{"prompt": "1"}, {"prompt": "2"}], pipe, tmp_path, None, shard=(0, 2), contact_sheet=False)
    assert report.done == 1 and report.left == 0 and (tmp_path / ".dit-accel" / "ledger-part-0-of-2.jsonl").exists()
    with pytest.raises(dit_accel.ManifestError, match="item 2: height is 0"):
        render([{"prompt": "1"}, {"prompt": "2", "height": 0}], pipe, tmp_path / "other", None)
    assert not (tmp_path / "other").exists()


def test_policies_that_cannot_act_or_depend_on_the_order_are_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    jobs = manifest(tmp_path / "jobs.jsonl", 2, num_inference_steps=8)
    for policy, words in (("smoothcache", "measures in its first run"), ("vq4dit", "calibrates its weights")):
        code, _, err = run(jobs, tmp_path / "out", policy=policy)
        assert code == 2 and words in err and err.count("\n") == 1
    manifest(jobs, 2, num_inference_steps=3)
    code, _, err = run(jobs, tmp_path / "out2", policy="balanced")
    assert code == 2 and "line 1: num_inference_steps is 3, too few for the policy 'balanced'" in err
    jobs.write_text('{"prompt": "3", "output": "x.mp4"}')
    code, _, err = run(jobs, tmp_path / "out3")
    assert code == 2 and "output ends in .mp4, but DiTPipeline makes images" in err


# ------------------------------------------------------------------------------------------------------ batches, memory


def test_batches_are_of_one_shape_and_make_the_same_pictures(pipe: Any, tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "num_inference_steps": 8 + n % 2, "id": f"i{n}"} for n in range(8)]
    arguments = {"guidance_scale": 1.0}
    for size in (1, 3):
        report = render(rows, pipe, tmp_path / str(size), "balanced", batch_size=size, arguments=arguments)
        assert report.done == 8
    assert (
        sorted(json.loads(p.read_text())["made"]["batch"] for p in (tmp_path / "3").glob("*.json")) == [1] * 2 + [3] * 6
    )
    for path in (tmp_path / "1").glob("*.png"):
        a, b = (torch.tensor(list(Image.open(p).tobytes())).int() for p in (path, tmp_path / "3" / path.name))
        assert (a - b).abs().max() <= 1, "a rounding of float32 at most"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("not enough memory: x")])
def test_out_of_memory_halves_the_batch(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    rows = [{"prompt": str(number), "id": f"i{number}", "num_inference_steps": 3} for number in range(7)]
    render(rows, pipe, tmp_path / "a", None)
    make, sizes = ItemCaller.make_items, []

    def limited(self: ItemCaller, items: Any) -> Any:
        sizes.append(len(items))
        if len(items) > 2:
            raise error
        return make(self, items)

    monkeypatch.setattr(ItemCaller, "make_items", limited)
    report = render(rows, pipe, tmp_path / "b", None, batch_size=7)
    assert report.done == 7 and report.failed == 0 and sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert {k: v["seed"] for k, v in sidecars(tmp_path / "a").items()} == {
        k: v["seed"] for k, v in sidecars(tmp_path / "b").items()
    }
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")


def test_at_last_the_vae_works_in_tiles(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": str(number), "id": f"i{number}", "num_inference_steps": 3} for number in range(3)]
    make = ItemCaller.make_items

    def needs_tiles(self: ItemCaller, items: Any) -> Any:
        if items[0].id == "i1" and not self.pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("no")
        if items[0].id == "i2":
            raise torch.OutOfMemoryError("never")
        return make(self, items)

    monkeypatch.setattr(ItemCaller, "make_items", needs_tiles)
    report = render(rows, pipe, tmp_path, None)
    assert report.done == 2 and "Memory ran out" in report.entries["i2"].error and not pipe.vae.use_tiling
    tiled = {p.stem: json.loads(p.read_text())["made"]["tiled_vae"] for p in tmp_path.glob("*.json")}
    assert tiled == {"i0": False, "i1": True}


def test_pictures_that_are_not_finite_are_failures(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ItemCaller.make_items

    def spoil(self: ItemCaller, items: Any) -> Any:
        made = make(self, items)
        made[0].picture[0, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(ItemCaller, "make_items", spoil)
    report = render([{"prompt": "1", "id": "a"}], pipe, tmp_path, None)
    assert report.failed == 1 and "not finite" in report.entries["a"].error and pictures(tmp_path) == {}


def test_videos_are_mp4_with_what_they_are_made_of(tmp_path: Path) -> None:
    tiny = tiny_pipelines.build("wan", 4)
    arguments = {key: value for key, value in tiny.arguments.items() if key != "output_type" and "embeds" not in key}
    embeds = {key: value for key, value in tiny.arguments.items() if "embeds" in key}
    base: Any = type(tiny.pipe)

    class Embedded(base):
        """Has its embeddings already, so that it takes no prompt."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            kwargs = {key: value for key, value in kwargs.items() if key not in ("prompt", "negative_prompt")}
            return super().__call__(*args, **kwargs, **embeds)

    Embedded.__call__.__signature__ = __import__("inspect").signature(base.__call__)  # pyright: ignore
    tiny.pipe.__class__ = Embedded
    for name in ("a", "b"):
        rows = [{"prompt": "x", "id": "clip", "num_inference_steps": 4}]
        report = render(rows, tiny.pipe, tmp_path / name, None, arguments=arguments, fps=12)
        assert report.done == 1, report.table()
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    beside = json.loads((tmp_path / "a" / "clip.json").read_text())
    with av.open(str(tmp_path / "a" / "clip.mp4")) as container:
        inside = json.loads(container.metadata["comment"])
        assert (
            len(list(container.decode(video=0))) == beside["frames"] and container.streams.video[0].average_rate == 12
        )
    assert {key: beside[key] for key in inside} == inside and inside["arguments"]["prompt"] == "x"
    assert "data:image/jpeg;base64" in (tmp_path / "a" / "contact-sheet.html").read_text()


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_finishes_the_item(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 5), tmp_path / "out"
    make, made, before = ItemCaller.make_items, [], signal.getsignal(signal.SIGINT)

    def interrupted(self: ItemCaller, items: Any) -> Any:
        made.extend(items)
        if len(made) == 2:
            os.kill(os.getpid(), number)
        return make(self, items)

    with monkeypatch.context() as patched:
        patched.setattr(ItemCaller, "make_items", interrupted)
        code, text, err = run(jobs, out)
    assert code == 130 and len(pictures(out)) == 2 and "Stopping" in err and "run the same command again" in text
    assert run(jobs, out)[0] == 0 and len(pictures(out)) == 5 and leftovers(out) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_two_interrupts_stop_now(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 3), tmp_path / "out"

    def interrupted(self: ItemCaller, items: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with monkeypatch.context() as patched:
        patched.setattr(ItemCaller, "make_items", interrupted)
        code, _, err = run(jobs, out)
    assert code == 130 and "Interrupted" in err and pictures(out) == {} and leftovers(out) == []
    assert run(jobs, out)[0] == 0


# -------------------------------------------------------------------------------------------------------- what is said


def test_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 40), tmp_path / "out"
    code, text, _ = run(jobs, out, "--dry-run")
    assert code == 0 and "40 items to make: about" in text and "that are free" in text and not out.exists()
    _, text, _ = run(jobs, out, "--dry-run", "--log-json")
    found = json.loads(text)["estimate"]
    run(jobs, out)
    size = sum(len(data) for data in pictures(out).values()) + sum(p.stat().st_size for p in out.glob("*.json"))
    assert found["items"] == 40 and 0.7 * size < found["size"] < 1.4 * size
    code, text, _ = run(jobs, out, "--dry-run")
    assert code == 0 and "40 done" in text and "0 to make" in text


def test_log_json(run: Run, tmp_path: Path) -> None:
    jobs = manifest(tmp_path / "jobs.jsonl", 2)
    code, text, err = run(jobs, tmp_path / "out", "--log-json")
    events = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and not err and [event["event"] for event in events] == ["begin", "done", "done", "end"]
    assert events[1]["file"] == "item-0.png" and events[-1]["done"] == 2


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("href", "src")]


def test_the_contact_sheet_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    labels = {"<script>alert(1)</script>&": 3}
    _pipe(run).labels = labels
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    rows = [{"prompt": "<script>alert(1)</script>&", "output": "a b/ü#1"}, {"prompt": "4", "id": "x"}]
    jobs.write_text("\n".join(map(json.dumps, rows)))
    assert run(jobs, out)[0] == 0
    text = (out / "contact-sheet.html").read_text()
    links = _Links()
    links.feed(text)
    files = [link for link in links.links if not link.startswith("data:image/")]
    assert files == ["a%20b/%C3%BC%231.png", "x.png"] and len(links.links) == 4
    assert "script" not in links.tags and "&lt;script&gt;" in text and not re.search(r"https?://|@import|url\(", text)


def test_options_have_their_defaults_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in ("--resume", "--retry-failed", "--overwrite", "--max-failures", "--dry-run"))
    for words in (["--shard", "4/4"], ["--shard", "x"], ["--seed", "-1"], ["--fps", "0"]):
        assert main(["render", "x.csv", "--pipeline", "a/b", "--out", "o", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_history_of_a_folder_that_is_none(tmp_path: Path) -> None:
    assert History.read(tmp_path / "absent").entries == {}
