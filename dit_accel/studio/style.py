"""Style: theme, CSS and the little JavaScript of the page; fonts of the system, as nothing is loaded from elsewhere."""

from __future__ import annotations

import gradio as gr

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
h1 { margin: .2rem 0 0; }
.verdict { font-size: 1.6rem; line-height: 1.3; font-weight: 650; margin: .2rem 0 .2rem; }
.paid { font-size: 1.15rem; margin: 0 0 .9rem; }
.status { font-size: 1.05rem; margin: .2rem 0; }
.status.wrong { border-left: 4px solid #d55e00; padding-left: .7rem; }
progress { width: 100%; height: .6rem; appearance: none; border: 0; border-radius: .3rem; overflow: hidden;
  background: var(--border-color-primary); }
progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: #0072b2; }
progress::-moz-progress-bar { background: #0072b2; }
.hint, .tile dt, .tile span { color: var(--body-text-color); opacity: .8; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.9rem, 1fr)); gap: .6rem; margin: 0; }
.tile { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .5rem .6rem; }
.tile dt { font-size: .85rem; }
.tile dd { margin: 0; }
.tile b { display: block; font-size: 1.1rem; white-space: nowrap; }
.tile span { font-size: .8rem; }
.looks { display: flex; gap: 1rem; }
.preview { margin: .6rem 0 0; width: 9rem; }
.preview img { image-rendering: pixelated; width: 100%; height: auto; display: block; }
.pixels img, .pixels video { image-rendering: pixelated !important; }
.pixels .image-frame img, .pixels .image-container img { width: 100%; height: 100%; object-fit: contain; }
#slider .content, #slider .wrap, #slider .slider-wrap { height: 100%; }
#slider .content img { position: absolute !important; inset: 0 !important; } /* exactly one upon the other */
.pixels video { width: 100%; height: 100%; object-fit: contain; }
.scroll { overflow-x: auto; padding-bottom: .3rem; }
.scroll.tall { max-height: 22rem; overflow-y: auto; }
svg.map text, svg.plot text { fill: var(--body-text-color); font: 11px system-ui, sans-serif; }
svg .title { font-weight: 600; font-size: 12px !important; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .empty { fill: var(--background-fill-secondary); }
svg .rule { stroke: var(--border-color-primary); fill: none; }
svg .limit { stroke: var(--body-text-color); stroke-dasharray: 5 4; fill: none; }
svg .try { fill: #d55e00; stroke: #fff; }
svg .newest { stroke: var(--body-text-color); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .85rem; margin: .4rem 0; }
.key { display: inline-flex; align-items: center; gap: .35rem; }
.scroll table, details table { border: 0 !important; border-collapse: collapse; font-size: .85rem; }
.scroll th, .scroll td, details th, details td { padding: .15rem .6rem; text-align: left;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; font-weight: normal; }
.scroll thead th, details thead th { font-weight: 600; }
.bars .bar { width: 45%; }
.bars .bar span { display: block; height: .7rem; background: #0072b2; }
:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: .5rem !important; }
  .verdict { font-size: 1.2rem; }
  .columns { flex-direction: column !important; }
  .columns > * { flex: 0 0 auto !important; width: 100% !important; }
}
"""

# Players marked .together show the same moment: what is done to one is done to the others.
SYNC = """
<script>
(() => {
  let leader = null;
  const others = (video) => [...document.querySelectorAll(".together video")].filter((each) => each !== video);
  const follow = (event) => {
    const video = event.target;
    if (!(video instanceof HTMLVideoElement) || !video.closest(".together")) return;
    if (leader !== null && leader !== video) return;
    leader = video;
    for (const other of others(video)) {
      if (Math.abs(other.currentTime - video.currentTime) > 0.03) other.currentTime = video.currentTime;
      if (other.paused !== video.paused) video.paused ? other.pause() : other.play().catch(() => {});
    }
    setTimeout(() => { leader = null; }, 60);
  };
  for (const name of ["play", "pause", "seeking", "seeked"]) document.addEventListener(name, follow, true);
})();
</script>
"""


def theme() -> gr.themes.Base:
    """Plain, and readable without any font from the network."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=_FONT, font_mono=_MONO)
