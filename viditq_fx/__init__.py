"""viditq_fx: run diffusion transformers quantized through torch.compile(model, backend="viditq")."""

__version__ = "0.1.0"
