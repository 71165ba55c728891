"""The command line: exit codes, one-sentence errors, no framework for help, and one whole comparison."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import jsonschema
import pytest
import torch

import dit_accel
from dit_accel import cli
from dit_accel.cli import call_defaults, load_pipeline, main
from dit_accel.comparison import Failure
from dit_accel.testing import tiny_pipelines

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(dit_accel.__file__).parents[1]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random class-to-image pipeline, whose calls need arguments that its defaults file gives."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("pipelines") / "tiny-dit"
    tiny_pipelines.build("dit", 6).pipe.save_pretrained(path)
    (path / cli.DEFAULTS_FILE).write_text(json.dumps({"class_labels": [1], "guidance_scale": 1.0}))
    return path


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["compare", "--help"], ["policy", "list"]])
def test_help_and_policies_import_no_framework(words: list[str]) -> None:
    program = (
        "import sys; from dit_accel.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers', 'PIL') if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout
    assert not done.stderr


def test_policy_commands(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("policy", "list")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == set(dit_accel.policies())
    _, shown, _ = run("policy", "show", "balanced")
    assert dit_accel.Policy.from_dict(json.loads(shown)) == dit_accel.Policy.named("balanced")
    _, schema, _ = run("policy", "schema")
    jsonschema.validate(json.loads(shown), json.loads(schema))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"cache": {"threshold": -1}}, json.loads(schema))
    path = tmp_path / "mine.json"
    path.write_text(shown)
    assert run("policy", "validate", str(path))[0] == 0
    path.write_text(shown.replace("threshold", "treshold"))
    code, out, err = run("policy", "validate", str(path))
    assert code == 2 and not out and "did you mean 'threshold'" in err


def test_compare_writes_its_report_at_the_end(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    words = ["compare", str(folder), "--policy", "fora", "--seeds", "3", "5:7", "--steps", "8", "--guidance", "4"]
    code, text, err = run(*words, "--json", "--out", str(out), "--threads", "1")
    assert code == 0 and err.startswith("Wrote ") and err.count("\n") == 1
    data = json.loads(text)
    assert [item["seed"] for item in data["items"]] == [3, 5, 6] and data["threads"] == 1
    assert data["arguments"] == {"class_labels": [1], "guidance_scale": 4.0}  # the command line wins
    assert data["accelerated"]["flops_share"] < 0.7 and data["policy_name"] == "fora" and data["steps"] == 8
    assert data == json.loads((out / "comparison.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "grid.png", "strip.png", "table.txt"]


def test_compare_prints_the_table(run: Run, folder: Path) -> None:
    code, text, err = run("compare", str(folder), "--policy", "fora", "--steps", "8", "--arg", "class_labels=[2]")
    assert code == 0 and not err
    assert [line.split("  ")[0] for line in text.splitlines()[2:5]] == ["plain", "accelerated", "fewer steps"]


def test_prompts_are_classes_where_a_pipeline_is_told_a_class(run: Run, folder: Path) -> None:
    code, text, err = run("compare", str(folder), "--policy", "fora", "--steps", "8", "--prompts", "2", "--json")
    data = json.loads(text)
    assert code == 0 and not err and [item["prompt"] for item in data["items"]] == ["2"]
    _, text, _ = run("compare", str(folder), "--policy", "fora", "--steps", "8", "--arg", "class_labels=[2]", "--json")
    assert json.loads(text)["items"][0]["accelerated"]["psnr"] == data["items"][0]["accelerated"]["psnr"]


def test_videos_need_pyav_and_say_so_before_any_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_pipelines.build("wan", 4)
    arguments = {key: value for key, value in tiny.arguments.items() if key != "output_type"}
    monkeypatch.setattr(cli, "load_pipeline", lambda *_: tiny.pipe)
    monkeypatch.setattr(cli, "call_defaults", lambda *_: arguments)
    words = ["compare", "wan", "--policy", "fora", "--steps", "8", "--out", str(tmp_path / "out")]
    code, text, err = run(*words, "--fps", "10")
    assert code == 0 and "temporal PSNR dB" in text and err.count(".mp4") == 4
    with av.open(str(tmp_path / "out" / "plain.mp4")) as container:
        assert container.streams.video[0].average_rate == 10
    monkeypatch.setitem(sys.modules, "av", None)
    code, text, err = run(*words)
    assert code == 4 and not text and "pip install av" in err
    code, text, _ = run(*words[:-2])
    assert code == 0 and "temporal PSNR dB" in text, "without files nothing is missing"


def test_explain(run: Run, folder: Path) -> None:
    code, text, err = run("explain", str(folder), "--policy", "fora", "--steps", "8")
    assert code == 0 and not err
    assert "DiTTransformer2DModel" in text and "over 8 steps: steps 0 to 1 are always computed" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "{folder}", "--policy", "balancd"], "did you mean 'balanced'"),
        (["compare", "{folder}", "--seeds", "8:8"], "--seeds 8:8 is no seed"),
        (["compare", "{folder}", "--seeds", "one"], "--seeds one is no seed"),
        (["compare", "{folder}", "--arg", "class_labels"], "not KEY=JSON"),
        (["compare", "{folder}", "--arg", "class_labels=cat"], "not KEY=JSON"),
        (["compare", "{folder}", "--arg", "class_label=[1]"], "'class_labels'"),
        (
            ["compare", "{folder}", "--prompts", "a cat"],
            "DiTPipeline knows no class 'a cat'; give a number from 0 to 999",
        ),
        (["compare", "{folder}", "--prompts", "2", "--arg", "class_labels=[1]"], "'class_labels' is set by `prompts`"),
        (["compare", "{folder}", "--fps", "0"], "give an integer of at least 1"),
        (["compare", "{folder}", "--prompts-file", "{folder}/none.txt"], "cannot be read"),
        (["compare", "{folder}", "--steps", "2"], "too few"),
        (["compare", "{folder}", "--out", "{folder}/model_index.json"], "is a file; give a folder"),
        (["compare", "{folder}/nothing"], "There is no folder"),
        (["compare", "{folder}/scheduler"], "cannot be loaded: .*model_index.json"),
        (["compare", "{folder}", "--steps", "0"], "give an integer of at least 1"),
        (["compare", "{folder}", "--prompts", "a", "--prompts-file", "b"], "not allowed with"),
        (["explain", "{folder}", "--policy", "mine.json"], "cannot be read"),
        (["paint"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(run: Run, folder: Path, words: list[str], message: str) -> None:
    code, out, err = run(*(word.format(folder=folder) for word in words))
    assert code == 2 and not out and "Traceback" not in err
    assert err.splitlines()[-1].startswith("dit-accel")
    assert re.search(message, err), err


def test_explain_counts_public_models_without_their_weights(run: Run) -> None:
    code, out, _ = run("explain", "wan2.1-t2v-1.3b", "--policy", "vq")
    assert code == 0 and "Weights of transformer: 300 layers, 300 x 256x4" in out and "times smaller" in out
    code, _, error = run("explain", "nowhere/config.json", "--policy", "vq")
    assert code == 2 and "Known models" in error


def test_quantize_saves_a_pipeline_that_loads(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(folder), "--out", str(out), "--bits", "3", "--set", "smallest=0", "--set", "low_rank=2"]
    code, text, _ = run(*words, "--items", "2", "--steps", "2")
    assert code == 0 and "times smaller" in text and "PSNR" in text and "worst" in text
    report = json.loads((out / "quantization.json").read_text())
    assert report["denoisers"]["transformer"]["ratio"] > 1.5 and len(report["psnr"]) == 2
    assert (out / cli.DEFAULTS_FILE).read_bytes() == (folder / cli.DEFAULTS_FILE).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path != out], "nothing half-written stays"
    pipe, arguments = load_pipeline(out), call_defaults(out)
    assert pipe.transformer.config["quantization_config"].bits == 3
    made = pipe(**arguments, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np")
    assert torch.isfinite(torch.from_numpy(made[0])).all()
    code, _, error = run(*words)
    assert code == 2 and "not an empty folder" in error
    code, _, error = run("quantize", str(out), "--out", str(tmp_path / "again"))
    assert code == 2 and "quantised already" in error and not (tmp_path / "again").exists()


def test_a_calibrated_quantization_goes_on_where_it_stopped(run: Run, folder: Path, tmp_path: Path) -> None:
    few = [word for key in ("smallest=0", "runs=2", "steps=2", "calls=3", "tuning=2") for word in ("--set", key)]
    words = ["quantize", str(folder), "--method", "feedback", *few, "--items", "1", "--steps", "2"]
    words += ["--prompts", "1", "2", "--work", str(tmp_path / "work")]
    first = run(*words, "--out", str(tmp_path / "first"))
    again = run(*words, "--out", str(tmp_path / "again"))
    assert first[0] == again[0] == 0
    files = [tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "bitz=2"], "no setting 'bitz'"),
        (["--set", "mean_bits=9"], "mean_bits is 9"),
        (["--policy", "balanced"], "does not say how weights are stored"),
        (["--set", "smallest=1000000000"], "lower smallest"),
    ],
)
def test_bad_settings_of_weights_are_sentences(
    run: Run, folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, error = run("quantize", str(folder), "--out", str(tmp_path / "out"), *words, "--steps", "1")
    assert code == 2 and message in error and not (tmp_path / "out").exists()


def test_a_hub_id_without_network_is_a_sentence(tmp_path: Path) -> None:
    program = "import sys; from dit_accel.cli import main; sys.exit(main(['explain', 'nobody/nothing']))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "nobody/nothing is not on this machine" in done.stderr.splitlines()[-1]


def test_prompts_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, run: Run) -> None:
    given: dict[str, Any] = {}

    def compare(pipe: Any, policy: Any, prompts: Any, seeds: Any, **settings: Any) -> None:
        given.update(settings, prompts=prompts, seeds=seeds)
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_accel.compare.compare", compare)
    (tmp_path / "prompts.txt").write_text("a red dress\n\n  a blue boot \n")
    out = tmp_path / "out"
    words = ["--prompts-file", str(tmp_path / "prompts.txt"), "--negative", "", "--height", "16", "--out", str(out)]
    code, _, err = run("compare", str(folder), *words, "--arg", 'note="x=y"')
    assert code == 130 and "Interrupted" in err and not out.exists()
    assert given["prompts"] == ["a red dress", "a blue boot"] and given["seeds"] == [0] and given["steps"] == 50
    assert given["arguments"] == {  # without the default class, since prompts say which
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "height": 16,
        "note": "x=y",
    }


def test_exit_codes_of_trouble(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel import compare as module

    plain = module.compare

    def partly(*args: Any, **settings: Any) -> Any:
        return replace(plain(*args, **settings), failures=(Failure(None, 1, "it broke."),))

    monkeypatch.setattr(module, "compare", partly)
    code, text, _ = run("compare", str(folder), "--policy", "fora", "--steps", "8")
    assert code == 3 and "Failed: seed 1: it broke." in text

    def raising(error: Exception) -> Callable[..., Any]:
        def load(*_: Any) -> Any:
            raise error

        return load

    missing = ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece")
    monkeypatch.setattr(cli, "load_pipeline", raising(missing))
    code, _, err = run("explain", str(folder))
    assert code == 4 and "pip install sentencepiece" in err
    monkeypatch.setattr(cli, "load_pipeline", raising(RuntimeError("a bug")))
    code, _, err = run("explain", str(folder))
    assert code == 1 and "RuntimeError: a bug" in err


def test_defaults_file(tmp_path: Path) -> None:
    assert call_defaults(tmp_path) == {} == call_defaults("nobody/nothing")
    path = tmp_path / cli.DEFAULTS_FILE
    for text, message in (("[1]", "holds list"), ("{", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(dit_accel.DitAccelError, match=message):
            call_defaults(tmp_path)
    path.write_text('{"height": 32}')
    assert call_defaults(tmp_path) == {"height": 32}


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(folder)
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(dit_accel.DitAccelError, match="cannot be loaded"):
        load_pipeline(tmp_path)
