"""How a denoiser is wrapped: find its blocks, observe one forward, pass through, override the tail."""
