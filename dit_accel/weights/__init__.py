"""Vector-quantised weights: the arithmetic of codes, rotations, codebooks and Hessian feedback; knows no diffusers."""
