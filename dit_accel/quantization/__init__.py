"""Vector-quantised weights in models: which layers, how their codes are found, and the plug-in of diffusers."""
