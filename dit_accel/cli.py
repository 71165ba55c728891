"""Command line: `dit-accel`. Frameworks are imported inside the commands, so that help and policies answer at once.

Exit codes: 0 ok, 1 unexpected, 2 usage or bad input, 3 some items failed, 4 something not installed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_accel import __version__
from dit_accel.errors import DitAccelError, KernelUnavailableError
from dit_accel.policy import Policy, as_policy, policies

OK, UNEXPECTED, BAD_INPUT, SOME_FAILED, NOT_INSTALLED, INTERRUPTED = 0, 1, 2, 3, 4, 130
DEFAULTS_FILE = "dit_accel_defaults.json"
DTYPES = ("float32", "bfloat16", "float16")


class UsageError(DitAccelError, ValueError):
    """Something on the command line, or a file named there, is not allowed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        return arguments.command(arguments)
    except KernelUnavailableError as error:
        return _say(NOT_INSTALLED, str(error))
    except DitAccelError as error:
        return _say(BAD_INPUT, str(error))
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        hint = f"; install it with: pip install {package}" if package else ""
        return _say(NOT_INSTALLED, f"Something is not installed: {error}{hint}")
    except KeyboardInterrupt:
        return _say(INTERRUPTED, "Interrupted; no file is half-written.")
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:
        traceback.print_exc()
        return _say(UNEXPECTED, "This was not expected; please report it with the lines above.")


def _say(code: int, sentence: str) -> int:
    print(f"dit-accel: {sentence}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------------------------- commands


def _compare(arguments: argparse.Namespace) -> int:
    call = _call_arguments(arguments)  # everything that can be wrong with the input, before anything is loaded
    prompts = _prompts(arguments)
    seeds = [seed for word in arguments.seeds for seed in _seeds(word)]
    as_policy(arguments.policy)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file; give a folder.")
    from dit_accel.devices import pick, put

    device = pick(arguments.device)
    pipe = load_pipeline(arguments.pipeline, arguments.dtype)
    if arguments.out is not None and hasattr(pipe, "video_processor"):
        importlib.import_module("av")  # missing is better known now than when all is made
    import torch

    from dit_accel.compare import compare
    from dit_accel.comparison import write_report

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    classifier = None
    if arguments.classifier is not None:
        from dit_accel.features import FeatureExtractor

        classifier = FeatureExtractor.from_pretrained(arguments.classifier)
    defaults = call_defaults(arguments.pipeline)
    if prompts != [None]:
        defaults.pop("class_labels", None)  # the prompts say which
    comparison = compare(
        put(pipe, device),
        arguments.policy,
        prompts,
        seeds,
        steps=arguments.steps,
        arguments=defaults | call,
        repeats=arguments.repeats,
        paired=arguments.paired,
        classifier=classifier,
    )
    print(comparison.to_json() if arguments.json else comparison.table())
    if arguments.out is not None:
        paths = write_report(comparison, arguments.out, arguments.fps)
        print("Wrote " + ", ".join(str(path) for path in paths), file=sys.stderr)
    return SOME_FAILED if comparison.failures else OK


def _explain(arguments: argparse.Namespace) -> int:
    as_policy(arguments.policy)
    from dit_accel.known_models import is_known, skeleton

    name = os.fspath(arguments.pipeline)
    target = skeleton(name) if is_known(name) else load_pipeline(name, "float32")
    from dit_accel.explain import explain

    print(explain(target, arguments.policy, arguments.steps))
    return OK


def _quantize(arguments: argparse.Namespace) -> int:
    from dit_accel.devices import pick, put
    from dit_accel.quantization.command import check_out, quantize_and_compare, save_pipeline

    call, settings = _call_arguments(arguments), _vector_quant(arguments)
    prompts = _prompts(arguments)
    check_out(arguments.out)
    device = pick(arguments.device)
    pipe = put(load_pipeline(arguments.pipeline, arguments.dtype), device)
    defaults = call_defaults(arguments.pipeline)
    if prompts != [None]:
        defaults.pop("class_labels", None)  # the prompts say which
    with _Bars() as bars:
        outcome = quantize_and_compare(
            pipe,
            settings,
            prompts=prompts,
            items=arguments.items,
            steps=arguments.steps,
            arguments=defaults | call,
            folder=arguments.work,
            progress=bars,
        )
    source = Path(arguments.pipeline) / DEFAULTS_FILE
    save_pipeline(pipe, arguments.out, outcome, {DEFAULTS_FILE: source.read_bytes()} if source.is_file() else {})
    print(json.dumps(outcome.to_dict(), indent=1) if arguments.json else outcome.text())
    print(f"Wrote {arguments.out}; load it after `from dit_accel import load_model`.", file=sys.stderr)
    return OK


def _vector_quant(arguments: argparse.Namespace) -> Any:
    """The settings of the weights: of a policy, with what else was given."""
    from dit_accel.settings import from_mapping
    from dit_accel.weights.vector_quant import VectorQuant

    policy = as_policy(arguments.policy) if arguments.policy is not None else Policy(weights=VectorQuant())
    if policy.weights is None:
        raise UsageError(f"--policy {arguments.policy} does not say how weights are stored; give one such as 'vq'.")
    data = policy.weights.to_dict()
    for word in arguments.set:
        key, equals, text = word.partition("=")
        owner = data["calibrate"] if key in data["calibrate"] else data
        try:
            owner[key] = json.loads(text) if equals else None
        except ValueError:
            owner[key] = text
    given = {"bits": arguments.bits, "method": arguments.method}
    data |= {key: value for key, value in given.items() if value is not None}
    if data["method"] != "data-free" and not data["calibrate"]["prompts"]:
        data["calibrate"]["prompts"] = [prompt for prompt in _prompts(arguments) if prompt is not None]
    return from_mapping(VectorQuant, data)


def _render(arguments: argparse.Namespace) -> int:
    from dit_accel.render.command import run

    steps = {} if arguments.steps is None else {"num_inference_steps": arguments.steps}
    call = _call_arguments(arguments) | steps
    return run(arguments, call if arguments.pipeline is None else call_defaults(arguments.pipeline) | call)


class _Bars:
    """Progress of the stages of a long job: one bar after another."""

    def __enter__(self) -> _Bars:
        self._name, self._bar = "", None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._name:
            self.__exit__()
            self._name, self._bar = what, tqdm(total=total, desc=what)
        assert self._bar is not None
        self._bar.update(done - self._bar.n)


def _tune(arguments: argparse.Namespace) -> int:
    call = _call_arguments(arguments)
    prompts = _prompts(arguments)
    if arguments.out.suffix not in (".json", ".yaml", ".yml") or not arguments.out.parent.is_dir():
        raise UsageError(
            f"--out {arguments.out} is not a .json or .yaml file in a folder that exists; give such a file."
        )
    pipe = load_pipeline(arguments.pipeline)
    from dit_accel.learn import learn_layer_masks, learn_mask, learn_weights

    settings: dict[str, Any] = {"steps": arguments.steps, "arguments": call_defaults(arguments.pipeline) | call}
    if arguments.method != "weights":
        settings |= {"trials": arguments.trials, "progress": _tell}
    learn = {"weights": learn_weights, "mask": learn_mask, "layer-masks": learn_layer_masks}[arguments.method]
    policy = learn(pipe, prompts[: arguments.items], arguments.share, **settings)
    policy.save(arguments.out)
    print(f"Wrote {arguments.out}; use it with --policy {arguments.out}.")
    return OK


def _tell(trial: int, error: float) -> None:
    print(f"trial {trial + 1}: relative L2 {error:.5f}", file=sys.stderr)


def _demo(arguments: argparse.Namespace) -> int:
    from dit_accel.studio.launch import Serving, run

    return run(
        Serving(
            pipelines=tuple(arguments.pipelines),
            out=arguments.out,
            host=arguments.host,
            port=arguments.port,
            browser=not arguments.no_browser,
            share=arguments.share,
            threads=arguments.threads,
        )
    )


BENCHES = {
    "quality": "curves",
    "tables": "tables",
    "overhead": "overhead",
    "dynamics": "dynamics",
    "captions": "captions",
    "seeds": "seeds",
}


def _bench(arguments: argparse.Namespace) -> int:
    module = importlib.import_module(f"dit_accel.bench.{BENCHES[arguments.bench]}")
    return module.main(arguments.rest)


def _policy_list(arguments: argparse.Namespace) -> int:
    del arguments
    known = policies()
    width = max(map(len, known))
    for name, description in known.items():
        print(f"{name:{width}}  {description}")
    return OK


def _policy_show(arguments: argparse.Namespace) -> int:
    print(json.dumps(as_policy(arguments.policy).to_dict(), indent=2))
    return OK


def _policy_validate(arguments: argparse.Namespace) -> int:
    Policy.load(arguments.file)
    print(f"{arguments.file} is a valid policy.")
    return OK


def _policy_schema(arguments: argparse.Namespace) -> int:
    del arguments
    print(json.dumps(Policy.schema(), indent=2))
    return OK


# -------------------------------------------------------------------------------------------------------------- input


def load_pipeline(name: str | os.PathLike[str], dtype: str = "float32") -> Any:
    """A diffusers pipeline from a local folder or the hub, from safetensors only; failures are one sentence."""
    name = os.fspath(name)
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UsageError(f"There is no folder {name}, and it is no hub id (owner/name); give one of them.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    import transformers
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    from dit_accel.quantization.quantizer import register

    register()

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        if not os.path.isdir(name):
            raise UsageError(
                f"{name} is not on this machine, and cannot be got from the hub ({type(error).__name__}); "
                "give a folder, or check the id and the network."
            ) from error
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UsageError(f"The pipeline {name} cannot be loaded: {reason}.") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_defaults(pipeline: str | os.PathLike[str]) -> dict[str, Any]:
    """Default call arguments that a pipeline folder brings along in `dit_accel_defaults.json`, if it has that file."""
    path = Path(pipeline) / DEFAULTS_FILE
    if not path.is_file():
        return {}
    try:
        defaults = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(defaults, dict):
        raise UsageError(f"{path} holds {type(defaults).__name__}; give a JSON object of call arguments.")
    return defaults


def _call_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Call arguments given on the command line, by the pipeline's own names."""
    named = {
        "guidance_scale": arguments.guidance,
        "negative_prompt": arguments.negative,
        "height": arguments.height,
        "width": arguments.width,
    }
    call = {key: value for key, value in named.items() if value is not None}
    for word in arguments.arg:
        key, equals, text = word.partition("=")
        try:
            if not (equals and key):
                raise ValueError
            call[key] = json.loads(text)
        except ValueError:
            raise UsageError(
                f"--arg {word} is not KEY=JSON; give for example true_cfg_scale=3.0, or with quotes 'style=\"plain\"'."
            ) from None
    return call


def _prompts(arguments: argparse.Namespace) -> list[str | None]:
    if arguments.prompts_file is None:
        return arguments.prompts or [None]
    try:
        lines = arguments.prompts_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts-file {arguments.prompts_file} cannot be read: {error}.") from None
    prompts: list[str | None] = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts-file {arguments.prompts_file} has no prompts; give one a line.")
    return prompts


def _seeds(word: str) -> Sequence[int]:
    """ "3" is one seed, "0:8" are eight."""
    first, colon, end = word.partition(":")
    try:
        seeds = range(int(first), int(end)) if colon else range(int(word), int(word) + 1)
    except ValueError:
        seeds = range(0)
    if not seeds or seeds[0] < 0:
        raise UsageError(f"--seeds {word} is no seed; give integers such as 0 1 2, or a range such as 0:8.")
    return seeds


def _positive(word: str) -> int:
    number = int(word) if word.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not allowed; give an integer of at least 1")
    return number


# ------------------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dit-accel", description="Makes diffusers' diffusion transformers faster.")
    parser.add_argument("--version", action="version", version=f"dit-accel {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _compare_parser(
        _command(commands, "compare", "measure a policy against the plain pipeline and fewer steps", _compare)
    )
    _render_parser(_command(commands, "render", "make every item of a manifest, and go on where it was left", _render))
    explained = _command(commands, "explain", "say what a policy would do to a pipeline, without generating", _explain)
    _pipeline_and_policy(explained)
    explained.description = (
        "Say what a policy would do to a pipeline, without generating. PIPELINE may also be a model's config.json, or "
        "a public model, counted without its weights: flux.1-dev, sd3.5-large, wan2.1-t2v-14b, qwen-image, ..."
    )
    explained.add_argument("--steps", type=_positive, help="number of denoising steps to plan for (default: any)")
    _tune_parser(_command(commands, "tune", "fit a policy to a pipeline, and save it", _tune))
    _quantize_parser(_command(commands, "quantize", "store the weights of a pipeline as codes, and save it", _quantize))
    _demo_parser(_command(commands, "demo", "serve the studio: a page that shows what is skipped and its cost", _demo))
    bench = _command(commands, "bench", "run a benchmark; `dit-accel bench quality --help` says more", _bench)
    bench.add_argument("bench", choices=BENCHES, help="which")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments, a pipeline folder first")
    group = commands.add_parser("policy", help="list, show and check policies").add_subparsers(
        required=True, metavar="ACTION"
    )
    _command(group, "list", "names and what they are", _policy_list)
    shown = _command(group, "show", "print a policy as JSON", _policy_show)
    shown.add_argument("policy", metavar="NAME|FILE", help="a name from `policy list`, or a .json or .yaml file")
    checked = _command(group, "validate", "check a policy file", _policy_validate)
    checked.add_argument("file", metavar="FILE", help="a .json or .yaml file")
    _command(group, "schema", "print the JSON Schema of policy files", _policy_schema)
    return parser


def _command(group: Any, name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=run)
    return parser


def _pipeline_and_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a diffusers pipeline, or a hub id")
    parser.add_argument("--policy", default="balanced", metavar="NAME|FILE", help="default: %(default)s")


def _compare_parser(parser: argparse.ArgumentParser) -> None:
    _pipeline_and_policy(parser)
    _prompt_options(parser)
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="N|A:B", help="0 1 2, or 0:8 (default: 0)")
    parser.add_argument("--paired", action="store_true", help="prompt i with seed i alone, not with every seed")
    parser.add_argument("--steps", type=_positive, default=50, help="default: %(default)s")
    parser.add_argument(
        "--classifier", type=Path, metavar="DIR", help="a FeatureExtractor, such as pipelines/fashion-classifier"
    )
    parser.add_argument("--repeats", type=_positive, default=1, help="timings of each item (default: %(default)s)")
    _call_options(parser)
    parser.add_argument("--threads", type=_positive, metavar="N", help="torch threads (default: torch's)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--fps", type=_positive, default=16, help="of written videos (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write comparison.json, table.txt, grid.png, strip.png; of videos also sheet.png and MP4s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _render_parser(parser: argparse.ArgumentParser) -> None:
    from dit_accel.render.options import add_options

    add_options(parser)
    _call_options(parser)


def _quantize_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a diffusers pipeline, or a hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the quantised pipeline")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), help="bits a weight (default: the policy's, 2)")
    parser.add_argument(
        "--method",
        choices=("data-free", "feedback", "vq4dit", "pv-tuning"),
        help="how codes are found; all but data-free run the pipeline first (default: the policy's, data-free)",
    )
    parser.add_argument(
        "--policy", metavar="NAME|FILE", help="a policy that says more about the weights, such as vq4dit"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of dit_accel.VectorQuant or its calibration, such as low_rank=16, tuning=1000 or runs=16",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where an interrupted calibration goes on from")
    _prompt_options(parser)
    parser.add_argument("--items", type=_positive, default=4, help="compared with the dense pipeline (default: 4)")
    parser.add_argument("--steps", type=_positive, default=20, help="of the compared items (default: %(default)s)")
    _call_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all that stays dense (default: float32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _tune_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a diffusers pipeline, or a hub id")
    parser.add_argument(
        "--method",
        choices=("weights", "mask", "layer-masks"),
        default="weights",
        help="weights of each step's forecast (L2P), which steps to compute, or when attention and MLPs are "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--share", type=float, default=0.35, help="of the steps that are computed (default: %(default)s)"
    )
    parser.add_argument("--steps", type=_positive, default=50, help="of the run that it is for (default: %(default)s)")
    parser.add_argument("--items", type=_positive, default=4, help="prompts used, item i with seed i (default: 4)")
    parser.add_argument("--trials", type=_positive, default=60, help="masks that are tried (default: %(default)s)")
    _prompt_options(parser)
    _call_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the policy, .json or .yaml")


def _demo_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipelines", type=Path, nargs="+", default=[], metavar="DIR", help="that may be chosen (default: the shipped)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/studio"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=_positive, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument("--no-browser", action="store_true", help="do not open one (default: open it)")
    parser.add_argument("--share", action="store_true", help="also a public link of Gradio's; needs a password")
    parser.add_argument("--threads", type=_positive, metavar="N", help="torch threads (default: torch's)")


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts or class names (default: none)")
    source.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt a line")


def _call_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance", type=float, metavar="X", help="guidance_scale (default: the pipeline's)")
    parser.add_argument("--negative", metavar="TEXT", help="negative_prompt (default: the pipeline's)")
    parser.add_argument("--height", type=_positive, help="pixels (default: the pipeline's)")
    parser.add_argument("--width", type=_positive, help="pixels (default: the pipeline's)")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="another call argument, such as true_cfg_scale=3.0",
    )


if __name__ == "__main__":
    sys.exit(main())
