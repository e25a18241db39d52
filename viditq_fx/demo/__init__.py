"""The digits demo: a small trained diffusion transformer, its sampler and the figures that judge it."""
