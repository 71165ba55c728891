"""Queue tab: a list of prompts in, a gallery and a zip out, with progress and cancel."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.studio.batch import BatchState, render_list
from dit_accel.studio.compare_tab import PIPE, read_upload
from dit_accel.studio.controls import Controls, chosen_policy
from dit_accel.studio.prompt_list import rows_of
from dit_accel.studio.studio import Studio, sentence_of
from dit_accel.studio.visit import Visit
from dit_accel.studio.watch import Cancelled
from dit_accel.studio.words import said


def build_queue_tab(studio: Studio, visit: gr.State, controls: Controls) -> None:
    """Lay out the tab where it is called, and connect it. controls: of the other tab, whose policy is used."""
    gr.HTML(
        "<p>One prompt a line (or a <code>.jsonl</code> or <code>.csv</code> manifest of <code>dit-accel render</code>"
        "). Every line becomes a picture, with the pipeline, the steps and the policy of the tab <b>Compare</b>.</p>"
    )
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=2, min_width=300):
            pasted = gr.Textbox(
                "\n".join(studio.model(studio.names[0]).prompts[:3]), label="Prompts", lines=8, elem_id="queue-list"
            )
            upload = gr.File(label="or a file", file_types=[".txt", ".jsonl", ".csv"], elem_id="queue-file", height=110)
            with gr.Row():
                start = gr.Button("Render", variant="primary", elem_id="queue-start", scale=3, min_width=120)
                cancel = gr.Button("Cancel", elem_id="queue-cancel", scale=2, min_width=80)
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML(said("Nothing is rendered yet."), elem_id="queue-status")
            gallery = gr.Gallery(
                label="Finished",
                format="png",
                columns=4,
                object_fit="contain",
                elem_classes="pixels",
                elem_id="queue-gallery",
                height=420,
            )
            archive = gr.File(label="All finished files (zip)", interactive=False, elem_id="queue-zip")

    def arm(visit: Visit) -> str:
        visit.begin()
        return said("Waiting for its turn.")

    def end(visit: Visit) -> None:
        visit.stop.ask()

    def run(
        visit: Visit, file: str | None, text: str, pipeline: Any, steps: Any, preset: Any, base: Any, *knobs: Any
    ) -> Iterator[dict[Any, Any]]:
        try:
            model = studio.model(pipeline)
            given = read_upload(file, studio.limits.list_bytes) if file else text
            name = Path(file).name if file else ""
            rows = rows_of(given, name, model, studio.limits, steps, chosen_policy(preset, base, knobs))
            for state in render_list(studio.engine, model, rows, studio.output.new_queue(), visit.stop):
                yield {
                    status: batch_words(state),
                    gallery: [(str(path), caption) for path, caption in state.pictures],
                    archive: None if state.archive is None else str(state.archive),
                }
        except Cancelled:
            yield {status: said("Cancelled before the first item.")}
        except Exception as error:
            yield {status: said(sentence_of(error), wrong=True)}

    start.click(arm, visit, status, queue=False, api_visibility="private", show_progress="hidden").then(
        run,
        [visit, upload, pasted, controls.pipeline, controls.steps, controls.preset, controls.base, *controls.knobs],
        [status, gallery, archive],
        concurrency_id=PIPE,
        concurrency_limit=1,
        api_visibility="private",
        show_progress="hidden",
    )
    cancel.click(end, visit, None, queue=False, api_visibility="private")


def batch_words(state: BatchState) -> str:
    """Where a list stands, as HTML."""
    finished = state.done + state.failed
    if state.cancelled:
        head = f"Cancelled after {finished} of {state.total}; what is finished stays."
    elif state.report is not None:
        head = f"{state.done} of {state.total} made in {state.report.seconds:.1f} s."
    else:
        head = f"{finished} of {state.total} made"
    bar = f'<progress max="{state.total}" value="{finished}" aria-label="items made"></progress>'
    errors = "".join(f"<li>{escape(error)}</li>" for error in state.errors)
    return f"{said(head)}{bar}" + (f"<ul class='errors'>{errors}</ul>" if errors else "")
