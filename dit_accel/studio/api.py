"""API: what other programs may call, with gradio_client or over HTTP: compare, render a list, cancel, what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from dit_accel.studio.accepted import names
from dit_accel.studio.batch import BatchState, render_list
from dit_accel.studio.compare_tab import PIPE
from dit_accel.studio.prompt_list import rows_of
from dit_accel.studio.studio import Studio, sentence_of
from dit_accel.studio.visit import Visit
from dit_accel.studio.watch import Cancelled

_COMPARED = ("pipeline", "prompt", "seed", "steps", "guidance", "height", "width", "frames", "policy")
_LISTED = ("pipeline", "prompts", "steps", "policy")


def build_api(studio: Studio, visit: gr.State) -> None:
    """Add the endpoints. Their inputs take any JSON value, so that what is wrong is told by our own checks."""
    numbers, files, answer = (
        gr.JSON(visible=False, label="numbers"),
        gr.File(visible=False, label="files", file_count="multiple"),
        gr.JSON(visible=False, label="answer"),
    )

    def endpoint(name: str, function: Callable[..., Any], inputs: Any, outputs: Any, **how: Any) -> None:
        gr.Button(visible=False).click(function, inputs, outputs, api_name=name, **how)

    def fields(labels: Any) -> list[Any]:
        return [gr.JSON(visible=False, label=label) for label in labels]

    def compare(
        visit: Visit,
        pipeline: Any,
        prompt: Any,
        seed: Any = 0,
        steps: Any = 50,
        guidance: Any = None,
        height: Any = None,
        width: Any = None,
        frames: Any = None,
        policy: Any = "balanced",
    ) -> tuple[dict[str, Any], list[str]]:
        """One request, plain and accelerated -> numbers by the names of `dit-accel compare --json`, and files: the
        plain picture, the accelerated one, the policy, of videos also the frames."""
        visit.begin()
        try:
            asked = {
                "prompt": prompt,
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
                "height": height,
                "width": width,
                "frames": frames,
                "policy": policy,
            }
            *_, last = studio.compare(visit, pipeline, **asked)
        except Cancelled:
            raise gr.Error("Cancelled.", print_exception=False) from None
        except Exception as error:
            raise gr.Error(sentence_of(error), print_exception=False) from None
        outcome, written, _ = last  # pyright: ignore[reportGeneralTypeIssues] - the last one is the outcome
        return outcome.numbers(), [str(path) for path in written.downloads]

    def render(
        visit: Visit, pipeline: Any, prompts: Any, steps: Any = 50, policy: Any = "balanced"
    ) -> tuple[dict[str, Any], list[str]]:
        """A list of prompts (or text with one a line, or a manifest) -> counts, and the files."""
        visit.begin()
        try:
            model = studio.model(pipeline)
            given = "\n".join(map(str, prompts)) if isinstance(prompts, list) else prompts
            rows = rows_of(given, "", model, studio.limits, steps, policy)
            last = BatchState(len(rows))
            for state in render_list(studio.engine, model, rows, studio.output.new_queue(), visit.stop):
                last = state
        except Cancelled:
            raise gr.Error("Cancelled.", print_exception=False) from None
        except Exception as error:
            raise gr.Error(sentence_of(error), print_exception=False) from None
        counts = {"items": last.total, "done": last.done, "failed": last.failed, "cancelled": last.cancelled}
        return counts | {"errors": list(last.errors)}, [str(path) for path, _ in last.pictures]

    def cancel(visit: Visit) -> dict[str, bool]:
        """End what this client has in progress, within a step."""
        visit.stop.ask()
        return {"asked": True}

    def catalogue() -> dict[str, Any]:
        """Pipelines by name, and policies by name with a sentence each."""
        return {"pipelines": studio.names, "policies": names()}

    one_at_a_time = {"concurrency_id": PIPE, "concurrency_limit": 1}
    endpoint("compare", compare, [visit, *fields(_COMPARED)], [numbers, files], **one_at_a_time)
    endpoint("render", render, [visit, *fields(_LISTED)], [numbers, files], **one_at_a_time)
    endpoint("cancel", cancel, visit, answer, concurrency_limit=8)
    endpoint("catalogue", catalogue, None, answer, concurrency_limit=8)
