"""Published caching methods as pure arithmetic: one paper a file, no model and no pipeline in sight."""
