"""App: the page as a whole: a heading, two tabs, and the endpoints for other programs."""

from __future__ import annotations

import gradio as gr

from dit_accel.studio.api import build_api
from dit_accel.studio.compare_tab import build_compare_tab
from dit_accel.studio.queue_tab import build_queue_tab
from dit_accel.studio.studio import Studio
from dit_accel.studio.visit import Visit

_HOUR = 3600


def build_app(studio: Studio) -> gr.Blocks:
    """The page. Files in Gradio's cache go after a day."""
    with gr.Blocks(title="dit_accel studio", analytics_enabled=False, delete_cache=(_HOUR, 24 * _HOUR)) as app:
        visit = gr.State(Visit(), time_to_live=8 * _HOUR, delete_callback=lambda visit: visit.stop.ask())
        gr.HTML(
            "<h1>dit_accel studio</h1><p class='hint'>See what an accelerated diffusion transformer leaves out, and "
            "what that costs. Nothing leaves this machine.</p>"
        )
        with gr.Tabs():
            with gr.Tab("Compare"):
                controls = build_compare_tab(studio, app, visit)
            with gr.Tab("Queue"):
                build_queue_tab(studio, visit, controls)
        build_api(studio, visit)
    return app
