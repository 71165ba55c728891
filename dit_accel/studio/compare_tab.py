"""Compare tab: one picture made twice; every event of the tab, from a click to what is shown."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.errors import ArgumentError
from dit_accel.studio.accepted import accepted
from dit_accel.studio.controls import OWN, Controls, build_controls, chosen_policy, preset_words
from dit_accel.studio.export import linked
from dit_accel.studio.followed import Progress
from dit_accel.studio.mask_view import mask_view
from dit_accel.studio.result_view import ResultView, build_result_view
from dit_accel.studio.studio import Studio, sentence_of
from dit_accel.studio.visit import Visit
from dit_accel.studio.wanted import wanted
from dit_accel.studio.watch import Cancelled
from dit_accel.studio.words import said

PIPE = "pipe"  # concurrency of everything that runs a pipeline: one at a time
_EVERY = 0.15  # seconds between two looks at a run, at least: a browser need not draw more
CANCELLED = "Cancelled. Nothing is left of it: the next run is as if it had never begun."


def build_compare_tab(studio: Studio, page: gr.Blocks, visit: gr.State) -> Controls:
    """Lay out the tab where it is called, and connect it. page: whose opening is listened to."""
    model = studio.model(studio.names[0])
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=2, min_width=300):
            controls = build_controls(model, studio.limits, studio.names)
            with gr.Accordion("Use a policy of your own", open=False, elem_id="import"):
                upload = gr.File(label="Policy file", file_types=[".json"], elem_id="policy-file", height=110)
                pasted = gr.Textbox(label="or its JSON", lines=3, max_length=studio.limits.policy_letters)
                use = gr.Button("Use this policy", elem_id="use-policy")
        with gr.Column(scale=5, min_width=300):
            view = build_result_view(model)
    events = _Events(studio, controls, view)

    def named(function: Any) -> dict[str, Any]:
        name = f"page_{function.__name__}"  # the plain name is free for the endpoint that other programs call
        return {"fn": function, "api_name": name, "api_visibility": "private", "show_progress": "hidden"}

    armed = controls.generate.click(**named(events.arm), inputs=visit, outputs=view.headline, queue=False)
    made = armed.then(
        **named(events.generate),
        inputs=[visit, *controls.asked],
        outputs=view.all,
        concurrency_id=PIPE,
        concurrency_limit=1,
    )
    controls.generate.click(fn=None, js=_LOOK_THERE, api_visibility="private")
    made.then(fn=None, inputs=view.link, outputs=view.link, js=_SHOW_LINK, api_visibility="private")
    controls.cancel.click(**named(events.cancel), inputs=visit, outputs=None, queue=False)
    controls.pipeline.input(
        **named(events.choose_model), inputs=controls.pipeline, outputs=[*controls.all, view.headline]
    )
    controls.preset.input(
        **named(events.choose_preset), inputs=controls.preset, outputs=[*controls.all, view.headline], queue=False
    )
    for knob in controls.knobs:  # at once and in the browser, so that a quick click on Generate comes after it
        knob.input(fn=None, outputs=[controls.preset, controls.sentence], js=_TURNED, api_visibility="private")
    for switch in controls.switches:
        switch.input(
            **named(events.turn),
            inputs=list(controls.switches),
            outputs=[*controls.panels, *controls.groups],
            queue=False,
        )
    use.click(**named(events.use_policy), inputs=[upload, pasted], outputs=[*controls.all, view.headline], queue=False)
    for component in (view.layer, view.head):
        component.input(
            **named(events.look_at_mask), inputs=[visit, view.layer, view.head], outputs=view.mask, queue=False
        )
    page.load(**named(events.open), inputs=None, outputs=[*controls.all, controls.generate, view.headline])
    return controls


# On a narrow screen the result is below all panels.
_LOOK_THERE = "() => { if (innerWidth < 641) document.querySelector('#headline').scrollIntoView(); }"
_TURNED = f"() => {json.dumps([OWN, preset_words(OWN)])}"
# The link as a whole, also in the address bar, so that reloading the page keeps the settings.
_SHOW_LINK = """(query) => {
  if (!query || query.startsWith("http")) return query;
  history.replaceState(null, "", "?" + query);
  return location.href;
}"""


class _Events:
    """What happens on the page; every failure is one sentence in it."""

    def __init__(self, studio: Studio, controls: Controls, view: ResultView):
        self.studio, self.controls, self.view = studio, controls, view

    def arm(self, visit: Visit) -> str:
        """Comes before `generate` waits for its turn, so that Cancel also reaches a run that has not begun."""
        visit.begin()
        return said("Waiting for its turn.")

    def cancel(self, visit: Visit) -> None:
        visit.stop.ask()

    def generate(
        self,
        visit: Visit,
        pipeline: Any,
        prompt: Any,
        seed: Any,
        steps: Any,
        guidance: Any,
        height: Any,
        width: Any,
        frames: Any,
        preset: Any,
        base: Any,
        *knobs: Any,
    ) -> Iterator[dict[Any, Any]]:
        try:
            model = self.studio.model(pipeline)
            policy = chosen_policy(preset, base, knobs)
            checked, _ = accepted(policy, self.studio.limits)
            runs = self.studio.compare(
                visit,
                pipeline,
                prompt=prompt,
                seed=seed,
                steps=steps,
                guidance=guidance if model.guidance is not None else None,
                height=height if model.size is not None else None,
                width=width if model.size is not None else None,
                frames=frames if model.frames is not None else None,
                policy=policy,
            )
            shown = 0.0
            for event in runs:
                if not isinstance(event, Progress):
                    yield self.view.after(*event, visit)
                elif time.monotonic() - shown >= _EVERY:
                    yield self.view.during(event, checked)
                    shown = time.monotonic()
        except Cancelled:
            yield {self.view.headline: said(CANCELLED)}
        except Exception as error:
            yield self._wrong(error)

    def choose_model(self, name: Any) -> dict[Any, Any]:
        try:
            return self.controls.for_model(self.studio.model(name))
        except Exception as error:
            return self._wrong(error)

    def choose_preset(self, name: Any) -> dict[Any, Any]:
        if name == OWN:
            return {self.view.headline: gr.skip()}
        try:
            return self.controls.for_policy(*accepted(name, self.studio.limits))
        except Exception as error:
            return self._wrong(error)

    def turn(self, *on: bool) -> dict[Any, Any]:
        return self.controls.for_switches(on)

    def use_policy(self, file: str | None, pasted: str) -> dict[Any, Any]:
        """A policy from outside becomes what the knobs start from."""
        try:
            given = read_upload(file, self.studio.limits.policy_letters) if file else pasted
            if not given.strip():
                raise ArgumentError("No policy is given; upload a file, or paste its JSON.")
            policy, name = accepted(given, self.studio.limits)
        except Exception as error:
            return self._wrong(error)
        return self.controls.for_policy(policy, name) | {
            self.view.headline: said("The policy is in the panels now. Press Generate to see what it does.")
        }

    def look_at_mask(self, visit: Visit, layer: Any, head: Any) -> str:
        masks = {} if visit.outcome is None else visit.outcome.masks
        return mask_view(masks, layer, int(head or 0))

    def open(self, request: gr.Request) -> dict[Any, Any]:
        """A new page: what its link asks for is put into the controls, and checked, but not run."""
        ready = {self.controls.generate: gr.update(interactive=True)}
        asked = linked(dict(request.query_params))
        return ready | (self._shown(asked) if asked else {})

    def _shown(self, asked: dict[str, Any]) -> dict[Any, Any]:
        """Updates that put what is asked for into the controls."""
        try:
            model = self.studio.model(asked.pop("pipeline", self.studio.names[0]))
            asked = {"prompt": model.prompts[0] if model.prompts else "", "seed": 0, "steps": 50} | asked
            checked = wanted(model, self.studio.limits, **asked)
        except Exception as error:
            return self._wrong(error)
        controls = self.controls
        updates = controls.for_model(model) | controls.for_policy(checked.policy, checked.policy_name)
        given = {
            controls.guidance: checked.arguments.get(model.guidance or ""),
            controls.height: checked.arguments.get("height"),
            controls.width: checked.arguments.get("width"),
            controls.frames: checked.arguments.get("num_frames"),
        }
        updates |= {
            component: gr.update(value=value, visible=True) for component, value in given.items() if value is not None
        }
        updates[controls.prompt] = gr.update(value=checked.prompt, label="Class" if model.takes_class else "Prompt")
        updates |= {controls.seed: checked.seed, controls.steps: checked.steps}
        updates[self.view.headline] = said("These are the settings of the link. Press Generate.")
        return updates

    def _wrong(self, error: Exception) -> dict[Any, Any]:
        return {self.view.headline: said(sentence_of(error), wrong=True)}


def read_upload(path: str, most: int) -> str:
    """Text of an uploaded file. Raises ArgumentError."""
    file = Path(path)
    if file.stat().st_size > most:
        raise ArgumentError(f"The file has {file.stat().st_size} bytes; give one of at most {most}.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ArgumentError("The file is no UTF-8 text; save it as UTF-8.") from None
