"""Studio: a page that shows what was skipped and what it cost (docs/studio.md). Gradio is imported in here alone."""
