"""Controls: what a visitor can set: pipeline, prompt, seed, size, policy, and the knobs of the four mechanisms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from dit_accel.policy import Policy
from dit_accel.studio.accepted import names
from dit_accel.studio.catalogue import Model
from dit_accel.studio.knobs import PANELS, Knob, with_values
from dit_accel.studio.limits import Limits
from dit_accel.studio.wanted import FULL_RUN

OWN = "your own"  # as a preset: the knobs were turned
FIRST_PRESET = "balanced"
_FIRST = ("exact", "quality", "balanced", "fast", "sparse", "vq")  # on top of the list


@dataclass(frozen=True)
class Controls:
    """The components. sentence: what the preset is; base: state, the policy as data that the knobs started from;
    groups, switches: of the four panels; knobs: all values of the panels, as `values_of` orders them."""

    pipeline: gr.Dropdown
    prompt: gr.Textbox
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    height: gr.Number
    width: gr.Number
    frames: gr.Number
    preset: gr.Dropdown
    sentence: gr.HTML
    generate: gr.Button
    cancel: gr.Button
    base: gr.State
    panels: Sequence[gr.Accordion]
    groups: Sequence[gr.Group]
    switches: Sequence[gr.Checkbox]
    knobs: Sequence[Any]

    @property
    def asked(self) -> list[Any]:
        """What a request is made of, in the order of `ASKED`, then preset, base and knobs."""
        own = [self.prompt, self.seed, self.steps, self.guidance, self.height, self.width, self.frames]
        return [self.pipeline, *own, self.preset, self.base, *self.knobs]

    def for_model(self, model: Model) -> dict[Any, Any]:
        """Updates for another pipeline: its own prompt, guidance and size."""
        height, width = model.size or (None, None)
        sized, moving = model.size is not None, model.frames is not None
        return {
            self.pipeline: model.name,
            self.prompt: gr.update(
                value=model.prompts[0] if model.prompts else "",
                label="Class" if model.takes_class else "Prompt",
            ),
            self.guidance: gr.update(value=model.default_guidance, visible=model.guidance is not None),
            self.height: gr.update(value=height, visible=sized),
            self.width: gr.update(value=width, visible=sized),
            self.frames: gr.update(value=model.frames, visible=moving),
        }

    def for_policy(self, policy: Policy, name: str | None) -> dict[Any, Any]:
        """Updates that show a policy."""
        data = policy.to_dict()
        updates: dict[Any, Any] = {self.preset: name or OWN, self.sentence: preset_words(name or OWN), self.base: data}
        updates |= self.for_switches([data[panel.part] is not None for panel in PANELS])
        controls = iter(self.knobs)
        for panel in PANELS:
            updates[next(controls)] = data[panel.part] is not None
            shown = data[panel.part] or panel.start()
            updates |= {next(controls): gr.update(**_state(knob, shown)) for knob in panel.knobs}
        return updates

    def for_switches(self, on: Sequence[bool]) -> dict[Any, Any]:
        """Updates that hide the knobs of what is off, and say so in the titles."""
        updates: dict[Any, Any] = {}
        for panel, accordion, group, here in zip(PANELS, self.panels, self.groups, on):
            updates[accordion] = gr.update(label=_title(panel.title, here))
            updates[group] = gr.update(visible=here)
        return updates

    @property
    def all(self) -> list[Any]:
        """Every component that the updates above may name."""
        return [*self.asked, self.sentence, *self.panels, *self.groups]


def chosen_policy(preset: Any, base: Mapping[str, Any], values: Sequence[Any]) -> Any:
    """What `accepted` takes: the preset's name where no knob was turned, else the policy that the knobs say."""
    policy = with_values(base, values)
    return preset if preset != OWN and policy == base else policy


def build_controls(model: Model, limits: Limits, models: Sequence[str]) -> Controls:
    """Lay the controls out where they are called; they start with a model and the first preset."""
    policy = Policy.named(FIRST_PRESET)
    data = policy.to_dict()
    pipeline = gr.Dropdown(list(models), value=model.name, label="Pipeline", elem_id="pipeline", filterable=False)
    prompt = gr.Textbox(
        value=model.prompts[0] if model.prompts else "",
        label="Class" if model.takes_class else "Prompt",
        lines=2,
        max_length=limits.letters,
        elem_id="prompt",
    )
    preset = gr.Dropdown(_presets(), value=FIRST_PRESET, label="Preset", elem_id="preset")
    sentence = gr.HTML(preset_words(FIRST_PRESET), elem_id="preset-words")
    with gr.Row():
        # Not before the page has read its link: a quick click would run other settings than it shows.
        generate = gr.Button(
            "Generate", variant="primary", elem_id="generate", scale=3, min_width=120, interactive=False
        )
        cancel = gr.Button("Cancel", elem_id="cancel", scale=2, min_width=80)
    with gr.Accordion("Steps, guidance, seed, size", open=False):
        steps = gr.Slider(1, limits.steps, FULL_RUN, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(
            0,
            limits.guidance,
            model.default_guidance,
            step=0.1,
            label="Guidance",
            elem_id="guidance",
            visible=model.guidance is not None,
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
        with gr.Row():
            own = model.size or (None, None)
            height, width, frames = _side("Height", own[0]), _side("Width", own[1]), _side("Frames", model.frames)
    panels, groups, switches, knobs = [], [], [], []
    for panel in PANELS:
        here = data[panel.part] is not None
        with gr.Accordion(_title(panel.title, here), open=False, elem_id=f"panel-{panel.part}") as accordion:
            gr.HTML(f"<p class='hint'>{panel.why}</p>")
            switch = gr.Checkbox(here, label="On", elem_id=f"on-{panel.part}")
            with gr.Group(visible=here) as group:
                controls = [_control(knob, data[panel.part] or panel.start(), panel.part) for knob in panel.knobs]
        panels.append(accordion)
        groups.append(group)
        switches.append(switch)
        knobs += [switch, *controls]
    base = gr.State(data)
    return Controls(
        pipeline,
        prompt,
        seed,
        steps,
        guidance,
        height,
        width,
        frames,
        preset,
        sentence,
        generate,
        cancel,
        base,
        panels,
        groups,
        switches,
        knobs,
    )


def _side(label: str, value: int | None) -> gr.Number:
    """A size, which is there for pipelines that take it."""
    return gr.Number(value, label=label, precision=0, min_width=80, visible=value is not None)


def _presets() -> list[str]:
    return [*_FIRST, *(name for name in names() if name not in _FIRST), OWN]


def preset_words(name: str) -> str:
    """What a preset is, as HTML."""
    sentence = names().get(name, "what the panels below say")
    return f"<p class='hint'>{escape(sentence[0].upper() + sentence[1:])}.</p>"


def _title(title: str, here: bool) -> str:
    return f"{title}: {'on' if here else 'off'}"


def _control(knob: Knob, part: Mapping[str, Any], owner: str) -> Any:
    shared: dict[str, Any] = {"label": knob.label, "info": knob.why, "elem_id": f"{owner}-{knob.name}"}
    if knob.choices:
        return gr.Dropdown(filterable=False, **shared, **_state(knob, part))
    return gr.Slider(**shared, **_state(knob, part))


def _state(knob: Knob, part: Mapping[str, Any]) -> dict[str, Any]:
    """What of a control depends on the policy. A setting that is null has no number to turn, so its knob is hidden; one
    beyond the usual range widens it."""
    value = part[knob.name]
    if knob.choices:
        return {"value": value, "choices": [*knob.choices, *([] if value in knob.choices else [value])]}
    high, step = knob.scale(part) if knob.scale is not None else (knob.high, knob.step)
    if value is None:
        return {"value": knob.low, "minimum": knob.low, "maximum": high, "step": step, "visible": False}
    low, high = min(knob.low, value), max(high, value)
    return {"value": value, "minimum": low, "maximum": high, "step": step, "visible": True}
