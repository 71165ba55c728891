"""Result view: what a visitor sees of a run: the verdict, both pictures, the map, masks, weights, costs, and export."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dit_accel.policy import Policy
from dit_accel.studio.catalogue import Model
from dit_accel.studio.cost_plot import cost_plot, recorded
from dit_accel.studio.export import command, policy_json, python_lines, query
from dit_accel.studio.followed import Progress
from dit_accel.studio.mask_view import mask_view
from dit_accel.studio.outcome import Outcome
from dit_accel.studio.output import AMPLIFIED, Files, png
from dit_accel.studio.step_map import EMPTY, step_map
from dit_accel.studio.visit import Visit
from dit_accel.studio.weight_view import weight_view
from dit_accel.studio.words import progress, result

_WELCOME = (
    "<p class='verdict'>The same picture twice: plain, and with less work.</p><p>Press <b>Generate</b>. The slider "
    "shows both pictures, the map below which blocks of the model were run at which step, and the numbers say what was "
    "gained and what it cost.</p>"
)

_MOVE = "(position) => ({__type__: 'update', slider_position: position})"


@dataclass(frozen=True)
class ResultView:
    """The components."""

    headline: gr.HTML
    images: gr.Group
    slider: gr.ImageSlider
    difference: gr.Image
    position: gr.Slider
    videos: gr.Group
    plain_video: gr.Video
    made_video: gr.Video
    difference_video: gr.Video
    steps: gr.HTML
    layer: gr.Dropdown
    head: gr.Slider
    mask: gr.HTML
    weights: gr.HTML
    costs: gr.HTML
    files: gr.File
    policy: gr.Code
    python: gr.Code
    command: gr.Code
    link: gr.Textbox

    @property
    def all(self) -> list[Any]:
        return list(vars(self).values())

    def during(self, state: Progress, policy: Policy) -> dict[Any, Any]:
        """Updates while a run is made. policy: its own, from which the map takes the threshold."""
        updates: dict[Any, Any] = {self.headline: progress(state) + _looks(state)}
        if state.records:
            updates[self.steps] = step_map(state.records, state.total, policy)
        return updates

    def after(self, outcome: Outcome, files: Files, model: Model, visit: Visit) -> dict[Any, Any]:
        """Updates once it is made."""
        wanted, moving = outcome.wanted, outcome.is_video
        layers = list(outcome.masks)
        heads = len(next(iter(outcome.masks.values()))) if layers else 1
        guidance = float(wanted.arguments.get(model.guidance or "", 1.0))
        tries = [each for each in visit.tries if each.pipeline == wanted.pipeline]
        shown: dict[Any, Any] = {self.images: gr.update(visible=not moving), self.videos: gr.update(visible=moving)}
        if moving:
            shown |= {
                self.plain_video: str(files.plain),
                self.made_video: str(files.made),
                self.difference_video: str(files.difference),
            }
        else:
            shown |= {self.slider: (str(files.plain), str(files.made)), self.difference: str(files.difference)}
        return shown | {
            self.headline: result(outcome),
            self.steps: step_map(outcome.records, wanted.steps, wanted.policy, outcome.audits),
            self.layer: gr.update(choices=layers, value=layers[0] if layers else None, visible=bool(layers)),
            self.head: gr.update(maximum=max(1, heads - 1), value=0, visible=heads > 1),
            self.mask: mask_view(outcome.masks, None, 0),
            self.weights: weight_view(outcome.weight_errors, outcome.bits, outcome.times_smaller),
            self.costs: cost_plot(tries, recorded(model.folder, guidance)),
            self.files: [str(path) for path in files.downloads],
            self.policy: policy_json(wanted.policy),
            self.python: python_lines(wanted, model),
            self.command: command(wanted, model),
            self.link: query(wanted, model),
        }


def _looks(state: Progress) -> str:
    """The plain picture once it is finished, and the unfinished one."""
    looks = {"plain": state.plain, f"{state.phase} so far": state.preview}
    return f'<div class="looks">{"".join(_look(*pair) for pair in looks.items() if pair[1] is not None)}</div>'


def _look(caption: str, picture: Any) -> str:
    """A picture [3, H, W] inside the page, so that no file is written for it."""
    step = max(1, max(picture.shape[-2:]) // 256)
    data = base64.b64encode(png(picture[:, ::step, ::step])).decode()
    return (
        f'<figure class="preview"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def build_result_view(model: Model) -> ResultView:
    """Lay the views out where they are called."""
    headline = gr.HTML(_WELCOME, elem_id="headline")
    with gr.Group(visible=model.frames is None) as images:
        slider, difference = _pictures()
        # The divider of the pictures answers to a mouse alone; this one to keys as well.
        position = gr.Slider(
            0, 100, 50, step=1, label="Divider: left of it plain, right of it accelerated", elem_id="divider"
        )
        position.input(fn=None, inputs=position, outputs=slider, js=_MOVE, api_visibility="private")
    with gr.Group(visible=model.frames is not None) as videos, gr.Row(elem_classes="columns"):
        plain_video = _player("plain", "Plain")
        made_video = _player("made", "Accelerated")
        difference_video = _player("difference", f"Difference x {AMPLIFIED}")
    with gr.Accordion("What was run at which step", open=True):
        steps = gr.HTML(EMPTY, elem_id="steps-map")
    with gr.Accordion("Quality against cost", open=False):
        costs = gr.HTML(cost_plot((), recorded(model.folder, model.default_guidance)), elem_id="costs")
    with gr.Accordion("Sparse attention: which blocks see each other", open=False):
        with gr.Row():
            layer = gr.Dropdown([], label="Layer", visible=False, elem_id="mask-layer")
            head = gr.Slider(0, 1, 0, step=1, label="Head", visible=False, elem_id="mask-head")
        mask = gr.HTML(mask_view({}, None, 0), elem_id="mask")
    with gr.Accordion("Smaller weights: error of each layer", open=False):
        weights = gr.HTML(weight_view({}, None, None), elem_id="weights")
    with gr.Accordion("Take it away: files, policy, Python, command, link", open=False, elem_id="export"):
        files = gr.File(
            label="Exact files: PNG or MP4 with frames, and the policy",
            file_count="multiple",
            interactive=False,
            elem_id="files",
        )
        python = _code("Python", "python", "python")
        shell = _code("Command line", "shell", "command")
        policy = _code("Policy (JSON)", "json", "policy")
        link = gr.Textbox(label="Link to these settings", interactive=False, buttons=["copy"], elem_id="link")
    return ResultView(
        headline,
        images,
        slider,
        difference,
        position,
        videos,
        plain_video,
        made_video,
        difference_video,
        steps,
        layer,
        head,
        mask,
        weights,
        costs,
        files,
        policy,
        python,
        shell,
        link,
    )


def _pictures() -> tuple[gr.ImageSlider, gr.Image]:
    """Both pictures in one, and the difference."""
    with gr.Row(elem_classes="columns"):
        slider = gr.ImageSlider(
            label="Plain (left) | accelerated (right)",
            format="png",
            type="filepath",
            interactive=False,
            height=320,
            elem_classes="pixels",
            elem_id="slider",
            scale=3,
            min_width=280,
            buttons=["fullscreen"],
        )
        difference = gr.Image(
            label=f"Difference x {AMPLIFIED}",
            format="png",
            interactive=False,
            height=320,
            elem_classes="pixels",
            elem_id="difference",
            scale=2,
            min_width=200,
            buttons=["fullscreen"],
        )
    return slider, difference


def _player(name: str, label: str) -> gr.Video:
    """A player that shows the same moment as the others."""
    return gr.Video(
        label=label,
        interactive=False,
        loop=True,
        autoplay=True,
        height=300,
        min_width=200,
        elem_classes=["pixels", "together"],
        elem_id=f"video-{name}",
        buttons=[],
    )


def _code(label: str, language: Any, name: str) -> gr.Code:
    """Text to be copied."""
    return gr.Code(
        label=label,
        language=language,
        interactive=False,
        wrap_lines=True,
        show_line_numbers=False,
        lines=3,
        max_lines=14,
        elem_id=name,
    )
